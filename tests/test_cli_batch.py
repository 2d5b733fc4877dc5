"""`moespan batch` as a person meets it: the server's answers, nothing lost or doubled however a run ends, and the sentence for each mistake."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from server.cli import batch_progress, main
from server.cli.batch_files import Output, read_input
from server.errors import DeviceError
from tests.api.live import USER, live, wait_for
from tests.batch_process import answers, asks, echoes, over, write
from tests.fakes import FakeEngine

ROOT = Path(__file__).parent.parent
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MODEL = ("--model_name", "fake-1b")


@pytest.fixture(autouse=True)
def _mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what `over` replaces."""
    monkeypatch.setattr("server.cli.batch.load_chat", None)


def run(*words: object) -> int:
    return main(["batch", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert run(*words) == 2
    return capsys.readouterr().err.splitlines()[-1]


def lasting(body: dict[str, Any]) -> dict[str, Any]:
    """A reply without what differs from one call to the next."""
    return {key: value for key, value in body.items() if key not in ("id", "created", "timings")}


# --- Answers -----------------------------------------------------------------

BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": USER}),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}),
    (CHAT, {"messages": USER, "stop": "ll", "model": "gpt-4o"}),
    (COMPLETION, {"prompt": "hello"}),
    (COMPLETION, {"prompt": ["one", "two", [104, 105]], "logprobs": 1}),
    (COMPLETION, {"prompt": "héllo ✓ \u2028", "max_tokens": 7}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": USER, "temperature": 3}),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 2000}]}),
    (COMPLETION, {"prompt": "x" * 2000}),
    (COMPLETION, {"prompt": "\ud800"}),
    (COMPLETION, {}),
]


def test_the_answers_are_those_of_the_server(tmp_path) -> None:
    over(FakeEngine())
    lines = [asks(str(i), url, **body) for i, (url, body) in enumerate(BODIES) if body.get("prompt") != "\ud800"]
    assert run(write(tmp_path / "in", lines), tmp_path / "out", *MODEL) == 0
    with live() as server:
        for line, answer in zip(lines, answers(tmp_path / "out"), strict=True):
            over_http = server.post(line["url"], line["body"])
            response = answer["response"]
            assert (answer["custom_id"], answer["error"]) == (line["custom_id"], None)
            assert response["status_code"] == over_http.status_code
            assert lasting(response["body"]) == lasting(over_http.json())
            assert response["request_id"] == response["body"].get("id", answer["id"])


def test_a_client_of_openai_reads_the_answers(tmp_path) -> None:
    over(FakeEngine())
    assert run(write(tmp_path / "in", [asks("a", CHAT, messages=USER)]), tmp_path / "out", *MODEL) == 0
    reply = openai.types.chat.ChatCompletion.model_validate(answers(tmp_path / "out")[0]["response"]["body"])
    assert reply.choices[0].message.content == "u:hello\na:"


WRONG = [
    ("nonsense\n", "invalid_json_line", None, "Line 2 is not valid JSON"),
    ('{"custom_id": "\\ud800"}\n', "invalid_json_line", None, "Line 2 is not valid JSON"),
    ("[1]\n", "invalid_json_line", None, "Line 2 must be a JSON object, not an array."),
    ('{"method": "POST"}\n', "missing_required_parameter", None, "Line 2 needs a 'custom_id'"),
    ('{"custom_id": 7}\n', "missing_required_parameter", None, "Line 2 needs a 'custom_id'"),
    (json.dumps({**asks("w"), "method": "GET"}) + "\n", "invalid_method", "w", "has the method 'GET'"),
    (json.dumps(asks("w", "/v1/embeddings")) + "\n", "invalid_url", "w", "a batch can ask /v1/chat/completions and /v1/completions."),
    (json.dumps({**asks("w"), "url": [1]}) + "\n", "invalid_url", "w", "has the url [1]"),
    (json.dumps({**asks("w"), "body": "hello"}) + "\n", "missing_required_parameter", "w", "needs a 'body', an object, not a string."),
]


@pytest.mark.parametrize(("wrong", "code", "custom_id", "message"), WRONG)
def test_a_wrong_line_costs_itself_alone(wrong, code, custom_id, message, tmp_path, capsys) -> None:
    over(FakeEngine())
    first, last = echoes(2)
    words = (write(tmp_path / "in", [first, wrong, last, "\n"]), tmp_path / "out")
    assert run(*words) == 0
    found = answers(tmp_path / "out")
    assert [answer["custom_id"] for answer in found] == ["line-0", custom_id, "line-1"]
    error = found[1]["error"]
    assert (found[1]["response"], error["code"], error["line"]) == (None, code, 2)
    assert message in error["message"]
    assert "2 answered, 1 refused, 0 failed" in capsys.readouterr().err
    assert run(*words) == 0  # which finds nothing to do
    assert answers(tmp_path / "out") == found


def test_a_stream_is_refused(tmp_path) -> None:
    over(FakeEngine())
    assert run(write(tmp_path / "in", [asks("a", prompt="x", stream=True)]), tmp_path / "out") == 0
    response = answers(tmp_path / "out")[0]["response"]
    assert (response["status_code"], response["body"]["error"]["param"]) == (400, "stream")


def test_standard_input_and_output(tmp_path, capsysbinary, monkeypatch) -> None:
    over(FakeEngine())
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\xef\xbb\xbf" + json.dumps(asks("ä", prompt="é")).encode() + b"\r\n")))
    assert run("-", "-") == 0
    answer = json.loads(capsysbinary.readouterr().out)
    assert (answer["custom_id"], answer["response"]["body"]["choices"][0]["text"]) == ("ä", "é")


# --- However a run ends ------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    """A batch's files once it is done."""
    over(FakeEngine())
    files = write(tmp_path / "in", [*echoes(2), "wrong\n"]), tmp_path / "out"
    assert run(*files, *MODEL) == 0
    return files


def test_cut_anywhere_it_goes_on(finished, monkeypatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)
    lines, out = read_input(finished[0]), finished[1]
    whole = out.read_bytes()
    for end in range(len(whole)):
        out.write_bytes(whole[:end])
        with closing(Output(out, lines, "fake-1b")) as output:
            assert len(output.done) == output.tally.lines == whole[:end].count(b"\n")
            assert out.read_bytes() == b"".join(whole[:end].splitlines(keepends=True)[: len(output.done)])
            for answer in map(json.loads, whole.splitlines()[len(output.done) :]):
                output.append(answer)
        assert out.read_bytes() == whole


def test_each_line_is_on_the_disk_before_the_next_is_begun(finished, monkeypatch) -> None:
    source, out = finished
    out.unlink()
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(out.stat().st_size))
    over(engine := FakeEngine())
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda *words: (synced.append(-len(engine.samplers)), step(*words))[1])
    assert run(source, out) == 0
    ends = list(itertools.accumulate(len(line) for line in out.read_bytes().splitlines(keepends=True)))
    order = [each for each, _ in itertools.groupby(synced)]
    assert order == [0, -1, ends[0], -2, ends[1], ends[2]]


