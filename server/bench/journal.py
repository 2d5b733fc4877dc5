"""The record of a run, from which an interrupted one goes on: JSON lines, the setting first and then one record for each piece of work that is done.

Everything that a result shows is computed from the records, so a run that was interrupted ends like one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from server.errors import ConfigError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A file as it was read."""

    setting: Json
    records: list[Json]
    nbytes: int  # up to the last whole line: an interrupted write may have left half of one behind it


class Journal:
    """The records so far, and a place for more. Without a file they are only kept here."""

    def __init__(self, path: Path | None, setting: Mapping[str, Any]) -> None:
        """Goes on with the file where there is one. Raises ConfigError when that is of another setting, or none of ours."""
        self.records: list[Json] = []
        self._file: IO[str] | None = None
        if path is None:
            return
        found = read(path) if path.exists() and path.stat().st_size else None
        if found is not None:
            _check_same(path, found.setting, setting)
            self.records = found.records
        self._file = _open(path, found)
        if found is None:
            self._write(dict(setting))

    def append(self, record: Json) -> None:
        """Keep a record; it is in the file when this returns."""
        self.records.append(record)
        self._write(record)

    def _write(self, line: Json) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """No more records; a second call does nothing."""
        if self._file is not None:
            self._file.close()


def read(path: Path) -> Recorded:
    """A run's file. Raises ConfigError where it cannot be read or is none."""
    try:
        whole = path.read_bytes().rpartition(b"\n")[0]
        setting, *records = [json.loads(line) for line in whole.splitlines()]
        if not isinstance(setting, dict) or "task" not in setting:
            raise ValueError
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}. Give a file that `moespan eval` wrote with --out.") from None
    except ValueError:
        raise ConfigError(f"{path} is no result of `moespan eval`. Give a file that it wrote with --out.") from None
    return Recorded(setting, records, len(whole) + 1)


def _open(path: Path, found: Recorded | None) -> IO[str]:
    try:
        file = path.open("a", encoding="utf-8")
        file.truncate(found.nbytes if found else 0)
    except OSError as error:
        raise ConfigError(f"Cannot write --out {path}: {error.strerror}. Choose another place.") from None
    return file


def _check_same(path: Path, theirs: Json, ours: Mapping[str, Any]) -> None:
    differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{path} holds another run: its {key} is {theirs.get(key)!r}, and this one's is {ours.get(key)!r}. "
            "Give --out another file, or the same settings to go on with that run."
        )
