"""`moespan eval`: how good a model's answers are, under any settings. `questions` asks and checks, `text` measures perplexity and KL divergence,
`compare` puts two results beside each other.

With --out a run is kept in a file as it goes, and the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from server.bench import accuracy, divergence
from server.bench.journal import Journal, Json, read
from server.bench.reference import ReferenceReader, ReferenceWriter, Said
from server.bench.windows import WINDOW, Window, chat_windows, digest, text_windows
from server.cli import eval_tables
from server.cli.flags import config_of
from server.cli.load import load_chat, load_engine, model_file, model_id
from server.cli.machine import version
from server.config import Config
from server.errors import ConfigError
from server.metrics import Metrics

if TYPE_CHECKING:
    from server.engine.engine import LocalEngine
    from server.engine.gguf.reader import GGUFFile

_SAMPLE = 1 << 20  # bytes of a file's beginning and end by which it is known
_MODES = {"true": (True,), "false": (False,), "both": (True, False)}


def run(arguments: Namespace) -> int:
    """Measure and print; 0."""
    match arguments.task:
        case "questions":
            _questions(arguments)
        case "text":
            _text(arguments)
        case _:
            _compare(arguments)
    return 0


# --- Questions ---------------------------------------------------------------


def _questions(arguments: Namespace) -> None:
    config = config_of(arguments)
    file = model_file(config.model)
    modes = _MODES[arguments.thinking or str(config.api.force_think).lower()]
    planned = accuracy.plan(arguments.each, modes, arguments.seed)
    own = {"each": arguments.each, "seed": arguments.seed, "force_think": list(modes), "max_new_tokens": config.scheduler.max_new_tokens}
    setting = {"task": "questions", **_identity(config, file), "cache_lens": config.engine.cache_lens, **own}
    with closing(Journal(arguments.out, setting)) as journal:
        if len(journal.records) < len(planned):
            _ask(planned[len(journal.records) :], config, file, journal, arguments)
    _show(setting, accuracy.summary(journal.records), eval_tables.questions, arguments)


def _ask(asked: Sequence[accuracy.Asked], config: Config, file: GGUFFile, journal: Journal, arguments: Namespace) -> None:
    if not arguments.verbose:
        logging.getLogger("server.scheduler").setLevel(logging.WARNING)  # which would log every question
    loaded = load_chat(config, file, Metrics())
    try:
        examiner = accuracy.Examiner(loaded, config.scheduler.max_new_tokens)
        with _progress(journal, len(asked), accuracy.progress_line, arguments.out) as advance:
            for each in asked:
                journal.append(examiner.ask(each))
                advance()
    finally:
        loaded.service.close()


# --- Text --------------------------------------------------------------------


def _text(arguments: Namespace) -> None:
    config = config_of(arguments)
    file = model_file(config.model)
    windows = _windows(arguments, config, file)
    longest = max(len(window.ids) for window in windows)
    _check_fits(file, longest)
    config = replace(config, engine=replace(config.engine, cache_lens=longest))
    setting = {"task": "text", **_identity(config, file), "text": digest(windows), "windows": len(windows)}
    with _reader(arguments.reference, setting) as reader, closing(Journal(arguments.out, setting)) as journal:
        _check_saved(arguments.save_reference, len(journal.records))
        if len(journal.records) < len(windows):
            _score(windows, config, file, journal, reader, arguments)
    _show(setting, divergence.summary(journal.records), eval_tables.text, arguments)


def _windows(arguments: Namespace, config: Config, file: GGUFFile) -> list[Window]:
    """The text's windows, or the chats that ship; of them the first --limit."""
    from server.text.load import load_template, load_tokenizer

    tokenizer = load_tokenizer(file.metadata, config.model.model_path)
    if arguments.text is None:
        if arguments.window is not None:
            raise ConfigError("--window cuts a text of your own: give it with --text FILE. Of the chats that ship, each is a window.")
        template = load_template(file.metadata, tokenizer, config.model.model_path)
        return chat_windows(tokenizer, template, arguments.limit, whole=arguments.whole_chats)
    if arguments.whole_chats:
        raise ConfigError("--whole_chats is of the chats that ship: give it without --text.")
    size = WINDOW if arguments.window is None else arguments.window
    if size < 4:
        raise ConfigError(f"--window is {size}, but of fewer than 4 tokens nothing is left to score. The default is {WINDOW}.")
    return text_windows(_read(arguments.text), tokenizer, size)[: arguments.limit]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read --text {path}: {getattr(error, 'strerror', None) or error}. Give a text file in UTF-8.") from None


def _check_fits(file: GGUFFile, longest: int) -> None:
    context = file.metadata.get(f"{file.architecture}.context_length")
    if isinstance(context, int) and longest > context:
        raise ConfigError(f"A window has {longest} tokens, more than the model's context of {context}. Give a --text of your own with a smaller --window.")


@contextmanager
def _reader(path: Path | None, setting: Json) -> Iterator[ReferenceReader | None]:
    """What the run is compared with, which becomes part of its setting."""
    if path is None:
        yield None
        return
    with closing(ReferenceReader(path)) as reader:
        if reader.setting["text"] != setting["text"]:
            raise ConfigError("The reference is of other tokens: give what it was made with (--text, --window, --whole_chats, --limit, the same tokenizer).")
        setting["reference"] = reader.setting
        yield reader