def test_only_what_is_not_done_is_asked_again(finished, capsys) -> None:
    source, out = finished
    first, second, wrong = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(wrong + second)  # in any order
    over(engine := FakeEngine())
    assert run(source, out, *MODEL) == 0
    assert [bytes(sampler.prompt_ids) for sampler in engine.samplers] == [b"this is what line 0 says"]
    assert sorted(lasting_lines(out)) == sorted(lasting_lines_of(first + second + wrong))
    assert "2 of 3 lines are done already" in capsys.readouterr().err


def lasting_lines(out: Path) -> list[str]:
    return lasting_lines_of(out.read_bytes())


def lasting_lines_of(raw: bytes) -> list[str]:
    found = [json.loads(line) for line in raw.splitlines()]
    return [json.dumps([a["id"], a["error"], lasting(a["response"]["body"]) if a["response"] else None], sort_keys=True) for a in found]


def test_an_input_may_grow_and_be_spaced_otherwise(finished) -> None:
    source, out = finished
    over(engine := FakeEngine())
    lines = [json.dumps(line, indent=None, separators=(" ,", " :")) + "\r\n" for line in echoes(3)]
    write(source, [*lines[:2], "wrong\n", lines[2]])
    assert run(source, out, *MODEL) == 0
    assert [bytes(sampler.prompt_ids) for sampler in engine.samplers] == [b"this is what line 2 says"]


@pytest.mark.parametrize(
    ("signals", "grace_s", "written"),
    [((0.0,), 30, 2), ((0.0,), 0.2, 1), ((0.0, 0.4), 30, 1), ((0.0, 0.1), 30, 2)],  # seconds after the second line was begun
    ids=["it may finish", "its time is over", "a second signal", "the same signal twice"],
)
def test_a_signal(signals, grace_s, written, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("server.cli.batch.SAME_SIGNAL_S", 0.25)
    over(engine := FakeEngine(step_s=0.02))  # a line of 24 tokens takes about half a second
    source, out = write(tmp_path / "in", echoes(3)), tmp_path / "out"

    def send() -> None:
        wait_for(lambda: len(engine.samplers) == 2)
        begun = time.monotonic()
        for after in signals:
            time.sleep(max(begun + after - time.monotonic(), 0))
            os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    assert run(source, out, "--grace_s", grace_s) == 130
    sender.join()
    assert len(answers(out)) == written
    said = capsys.readouterr().err
    assert f"SIGTERM: no new line; the running one has {grace_s} s to finish." in said
    assert f"{3 - written} of 3 lines are still to be done: the same command goes on from there." in said
    assert engine.closed
    over(FakeEngine())
    assert run(source, out) == 0
    assert [answer["custom_id"] for answer in answers(out)] == ["line-0", "line-1", "line-2"]


def test_a_request_that_the_engine_fails_on_costs_itself_alone(tmp_path, capsys) -> None:
    over(FakeEngine(fail_at=0))
    assert run(write(tmp_path / "in", echoes(2)), tmp_path / "out") == 0
    assert [answer["response"]["status_code"] for answer in answers(tmp_path / "out")] == [500, 200]
    said = capsys.readouterr().err
    assert "1 answered, 0 refused, 1 failed" in said
    assert "Remove the lines of those that failed, and the same command asks them again." in said


def test_an_engine_that_is_dead_ends_the_run(tmp_path, capsys, monkeypatch) -> None:
    over(engine := FakeEngine())
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda *words: 1 / 0 if len(engine.samplers) > 1 else step(*words))
    assert run(write(tmp_path / "in", echoes(3)), tmp_path / "out") == 1
    assert len(answers(tmp_path / "out")) == 1  # the failure says nothing of the second line, which stays to be done
    assert "The engine has not worked since line 2" in capsys.readouterr().err


