"""Several replies to one prompt, the forms that replies can be made to have, and what else ends or begins them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.live import ECHO, USER, Live
from tests.fakes import STOP_ID

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def test_n_replies_are_run_one_after_another_and_the_prompt_is_counted_once(server: Live) -> None:
    reply = server.chat(n=3).json()
    assert [(choice["index"], choice["message"]["content"], choice["finish_reason"]) for choice in reply["choices"]] == [(i, ECHO, "stop") for i in range(3)]
    assert reply["usage"] == {"prompt_tokens": 10, "completion_tokens": 33, "total_tokens": 43, "prompt_tokens_details": {"cached_tokens": 0}}


def test_n_replies_stream_with_their_index(server: Live) -> None:
    chunks = server.chunks(CHAT, {"messages": USER, "n": 2, "stream_options": {"include_usage": True}})
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert [choice["index"] for choice in choices if choice["delta"].get("role")] == [0, 1]
    for index in range(2):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == ECHO
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
    assert chunks[-1]["usage"]["prompt_tokens"] == 10
    assert chunks[-1]["usage"]["completion_tokens"] == 22


def test_openais_client_reads_n_replies(server: Live) -> None:
    reply = server.client().chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}], n=2)
    assert [choice.message.content for choice in reply.choices] == [ECHO, ECHO]


@pytest.mark.parametrize(("seed", "seeds"), [(7, [7, 8, 9]), (None, [None] * 3), (2**63 - 1, [2**63 - 1, -(2**63), -(2**63) + 1])])
def test_each_reply_has_a_seed_of_its_own(server: Live, seed: int | None, seeds: list[int | None]) -> None:
    server.chat(n=3, seed=seed)
    assert [sampler.params.seed for sampler in server.engine.samplers[-3:]] == seeds


def test_n_and_several_prompts(server: Live) -> None:
    reply = server.post(COMPLETIONS, {"prompt": ["one", "other"], "n": 2, "best_of": 2}).json()
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [(0, "one"), (1, "one"), (2, "other"), (3, "other")]
    assert reply["usage"]["prompt_tokens"] == len("one") + len("other")


def test_a_prompt_can_be_echoed(server: Live) -> None:
    body = {"prompt": "hello", "echo": True, "max_tokens": 2}
    assert server.post(COMPLETIONS, body).json()["choices"][0]["text"] == "hellohe"
    assert server.post(COMPLETIONS, {**body, "prompt": [104, 105]}).json()["choices"][0]["text"] == "hihi"
    assert "".join(chunk["choices"][0]["text"] for chunk in server.chunks(COMPLETIONS, body)) == "hellohe"


def test_an_echo_is_not_searched_for_stop_strings(server: Live) -> None:
    assert server.post(COMPLETIONS, {"prompt": "abc", "echo": True, "stop": "b"}).json()["choices"][0]["text"] == "abca"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"echo": True, "logprobs": 1}, "'echo' is not possible with 'logprobs', since those of a prompt are not computed. Leave one of them out."),
        ({"suffix": "x"}, "This model's vocabulary has no tokens for filling a gap in a text, so 'suffix' is not possible. Leave it out."),
        ({"best_of": 3, "n": 2}, "'best_of' is 3 and 'n' is 2; this server shows every reply that it draws. Leave 'best_of' out."),
    ],
)
def test_what_completions_cannot_do(server: Live, body: dict[str, Any], said: str) -> None:
    reply = server.post(COMPLETIONS, {"prompt": "hello", **body})
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, said)


def test_tokens_that_end_a_reply(server: Live) -> None:
    choice = server.chat(stop_token_ids=[ord("l")]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("u:he", "stop")


def test_end_of_text_can_be_ignored(server: Live) -> None:
    choice = server.chat(ignore_eos=True, max_tokens=20).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (ECHO, "length")
    choice = server.chat(ignore_eos=True, stop_token_ids=[STOP_ID], max_tokens=20).json()["choices"][0]
    assert choice["finish_reason"] == "stop"


CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("body", [{"guided_choice": ["yes"]}, {"tools": [CLOCK], "tool_choice": "required"}], ids=["form", "call"])
def test_the_end_of_a_form_cannot_be_ignored(server: Live, body: dict[str, Any]) -> None:
    reply = server.chat(ignore_eos=True, **body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "ignore_eos")


def test_nor_can_that_of_a_completions_form(server: Live) -> None:
    assert server.post(COMPLETIONS, {"prompt": "x", "guided_choice": ["yes"], "ignore_eos": True}).json()["error"]["param"] == "ignore_eos"


SCHEMA = {"type": "object", "properties": {"ok": {"enum": ["yes"]}}, "required": ["ok"], "additionalProperties": False}


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"grammar": 'start: "{\\"ok\\": \\"yes\\"}"'},
        {"grammar": 'root ::= "{\\"ok\\": \\"yes\\"}"'},
        {"guided_grammar": 'start: "{\\"ok\\": \\"yes\\"}"'},
        {"guided_regex": '\\{"ok": "yes"\\}'},
        {"guided_choice": ['{"ok": "yes"}']},
    ],
    ids=lambda body: " ".join(body),
)
def test_a_reply_has_the_form_that_was_asked_for(server: Live, body: dict[str, Any]) -> None:
    """The fake engine wishes to say `{"ok":` and something else."""
    for path, prompt in ((CHAT, {"messages": [{"role": "user", "content": "x"}]}), (COMPLETIONS, {"prompt": '{"ok": 5}'})):
        choice = server.post(path, {**prompt, **body, "max_tokens": 900}).json()["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert json.loads(text) == {"ok": "yes"}
        assert choice["finish_reason"] == "stop"


def test_any_json_object(server: Live) -> None:
    prompt = '{"a": [1, "b"]}'
    assert server.post(COMPLETIONS, {"prompt": prompt, "response_format": {"type": "json_object"}}).json()["choices"][0]["text"] == prompt
    assert server.post(COMPLETIONS, {"prompt": "no", "response_format": {"type": "json_object"}, "max_tokens": 1}).json()["choices"][0]["text"] == "{"
    assert server.chat(response_format={"type": "text"}).json()["choices"][0]["message"]["content"] == ECHO


def test_each_of_n_replies_has_the_form(server: Live) -> None:
    reply = server.post(COMPLETIONS, {"prompt": "no", "guided_choice": ["nine", "ten"], "n": 3}).json()
    assert [choice["text"] for choice in reply["choices"]] == ["nine"] * 3


def test_a_form_that_cannot_be_is_refused(server: Live) -> None:
    reply = server.chat(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "oops"}}})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "response_format"
