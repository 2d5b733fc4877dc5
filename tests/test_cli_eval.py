"""`moespan eval` as a person meets it, on tiny random models: results, references, interrupted runs, and the sentence for each mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from server._native import available_isas
from server.bench import accuracy, divergence
from server.bench.estimates import Estimate
from server.cli import eval_tables, main
from tests.engine.tiny_models import write_tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 6  # 270 bytes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    for name, seed in (("tiny", 0), ("other", 1)):
        write_tiny(directory / f"{name}.gguf", "qwen3moe", vocab=300, context=2048, seed=seed)
    return {name: directory / f"{name}.gguf" for name in ("tiny", "other")}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def run(capsys: pytest.CaptureFixture[str], task: str, *words: object) -> Any:
    """The JSON that the command prints."""
    assert main(["eval", task, *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], task: str, *words: object) -> str:
    assert main(["eval", task, *map(str, words)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def cut(out: Path, records: int) -> None:
    """What an interruption leaves: the setting, some records, and half of the next one."""
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[: 1 + records]) + lines[1 + records][:20])


# --- Text --------------------------------------------------------------------


def test_a_reference_and_a_run_beside_it(models, text, tmp_path, capsys) -> None:
    flags = ("--text", text, "--window", 32, "--cpu_infer", 1)
    whole = run(capsys, "text", "--gguf_path", models["tiny"], *flags, "--save_reference", tmp_path / "ref")
    assert (whole["result"]["windows"], whole["result"]["tokens"]) == (8, 8 * 15)
    assert set(whole["result"]) == {"windows", "tokens", "perplexity"}
    itself = run(capsys, "text", "--gguf_path", models["tiny"], *flags, "--reference", tmp_path / "ref")["result"]
    assert itself["perplexity"] == itself["reference_perplexity"] == whole["result"]["perplexity"]
    assert abs(itself["kl"]["max"]["value"]) < 1e-12
    assert itself["same_top"] == {"value": 1.0, "error": 0.0, "n": 120}
    fewer = run(capsys, "text", "--gguf_path", models["tiny"], *flags, "--experts_per_token", 2, "--reference", tmp_path / "ref")
    assert fewer["setting"]["experts_per_token"] == 2
    assert fewer["setting"]["prefill_precision"] == ("bf16" if available_isas()[0] == "amx" else "int8")
    assert fewer["setting"]["reference"]["experts_per_token"] is None
    assert fewer["result"]["kl"]["mean"]["value"] > 1e-3
    assert fewer["result"]["perplexity"] != fewer["result"]["reference_perplexity"] == itself["perplexity"]


def test_an_interrupted_text_goes_on_as_if_nothing_had_been(models, text, tmp_path, capsys, monkeypatch) -> None:
    def flags(name: str) -> tuple[object, ...]:
        files = ("--out", tmp_path / f"{name}.jsonl", "--save_reference", tmp_path / f"{name}.ref")
        return ("--gguf_path", models["tiny"], "--text", text, "--window", 32, "--cpu_infer", 1, *files)

    expected = run(capsys, "text", *flags("whole"))
    run(capsys, "text", *flags("cut"))
    cut(tmp_path / "cut.jsonl", 3)  # the reference is further: it has all windows
    scored: list[int] = []
    score = divergence.score
    monkeypatch.setattr(divergence, "score", lambda engine, window, *rest: scored.append(1) or score(engine, window, *rest))
    assert run(capsys, "text", *flags("cut"))["result"] == expected["result"]
    assert len(scored) == 5
    for end in ("jsonl", "ref"):
        assert (tmp_path / f"cut.{end}").read_bytes() == (tmp_path / f"whole.{end}").read_bytes()
    assert run(capsys, "text", *flags("cut"))["result"] == expected["result"]  # and once more: nothing is left to do
    assert len(scored) == 5
    reference = ("--gguf_path", models["other"], "--text", text, "--window", 32, "--reference", tmp_path / "whole.ref", "--out", tmp_path / "kl.jsonl")
    beside = run(capsys, "text", *reference)
    cut(tmp_path / "kl.jsonl", 2)
    assert run(capsys, "text", *reference) == beside


def test_the_chats_that_ship_are_the_default(models, capsys) -> None:
    result = run(capsys, "text", "--gguf_path", models["tiny"], "--limit", 2, "--cpu_infer", 1)["result"]
    assert (result["windows"], result["tokens"] > 100) == (2, True)
    whole = run(capsys, "text", "--gguf_path", models["tiny"], "--limit", 2, "--cpu_infer", 1, "--whole_chats")["result"]
    assert whole["tokens"] > result["tokens"]


def test_a_text_as_a_table(models, text, tmp_path, capsys) -> None:
    flags = ("--text", str(text), "--window", "32", "--cpu_infer", "1")
    assert main(["eval", "text", "--gguf_path", str(models["tiny"]), *flags, "--save_reference", str(tmp_path / "ref")]) == 0
    assert main(["eval", "text", "--gguf_path", str(models["other"]), *flags, "--reference", str(tmp_path / "ref"), "--cache_type", "f32"]) == 0
    out = capsys.readouterr().out
    assert "other (other.gguf), f32 cache" in out
    assert re.search(r"120 tokens in 8 windows\s+perplexity +\d+ ± \d+", out)
    assert re.search(r"KL divergence, 99 % +[\d.]+ ± [\d.]+ *\n", out)
    assert re.search(r"KL divergence, maximum +[\d.]+ *\n", out)
    assert re.search(r"same first token, % +[\d.]+ ± [\d.]+", out)


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (Estimate(1.0004321, 3.2e-6, 9), "1.0004321 ± 0.0000032"),
        (Estimate(19.8844, 0.31, 9), "19.88 ± 0.31"),
        (Estimate(3.1e-7, 2.2e-8, 9), "3.10e-07 ± 2e-08"),
        (Estimate(1.0, 0.0, 9), "1"),
    ],
)
def test_a_figure_shows_the_digits_that_its_error_lets_stand(estimate, shown, capsys) -> None:
    eval_tables.text({"tokens": 9, "windows": 3, "perplexity": estimate})
    assert re.search(rf"^ perplexity +{shown} *$", capsys.readouterr().out, re.MULTILINE)


def test_a_reference_of_another_vocabulary_is_refused(models, text, tmp_path, capsys) -> None:
    flags = ("--cpu_infer", 1, "--limit", 1, "--text", text, "--window", 32)
    run(capsys, "text", "--gguf_path", models["tiny"], *flags, "--save_reference", tmp_path / "ref")
    (tmp_path / "ref").write_bytes((tmp_path / "ref").read_bytes().replace(b'"vocab": 300', b'"vocab": 999', 1))
    assert "another vocabulary than the model's 300 tokens" in refused(capsys, "text", "--gguf_path", models["tiny"], *flags, "--reference", tmp_path / "ref")


def test_a_reference_that_ends_too_early_is_refused(models, text, tmp_path, capsys) -> None:
    flags = ("--gguf_path", models["tiny"], "--cpu_infer", 1, "--text", text, "--window", 32)
    run(capsys, "text", *flags, "--limit", 2, "--save_reference", tmp_path / "two")
    run(capsys, "text", *flags, "--limit", 3, "--save_reference", tmp_path / "three")
    setting = (tmp_path / "three").read_bytes().split(b"\n", 1)[0]
    (tmp_path / "three").write_bytes(setting + b"\n" + (tmp_path / "two").read_bytes().split(b"\n", 1)[1])
    assert "The reference ends after 2 of 3 windows: finish its run" in refused(capsys, "text", *flags, "--limit", 3, "--reference", tmp_path / "three")


def test_a_reference_that_is_asked_for_too_late_is_refused(models, text, tmp_path, capsys) -> None:
    flags = ("--gguf_path", models["tiny"], "--cpu_infer", 1, "--text", text, "--window", 32, "--out", tmp_path / "out")
    run(capsys, "text", *flags)
    assert "is not there, but 8 windows are done already" in refused(capsys, "text", *flags, "--save_reference", tmp_path / "ref")
    assert not (tmp_path / "ref").exists()


def test_mistakes_with_texts(models, text, tmp_path, capsys) -> None:
    tiny = ("--gguf_path", models["tiny"], "--cpu_infer", 1)
    run(capsys, "text", *tiny, "--text", text, "--window", 32, "--limit", 2, "--save_reference", tmp_path / "ref", "--out", tmp_path / "out")
    assert "--window cuts a text of your own" in refused(capsys, "text", *tiny, "--window", 32)
    assert "of fewer than 4 tokens nothing is left to score" in refused(capsys, "text", *tiny, "--text", text, "--window", 3)
    assert "--whole_chats is of the chats that ship" in refused(capsys, "text", *tiny, "--text", text, "--whole_chats")
    assert "The text has 270 tokens, less than one window of 512" in refused(capsys, "text", *tiny, "--text", text)
    assert "Cannot read --text" in refused(capsys, "text", *tiny, "--text", tmp_path / "nowhere")
    assert "not allowed with" in refused(capsys, "text", *tiny, "--reference", tmp_path / "ref", "--save_reference", tmp_path / "ref")
    assert "The reference is of other tokens" in refused(capsys, "text", *tiny, "--text", text, "--window", 16, "--reference", tmp_path / "ref")
    other = ("--gguf_path", models["other"], "--text", text, "--window", 32, "--limit", 2)
    assert "is the reference of another run" in refused(capsys, "text", *other, "--save_reference", tmp_path / "ref")
    assert "holds another run: its model is 'tiny', and this one's is 'other'" in refused(capsys, "text", *other, "--out", tmp_path / "out")
    text.write_text(TEXT * 10)
    assert "A window has 2100 tokens, more than the model's context of 2048" in refused(capsys, "text", *tiny, "--text", text, "--window", 2100)


# --- Questions ---------------------------------------------------------------


def test_questions_in_both_ways_and_an_interruption(models, tmp_path, capsys, monkeypatch) -> None:
    def flags(name: str) -> tuple[object, ...]:
        short = ("--each", 2, "--force_think", "both", "--max_new_tokens", 3)
        return ("--gguf_path", models["tiny"], *short, "--cpu_infer", 1, "--out", tmp_path / name)

    whole = run(capsys, "questions", *flags("whole"))
    forced, free = whole["result"]["force_think"], whole["result"]["no_force_think"]
    assert (forced["all"]["n"], free["all"]["n"], forced["cut"]) == (32, 32, 32)
    assert (whole["setting"]["each"], whole["setting"]["force_think"]) == (2, [True, False])
    run(capsys, "questions", *flags("cut"))
    cut(tmp_path / "cut", 50)
    asked: list[object] = []
    ask = accuracy.Examiner.ask
    monkeypatch.setattr(accuracy.Examiner, "ask", lambda self, each: asked.append(each) or ask(self, each))
    assert run(capsys, "questions", *flags("cut")) == whole
    assert len(asked) == 64 - 50
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert "its seed is 0, and this one's is 1" in refused(capsys, "questions", *flags("whole"), "--seed", 1)


def test_ctrl_c_says_how_the_run_goes_on(models, tmp_path, capsys, monkeypatch) -> None:
    asked: list[object] = []
    ask = accuracy.Examiner.ask

    def impatient(self: accuracy.Examiner, each: accuracy.Asked) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(each)
        return ask(self, each)

    monkeypatch.setattr(accuracy.Examiner, "ask", impatient)
    out = tmp_path / "run.jsonl"
    assert main(["eval", "questions", "--gguf_path", str(models["tiny"]), "--each", "1", "--max_new_tokens", "2", "--cpu_infer", "1", "--out", str(out)]) == 130
    assert f"3 of 16 are done and in {out}: the same command goes on from there." in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize(
    ("words", "modes"), [([], [False]), (["--force_think"], [True]), (["--force-think=false"], [False]), (["--force_think", "both"], [True, False])]
)
def test_every_spelling_of_the_ways_to_ask(words, modes, models, capsys, monkeypatch) -> None:
    monkeypatch.setattr("server.bench.accuracy.SKILLS", ("addition",))
    result = run(capsys, "questions", "--gguf_path", models["tiny"], "--each", 1, "--max_new_tokens", 1, "--cpu_infer", 1, *words)
    assert result["setting"]["force_think"] == modes


def test_the_ways_to_ask_of_a_file_and_a_flag_over_it(models, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("server.bench.accuracy.SKILLS", ("addition",))
    config = tmp_path / "server.yaml"
    config.write_text("api: {force_think: true}")
    flags = ("--config", config, "--gguf_path", models["tiny"], "--each", 1, "--max_new_tokens", 1, "--cpu_infer", 1)
    assert run(capsys, "questions", *flags)["setting"]["force_think"] == [True]
    assert run(capsys, "questions", *flags, "--no_force_think")["setting"]["force_think"] == [False]


# --- Comparison --------------------------------------------------------------


def test_two_runs_side_by_side(models, text, tmp_path, capsys) -> None:
    short = ("--each", 1, "--max_new_tokens", 1, "--cpu_infer", 1)
    for name, words in (("tiny", ()), ("fewer", ("--experts_per_token", 1))):
        run(capsys, "questions", "--gguf_path", models["tiny"], *short, "--out", tmp_path / f"{name}.q", *words)
        of_text = ("--text", text, "--window", 32, "--cpu_infer", 1, "--out", tmp_path / f"{name}.t")
        reference = ("--save_reference" if name == "tiny" else "--reference", tmp_path / "ref")
        run(capsys, "text", "--gguf_path", models["tiny"], *of_text, *reference, *words)
    texts = run(capsys, "compare", tmp_path / "tiny.t", tmp_path / "fewer.t")
    a, b = (texts[name]["result"]["perplexity"]["value"] for name in "ab")
    assert texts["difference"]["perplexity_ratio"]["value"] == pytest.approx(b / a)
    assert main(["eval", "compare", str(tmp_path / "tiny.t"), str(tmp_path / "fewer.t")]) == 0
    out = capsys.readouterr().out
    assert "B: tiny (tiny.gguf), f16 cache, 1 experts a token" in out
    assert re.search(r"perplexity +\d+ ± \d+ +\d+ ± \d+ +times [\d.]+ ± [\d.]+", out)
    assert main(["eval", "compare", str(tmp_path / "tiny.q"), str(tmp_path / "fewer.q")]) == 0
    assert re.search(r"all, not forced, % +0\.0.* +0\.0.* +\+0\.0.*\(0 won, 0 lost of 16\)", capsys.readouterr().out)
    assert "a run of `eval text`, the other one of `eval questions`" in refused(capsys, "compare", tmp_path / "tiny.t", tmp_path / "tiny.q")
    assert "is no result of `moespan eval`" in refused(capsys, "compare", tmp_path / "tiny.t", text)
    run(capsys, "text", "--gguf_path", models["tiny"], "--text", text, "--window", 16, "--out", tmp_path / "short.t")
    assert "over other tokens" in refused(capsys, "compare", tmp_path / "tiny.t", tmp_path / "short.t")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "required: TASK"),
        (["quesions"], "invalid choice: 'quesions'"),
        (["text", "--each", "3"], "`moespan eval text` has no flag --each."),
        (["questions", "--port", "3"], "It belongs to `moespan serve`."),
        (["questions", "--each", "2001"], "--each 2001 is more questions"),
        (["questions", "--force_think", "maybe"], "invalid choice: 'maybe'"),
        (["compare", "a"], "required: RESULT"),
        (["text", "--experts_per_token", "0"], "experts_per_token is 0"),
    ],
)
def test_a_wrong_command_line_meets_a_sentence(words, sentence, models, capsys) -> None:
    chosen = ["--gguf_path", str(models["tiny"])] if words[:1] in (["questions"], ["text"]) else []
    assert main(["eval", *words, *chosen]) == 2
    assert sentence in capsys.readouterr().err