def test_a_full_disk_ends_the_run(finished, monkeypatch) -> None:
    lines, out = read_input(finished[0]), finished[1]
    answer = answers(out)[0]
    out.unlink()
    with closing(Output(out, lines, "fake-1b")) as output:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, output._file.fileno())
        os.close(full)
        with pytest.raises(DeviceError, match=r"out cannot be written: No space left on device\. Once that is mended, the same command goes on"):
            output.append(answer)


# --- Mistakes ----------------------------------------------------------------


def test_what_is_doubled_is_refused(tmp_path, capsys) -> None:
    over(FakeEngine())
    lines = [asks(name, prompt="x") for name in ("a", "b", "a", "c", "b", "a")]
    said = refused(capsys, write(tmp_path / "in", lines), tmp_path / "out")
    assert "each custom_id must be there once, but 'a' is on lines 1, 3, 6; 'b' is on lines 2, 5. Make them different." in said
    assert not (tmp_path / "out").exists()


def test_another_batch_is_refused(finished, tmp_path, capsys) -> None:
    source, out = finished
    kept = out.read_bytes()
    changed = write(tmp_path / "changed", [asks("line-0", prompt="something else"), echoes(2)[1], "wrong\n"])
    assert "the input asks something else of 'line-0' now, which is answered on its line 1" in refused(capsys, changed, out, *MODEL)
    other = write(tmp_path / "other", [asks("mine", prompt="x")])
    assert "the input does not ask 'line-0', which is answered on its line 1" in refused(capsys, other, out, *MODEL)
    assert "has answers of 'fake-1b', and this run's model is 'tiny-r1'" in refused(capsys, source, out)
    out.write_bytes(kept + kept.splitlines(keepends=True)[0])
    assert "has the answer to 'line-0' twice, again on line 4" in refused(capsys, source, out, *MODEL)
    assert out.read_bytes() == kept + kept.splitlines(keepends=True)[0]


@pytest.mark.parametrize(
    "foreign", [b"notes\n", b"notes", b"{}\n", b"[]\n", b'{"id": "batch_req_1", "custom_id": "a"}\n', b"\xff\n", json.dumps(asks("a")).encode()]
)
def test_a_file_of_something_else_is_left_alone(foreign, finished, capsys) -> None:
    source, out = finished
    out.write_bytes(foreign)
    assert "has something else than an answer of `moespan batch` on line 1" in refused(capsys, source, out)
    assert out.read_bytes() == foreign
    source.write_bytes(foreign)
    if b"custom_id" in foreign:
        assert "has something else" in refused(capsys, source, source)
        assert source.read_bytes() == foreign


def test_other_mistakes_with_files(finished, tmp_path, capsys) -> None:
    source, out = finished
    assert "Cannot read" in refused(capsys, tmp_path / "nowhere", out)
    assert "is empty. Write requests into it" in refused(capsys, write(tmp_path / "empty", ["\n"]), out)
    assert "Cannot write" in refused(capsys, source, tmp_path / "nowhere" / "out")
    assert "is no plain file" in refused(capsys, source, tmp_path)
    assert "is no plain file" in refused(capsys, source, os.devnull)
    with closing(Output(out, read_input(source), "fake-1b")):
        assert "Another `moespan batch` is writing" in refused(capsys, source, out)
    assert "required: IN.jsonl, OUT.jsonl" in refused(capsys)
    assert "has no flag --port. It belongs to `moespan serve`." in refused(capsys, source, out, "--port", 3)


# --- Progress ----------------------------------------------------------------


def test_a_log_hears_of_the_progress_now_and_then(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(batch_progress, "LOG_S", 0.05)
    over(FakeEngine(step_s=0.01))
    assert run(write(tmp_path / "in", ["wrong\n", *echoes(3)]), tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert re.search(r"INFO +server.cli.batch_progress: [1-3] of 4 lines, 1 refused, \d+\.\d tok/s, 0:00:0\d left\.", said)
    assert re.search(r"out: 3 answered, 1 refused, 0 failed; 72 prompt tokens, 75 tokens of replies; this run took 0:00:0\d at \d+\.\d tok/s\.", said)
