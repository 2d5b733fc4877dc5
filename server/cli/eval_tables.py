"""The results of `moespan eval` on a screen."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from server.bench.estimates import Estimate
from server.bench.journal import Json

_MODES = {"force_think": "forced", "no_force_think": "not forced"}
_KL = {"mean": "mean", "median": "median", "p90": "90 %", "p99": "99 %", "p99_9": "99.9 %", "max": "maximum"}

_SMALL = 1e-4  # what is smaller is written with an exponent
_PIPE_WIDTH = 160  # columns where no terminal says how many there are


def headline(setting: Json) -> str:
    """What was measured, in a line."""
    experts = setting["experts_per_token"]
    words = [f"{setting['model']} ({setting['file']})", f"{setting['cache_type']} cache", *([f"{experts} experts a token"] if experts else [])]
    return ", ".join(words)


def questions(result: Json) -> None:
    """Accuracy by skill, for each mode and language."""
    modes = [(result[key], label) for key, label in _MODES.items() if key in result]
    columns = [(mode, language) for mode, _ in modes for language in (*mode["languages"], "all")]
    table = _table("right, %", *(f"{language}\n{label}" for mode, label in modes for language in (*mode["languages"], "all")))
    for skill in modes[0][0]["skills"]:
        table.add_row(skill, *(_percent(mode["skills"][skill].get(language)) for mode, language in columns))
    table.add_section()
    table.add_row("all", *(_percent(mode["all"] if language == "all" else mode["languages"][language]) for mode, language in columns))
    _print(table)
    for mode, label in modes:
        _say(f"Thinking {label}: {mode['all'].n} questions, {_percent(mode['thinking'])} % of the replies think, {mode['tokens'].value:.0f} tokens each", mode)
    if gained := result.get("gained_by_force_think"):
        print(f"Forcing gains {_percent(gained['gain'], sign=True)} points on the same questions ({gained['won']} won, {gained['lost']} lost).")


def _say(line: str, mode: Json) -> None:
    print(f"{line}, {mode['cut']} cut off." if mode["cut"] else f"{line}.")


def text(result: Json) -> None:
    """Perplexity, and what the reference adds."""
    table = _table(f"{result['tokens']} tokens in {result['windows']} windows", "")
    for name, estimate in _text_rows(result).items():
        table.add_row(name, estimate)
    _print(table)


def _text_rows(result: Json) -> dict[str, str]:
    rows = {"perplexity": _number(result["perplexity"])}
    if "kl" in result:
        rows["reference's perplexity"] = _number(result["reference_perplexity"])
        rows["ratio of both"] = _number(result["perplexity_ratio"])
        rows |= {f"KL divergence, {name}": _number(result["kl"][key]) for key, name in _KL.items()}
        rows["same first token, %"] = _percent(result["same_top"], 2)
    return rows


def compared(task: str, a: Json, b: Json, changed: Json) -> None:
    """Two results side by side, and what changed on the same questions or tokens."""
    table = _table("", "A", "B", "B - A, paired")
    for row in _compared_questions(a, b, changed) if task == "questions" else _compared_text(a, b, changed):
        table.add_row(*row)
    _print(table)


def _compared_questions(a: Json, b: Json, changed: Json) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, gains in changed.items():
        before, _, after = key.partition("_to_")  # two modes where the runs have none in common
        mode_a, mode_b = a[before], b[after or before]
        label = f"{_MODES[before]} to {_MODES[after]}" if after else _MODES[before]
        for skill, gain in gains["skills"].items():
            rows.append((f"{skill}, {label}", _percent(mode_a["skills"][skill]["all"]), _percent(mode_b["skills"][skill]["all"]), _percent(gain, sign=True)))
        total = f"{_percent(gains['gain'], sign=True)} ({gains['won']} won, {gains['lost']} lost of {gains['gain'].n})"
        rows.append((f"all, {label}, %", _percent(mode_a["all"]), _percent(mode_b["all"]), total))
    return rows


def _compared_text(a: Json, b: Json, changed: Json) -> list[tuple[str, str, str, str]]:
    of_a, of_b = _text_rows(a), _text_rows(b)
    differences = {"perplexity": f"times {_number(changed['perplexity_ratio'])}"}
    if "kl_mean" in changed:
        differences |= {"KL divergence, mean": _number(changed["kl_mean"], sign=True), "same first token, %": _percent(changed["same_top"], 2, sign=True)}
    return [(name, of_a.get(name, ""), of_b.get(name, ""), differences.get(name, "")) for name in {**of_a, **of_b}]


def _percent(estimate: Estimate | None, digits: int = 1, *, sign: bool = False) -> str:
    if estimate is None:
        return ""
    error = "" if estimate.error is None else f" ± {100 * estimate.error:.{digits}f}"
    return f"{100 * estimate.value:{'+' if sign else ''}.{digits}f}{error}"


def _number(estimate: Estimate, *, sign: bool = False) -> str:
    """As many digits as the error lets stand, and one more."""
    value, error, plus = estimate.value, estimate.error, "+" if sign else ""
    if not error:
        return f"{value:{plus}.4g}"
    if abs(value) < _SMALL:
        return f"{value:{plus}.2e} ± {error:.0e}"
    digits = max(1 - math.floor(math.log10(error)), 0)
    return f"{value:{plus}.{digits}f} ± {error:.{digits}f}"


def _table(*columns: str) -> Table:
    table = Table(box=None)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table)