def _check_saved(path: Path | None, done: int) -> None:
    if path is not None and done and not path.exists():
        raise ConfigError(f"{path} is not there, but {done} windows are done already, and what the model said of them is lost. Start again with another --out.")


def _score(windows: Sequence[Window], config: Config, file: GGUFFile, journal: Journal, reader: ReferenceReader | None, arguments: Namespace) -> None:
    done = len(journal.records)
    engine = load_engine(config, file).engine
    try:
        if reader and reader.setting.get("vocab") != engine.vocab_size:
            raise ConfigError(f"The reference has another vocabulary than the model's {engine.vocab_size} tokens: compare models of the same vocabulary.")
        engine.start()  # this thread is one of the pool's
        with (
            _keeper(arguments.save_reference, windows, config, file, engine, done) as keep,
            _progress(journal, len(windows) - done, divergence.progress_line, arguments.out) as advance,
        ):
            said = islice(reader, done, None) if reader else None
            for window in windows[done:]:
                journal.append(divergence.score(engine, window, _next(said, len(journal.records), len(windows)), keep))
                advance()
    finally:
        engine.close()


def _next(said: Iterator[Said] | None, done: int, windows: int) -> Said | None:
    """What the reference said of the next window."""
    if said is None:
        return None
    found = next(said, None)
    if found is None:
        raise ConfigError(f"The reference ends after {done} of {windows} windows: finish its run with the same command first.")
    return found


@contextmanager
def _keeper(
    path: Path | None, windows: Sequence[Window], config: Config, file: GGUFFile, engine: LocalEngine, done: int
) -> Iterator[Callable[[Said], None] | None]:
    """Where a reference run's distributions go."""
    if path is None:
        yield None
        return
    setting = {"text": digest(windows), "vocab": engine.vocab_size, **_identity(config, file)}
    with closing(ReferenceWriter(path, setting, done)) as writer:
        yield writer.append


# --- Comparison --------------------------------------------------------------


def _compare(arguments: Namespace) -> None:
    a, b = (read(path) for path in arguments.results)
    task = a.setting["task"]
    if b.setting["task"] != task:
        raise ConfigError(f"{arguments.results[0]} is a run of `eval {task}`, the other one of `eval {b.setting['task']}`: compare runs of the same.")
    if not a.records or not b.records:
        raise ConfigError("A run that has not begun cannot be compared: run its command first.")
    if task == "text" and a.setting["text"] != b.setting["text"]:
        raise ConfigError("The two runs are over other tokens: compare runs of the same --text and --window, on models with the same tokenizer.")
    module = accuracy if task == "questions" else divergence
    results = [module.summary(run.records) for run in (a, b)]
    changed = module.difference(a.records, b.records)
    if arguments.json:
        print(_as_json({"a": {"setting": a.setting, "result": results[0]}, "b": {"setting": b.setting, "result": results[1]}, "difference": changed}))
        return
    for name, found in zip("AB", (a, b), strict=True):
        print(f"{name}: {eval_tables.headline(found.setting)}")
    eval_tables.compared(task, results[0], results[1], changed)


# --- What all share ----------------------------------------------------------


def _identity(config: Config, file: GGUFFile) -> Json:
    """What decides a model's answers. Threads, and instruction sets of one precision, only touch the last bits."""
    from server.engine.gpu.devices import find_gpu
    from server.engine.kv_cache import resolve_cache_type
    from server.engine.native import prefill_precision

    on_gpu = find_gpu(config.engine.device) is not None
    return {
        "version": version(),
        "model": model_id(config.model, file),
        "file": file.path.name,
        "nbytes": file.nbytes,
        "digest": _digest(file.paths),
        "model_path": str(config.model.model_path) if config.model.model_path else None,
        "device": "gpu" if on_gpu else "cpu",
        "cache_type": resolve_cache_type(config.engine.cache_type, on_gpu),
        "experts_per_token": config.engine.experts_per_token,
        "prefill_precision": prefill_precision(config.engine.prefill_precision),
    }


def _digest(paths: Sequence[Path]) -> str:
    """A file by its beginning and its end: to read all of a large one would take longer than many a run."""
    hashed = hashlib.blake2b(digest_size=8)
    for path in paths:
        with path.open("rb") as file:
            hashed.update(file.read(_SAMPLE))
            file.seek(max(path.stat().st_size - _SAMPLE, 0))
            hashed.update(file.read())
    return hashed.hexdigest()


def _show(setting: Json, result: Json, table: Callable[[Json], None], arguments: Namespace) -> None:
    if arguments.json:
        print(_as_json({"setting": setting, "result": result}))
        return
    print(eval_tables.headline(setting))
    table(result)


def _as_json(tree: Json) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False, default=asdict)  # asdict: estimates


@contextmanager
def _progress(journal: Journal, left: int, line: Callable[[Sequence[Json]], str], out: Path | None) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, with the figure so far; an interrupted run says how it goes on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done = len(journal.records)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("", total=done + left, completed=done)
            yield lambda: bar.update(task, advance=1, description=line(journal.records))
    except KeyboardInterrupt:
        if out is not None:
            print(f"\n{len(journal.records)} of {done + left} are done and in {out}: the same command goes on from there.", file=sys.stderr)
        raise
