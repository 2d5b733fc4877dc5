"""A batch's two files: the input, checked as a whole before anything runs, and the output, which is also the record of what is done.

An answer is one line, appended and synced to the disk before the next one is begun. Whenever the process is killed, the output then holds whole lines
and at most a piece of one, which is cut off when the run goes on. What is done are the ids in the output (server.api.batch); a file that holds
others is of another batch, and is left alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from server.api.batch import Line, read_line, status
from server.api.problems import Json
from server.errors import ConfigError, DeviceError

STANDARD = Path("-")  # standard input or output
MOST_NAMED = 3  # of what is wrong in many places
BEGINNING = b'{"id": "batch_req_'  # of every answer


# --- The input ---------------------------------------------------------------


def read_input(path: Path) -> list[Line]:
    """Every line that is not blank. ConfigError when the file cannot be read, is empty, or asks twice under one custom_id."""
    try:
        whole = sys.stdin.buffer.read() if path == STANDARD else path.read_bytes()
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}. Give a file of requests in OpenAI's batch format, one JSON object a line.") from None
    lines = [read_line(number, raw) for number, raw in enumerate(whole.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1) if raw.strip()]
    if not lines:
        raise ConfigError(f"{path} is empty. Write requests into it, one JSON object a line.")
    _refuse_doubles(path, lines)
    return lines


def _refuse_doubles(path: Path, lines: Sequence[Line]) -> None:
    numbers: dict[str, list[int]] = {}
    for line in lines:
        if line.custom_id is not None:
            numbers.setdefault(line.custom_id, []).append(line.number)
    doubles = [f"{custom_id!r} is on lines {', '.join(map(str, where))}" for custom_id, where in numbers.items() if len(where) > 1]
    if doubles:
        more = f", and {len(doubles) - MOST_NAMED} more are doubled" if len(doubles) > MOST_NAMED else ""
        raise ConfigError(f"{path}: each custom_id must be there once, but {'; '.join(doubles[:MOST_NAMED])}{more}. Make them different.")


# --- The output --------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What came of the lines so far."""

    answered: int = 0
    refused: int = 0  # the request is wrong, or the line is none
    failed: int = 0  # our own fault
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def lines(self) -> int:
        """All of them."""
        return self.answered + self.refused + self.failed

    def add(self, answer: Json) -> None:
        """One more line of the output."""
        match status(answer):
            case 200:
                usage = answer["response"]["body"]["usage"]
                self.answered += 1
                self.prompt_tokens += usage["prompt_tokens"]
                self.completion_tokens += usage["completion_tokens"]
            case int(code) if code >= 500:
                self.failed += 1
            case _:
                self.refused += 1


class Output:
    """Where the answers go. `done` has the ids of those that were there already. Close it."""

    def __init__(self, path: Path, lines: Sequence[Line], model: str) -> None:
        """Goes on with the file where there is one. ConfigError when it is of another batch or model, cannot be written, or is being written."""
        self.path = path
        self.done: set[str] = set()
        self.tally = Tally()
        self._file = sys.stdout.buffer if path == STANDARD else _open(path)
        if path != STANDARD:
            try:
                self._go_on(lines, model)
            except BaseException:
                self.close()
                raise

    def _go_on(self, lines: Sequence[Line], model: str) -> None:
        asked = {line.id: line.custom_id for line in lines}
        whole = 0  # bytes
        for number, raw in enumerate(_lines(self.path), 1):
            if not raw.endswith(b"\n"):
                _check_torn(self.path, number, raw)
                break
            whole += len(raw)
            answer = _read_answer(self.path, number, raw)
            _check_same(self.path, number, answer, asked, model)
            if answer["id"] in self.done:
                raise ConfigError(f"{self.path} has the answer to {answer['custom_id']!r} twice, again on line {number}. Remove one of the two lines.")
            self.done.add(answer["id"])
            self.tally.add(answer)
        self._file.truncate(whole)

    def append(self, answer: Json) -> None:
        """Keep an answer; it is on the disk when this returns. Raises DeviceError."""
        try:
            self._write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
            if self.path != STANDARD:
                os.fsync(self._file.fileno())
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DeviceError(f"{self.path} cannot be written: {error.strerror}. Once that is mended, the same command goes on from there.") from None
        self.done.add(answer["id"])
        self.tally.add(answer)

    def _write(self, raw: bytes) -> None:
        """All of it, though the file, which has no buffer, may take it in pieces."""
        while raw:
            raw = raw[self._file.write(raw) :]
        self._file.flush()

    def close(self) -> None:
        """No more answers, and the file is free for others."""
        if self.path != STANDARD:
            self._file.close()


def _open(path: Path) -> IO[bytes]:
    """For appending, and by us alone. A new file's name is on the disk when this returns."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no plain file, so it cannot keep what is done. Name a file, or - for the standard output.")
    try:
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror}. Choose another place for the answers.") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigError(f"Another `moespan batch` is writing {path}. Wait until it is done, or choose another output.") from None
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    return file


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _check_torn(path: Path, number: int, piece: bytes) -> None:
    """A line that does not end is a piece of an answer, or else it is not for us to cut off."""
    if piece[: len(BEGINNING)] != BEGINNING[: len(piece)]:
        raise _foreign(path, number)


def _read_answer(path: Path, number: int, raw: bytes) -> Json:
    try:
        answer = json.loads(raw)
        Tally().add(answer)  # whatever it reads is there
        if {"id", "custom_id"} <= answer.keys():
            return dict(answer)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise _foreign(path, number)


def _foreign(path: Path, number: int) -> ConfigError:
    said = f"{path} has something else than an answer of `moespan batch` on line {number}."
    return ConfigError(f"{said} Name another file for the output, or remove that line.")


def _check_same(path: Path, number: int, answer: Json, asked: dict[str, str | None], model: str) -> None:
    """An answer from another run must not be taken for one of this."""
    name = answer["custom_id"]
    if answer["id"] not in asked:
        said = f"asks something else of {name!r} now" if name is not None and name in asked.values() else f"does not ask {name!r}"
        raise ConfigError(f"{path} is of another batch: the input {said}, which is answered on its line {number}. Name another file for the output.")
    theirs = answer["response"]["body"].get("model", model) if status(answer) == 200 else model
    if theirs != model:
        raise ConfigError(f"{path} has answers of {theirs!r}, and this run's model is {model!r}. Give the same model, or another output.")
