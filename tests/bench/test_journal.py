"""A run's file: what was interrupted goes on, what is of another run is refused, and half a line is no record."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from server.bench.journal import Journal, read
from server.errors import ConfigError

SETTING = {"task": "text", "model": "a", "window": 4}


def test_records_are_there_again(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    with closing(Journal(out, SETTING)) as journal:
        journal.append({"n": 1})
        assert read(out).records == [{"n": 1}]  # already, while the run goes on
    with closing(Journal(out, SETTING)) as journal:
        assert journal.records == [{"n": 1}]
        journal.append({"n": 2, "text": "数"})
    assert (read(out).setting, read(out).records) == (SETTING, [{"n": 1}, {"n": 2, "text": "数"}])


def test_half_a_line_is_written_again(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    with closing(Journal(out, SETTING)) as journal:
        for n in range(3):
            journal.append({"n": n})
    whole = out.read_bytes()
    out.write_bytes(whole[:-3])
    with closing(Journal(out, SETTING)) as journal:
        assert [record["n"] for record in journal.records] == [0, 1]
        journal.append({"n": 2})
    assert out.read_bytes() == whole


def test_without_a_file_records_are_kept_all_the_same() -> None:
    with closing(Journal(None, SETTING)) as journal:
        journal.append({"n": 1})
        assert journal.records == [{"n": 1}]


def test_another_setting_is_refused_by_the_key_that_differs(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    Journal(out, SETTING).close()
    with pytest.raises(ConfigError, match=r"holds another run: its window is 4, and this one's is 8\. Give --out another file"):
        Journal(out, {**SETTING, "window": 8})
    with pytest.raises(ConfigError, match="its extra is None"):
        Journal(out, {**SETTING, "extra": 1})
    assert read(out).setting == SETTING


@pytest.mark.parametrize("content", ["hello\n", '{"a": 1}\n', "[1]\n", "x", '{"task": "text"}\n{"cut\n'])
def test_what_is_no_result_is_not_overwritten(content: str, tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text(content)
    with pytest.raises(ConfigError, match="is no result of `moespan eval`"):
        Journal(out, SETTING)
    assert out.read_text() == content


def test_places_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot write --out .*No such file or directory"):
        Journal(tmp_path / "nowhere" / "run.jsonl", SETTING)
    with pytest.raises(ConfigError, match=r"Cannot read .*No such file"):
        read(tmp_path / "nothing.jsonl")
