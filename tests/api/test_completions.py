"""The wire of /v1/completions."""

from __future__ import annotations

import pytest

from server.api.shapes.tokens import finite
from server.config import SchedulerConfig
from server.scheduler.worker import Sink
from server.types import GenerateRequest
from tests.api.live import MODEL, Live, live
from tests.fakes import FakeEngine

PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        ([97, 98], ["ab"]),
        (["abc"], ["abc"]),
        (["abc", "de", "🦙"], ["abc", "de", "🦙"]),
        ([[97], [98, 99]], ["a", "bc"]),
        (["a", [98]], ["a", "b"]),
    ],
)
def test_every_kind_of_prompt_streamed_or_not(server: Live, prompt: object, texts: list[str]) -> None:
    reply = server.post(PATH, {"prompt": prompt}).json()
    assert reply["id"].startswith("cmpl-")
    assert (reply["object"], reply["model"]) == ("text_completion", MODEL)
    assert reply["choices"] == [{"index": index, "text": text, "logprobs": None, "finish_reason": "stop"} for index, text in enumerate(texts)]
    size = sum(len(text.encode()) for text in texts)
    assert reply["usage"] == {
        "prompt_tokens": size,
        "completion_tokens": size + len(texts),
        "total_tokens": 2 * size + len(texts),
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    chunks = server.chunks(PATH, {"prompt": prompt, "stream_options": {"include_usage": True}})
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == reply["usage"]
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in range(len(texts))] == texts
    assert [choice["index"] for choice in choices if choice["finish_reason"] == "stop"] == list(range(len(texts)))
    assert "timings" in chunks[-1]


def test_stop_and_limit(server: Live) -> None:
    assert server.post(PATH, {"prompt": "one STOP two", "stop": "STOP"}).json()["choices"][0]["text"] == "one "
    choice = server.post(PATH, {"prompt": "one STOP two", "max_tokens": 2}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("on", "length")


def test_logprobs_have_the_shape_of_completions(server: Live) -> None:
    expected = {"tokens": ["a", "b"], "token_logprobs": [-0.5, -0.5], "top_logprobs": [{"a": -0.5, "b": -1.5}, {"b": -0.5, "c": -1.5}], "text_offset": [0, 1]}
    assert server.post(PATH, {"prompt": "ab", "logprobs": 2}).json()["choices"][0]["logprobs"] == expected
    chunks = server.chunks(PATH, {"prompt": "ab", "logprobs": 2})
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert {key: [each for part in streamed for each in part[key]] for key in expected} == expected
    assert server.post(PATH, {"prompt": "ab", "logprobs": 0}).json()["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5}, {"b": -0.5}]


def test_log_probabilities_stay_valid_json() -> None:
    assert (finite(-0.5), finite(float("-inf"))) == (-0.5, -9999.0)


def test_a_list_of_prompts_holds_one_place_in_the_queue(server: Live) -> None:
    prompts = [f"prompt {index}" for index in range(100)]  # more than --max_queue
    choices = server.post(PATH, {"prompt": prompts}).json()["choices"]
    assert [choice["text"] for choice in choices] == prompts


def test_once_accepted_a_list_of_prompts_is_answered_however_full_the_queue_gets() -> None:
    with live(FakeEngine(step_s=0.001), scheduler=SchedulerConfig(max_queue=0)) as server:
        submit = server.service.submit

        def crowded(request: GenerateRequest, sink: Sink, *, continues: bool = False) -> None:
            if server.engine.samplers:  # between two prompts another client was quicker
                submit(GenerateRequest(f"before {request.request_id}", (65,), 5), lambda event: None)
            submit(request, sink, continues=continues)

        server.service.submit = crowded  # type: ignore[method-assign]
        reply = server.post(PATH, {"prompt": ["a", "b", "c"]})
        assert [choice["text"] for choice in reply.json()["choices"]] == ["a", "b", "c"]


def test_one_prompt_that_cannot_fit_refuses_them_all_before_any_runs(server: Live) -> None:
    before = len(server.engine.steps)
    reply = server.post(PATH, {"prompt": ["short", "x" * 2000]})
    assert reply.status_code == 400
    assert (reply.json()["error"]["code"], reply.json()["error"]["param"]) == ("context_length_exceeded", "prompt")
    assert len(server.engine.steps) == before
