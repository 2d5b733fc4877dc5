"""What a client can do wrong, and the sentence that it gets."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.live import USER, Live, live

CHAT = "/v1/chat/completions"


def refused(reply: Any, status: int = 400) -> dict[str, Any]:
    """The error, after a check of its shape."""
    assert reply.status_code == status, reply.text
    assert list(reply.json()) == ["error"]
    error = reply.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"messages": [}', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"temperature": NaN}', "NaN is no number in JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud83e"}]}', "surrogates"),
        (b"[]", "must be a JSON object, not an array"),
        (b'"hello"', "must be a JSON object, not a string"),
        (b"null", "must be a JSON object, not null"),
    ],
)
def test_bodies_that_are_no_json_object(server: Live, raw: bytes, said: str) -> None:
    error = refused(server.request("POST", CHAT, content=raw, headers={"Content-Type": "application/json"}))
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def user(content: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "messages", "'messages' is missing."),
        ({"messages": None}, "messages", "'messages' must be an array, not null."),
        ({"messages": []}, "messages", "'messages' must not be empty."),
        ({"messages": "hello"}, "messages", "'messages' must be an array, not a string."),
        ({"messages": ["hello"]}, "messages[0]", "'messages[0]' must be an object, not a string."),
        ({"messages": [{"content": "hello"}]}, "messages[0].role", "'messages[0].role' is missing."),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "must be 'system', 'developer', 'user', 'assistant' or 'tool', not 'robot'."),
        ({"messages": [{"role": "x" * 10_000, "content": "x"}]}, "messages[0].role", "xxx...."),
        ({"messages": [{"role": "user"}]}, "messages[0]", "'messages[0]' has no content."),
        (user(None), "messages[0]", "'messages[0]' has no content."),
        (user(5), "messages[0].content", "must be a string or an array of text parts, not a number."),
        (user([]), "messages[0].content", "'messages[0].content' must not be an empty array."),
        (
            user([{"type": "image_url", "image_url": {"url": "data:"}}]),
            "messages[0].content",
            "has a part of type 'image_url'; this server reads parts of type 'text'",
        ),
        (user([{"type": "text"}]), "messages[0].content", "has a text part whose 'text' must be a string, not null."),
        (user(["hello"]), "messages[0].content", "has a part of type None"),
    ],
)
def test_bad_messages(server: Live, body: dict[str, object], param: str, said: str) -> None:
    error = refused(server.post(CHAT, body))
    assert said in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_tokens", 0, "'max_tokens' must be at least 1, not 0."),
        ("max_tokens", -5, "'max_tokens' must be at least 1, not -5."),
        ("max_completion_tokens", 0, "'max_completion_tokens' must be at least 1, not 0."),
        ("max_tokens", 1.5, "'max_tokens' must be an integer, not 1.5."),
        ("max_tokens", "10", "'max_tokens' must be an integer, not a string."),
        ("max_tokens", True, "'max_tokens' must be an integer, not a boolean."),
        ("temperature", -0.1, "'temperature' must be at least 0, not -0.1."),
        ("temperature", 2.1, "'temperature' must be at most 2, not 2.1."),
        ("temperature", "hot", "'temperature' must be a number, not a string."),
        ("top_p", 0, "'top_p' must be above 0, not 0."),
        ("top_p", 1.5, "'top_p' must be at most 1, not 1.5."),
        ("top_k", -2, "'top_k' must be at least -1, not -2."),
        ("min_p", 2, "'min_p' must be at most 1, not 2."),
        ("seed", 2**63, "'seed' must be below"),
        ("presence_penalty", 2.5, "'presence_penalty' must be at most 2, not 2.5."),
        ("frequency_penalty", -3, "'frequency_penalty' must be at least -2, not -3."),
        ("repetition_penalty", 0, "'repetition_penalty' must be above 0, not 0."),
        ("stop", "x" * 257, "'stop' holds a string of 257 characters; each must have 1 to 256."),
        ("stop", "", "'stop' holds a string of 0 characters"),
        ("stop", ["a", "b", "c", "d", "e"], "'stop' holds 5 strings; at most 4 are possible."),
        ("stop", [1], "'stop' must be a string or an array of strings."),
        ("stop", 7, "'stop' must be a string or an array of strings."),
        ("logit_bias", {"7": 101}, "'logit_bias.7' must be at most 100, not 101."),
        ("logit_bias", {"seven": 1}, "its keys are token ids"),
        ("logit_bias", {"257": 1}, "'logit_bias' has the token id 257, but this model's ids go from 0 to 256."),
        ("logit_bias", [], "'logit_bias' must be an object, not an array."),
        ("stream", "yes", "'stream' must be true or false, not a string."),
        ("stream_options", True, "'stream_options' must be an object, not a boolean."),
        ("logprobs", 3, "'logprobs' must be true or false, not 3."),
        ("top_logprobs", 3, "'top_logprobs' needs 'logprobs' to be true."),
        ("top_logprobs", 21, "'top_logprobs' must be at most 20, not 21."),
        ("model", 5, "'model' must be a string, not 5."),
        ("n", 129, "'n' must be at most 128, not 129."),
        ("n", 0, "'n' must be at least 1, not 0."),
        ("n", True, "'n' must be an integer, not a boolean."),
        ("best_of", 2, "'best_of' is 2 and 'n' is 1; this server shows every reply that it draws. Leave 'best_of' out."),
        ("repeat_penalty", 1.1, "'repeat_penalty' is supported only as 1"),
        ("functions", [{"name": "f"}], "'functions' is not supported by this server. Send 'tools' instead."),
        ("function_call", {"name": "f"}, "'function_call' is supported only as \"none\" or \"auto\" by this server. Send 'tool_choice' instead."),
        ("tools", {"name": "f"}, "'tools' must be an array, not an object."),
        ("tools", [{"type": "custom", "custom": {"name": "f"}}], "'tools[0].type' must be 'function', not 'custom'."),
        ("tools", [{"type": "function", "function": {"name": "a b"}}], "'tools[0].function.name' must be of 1 to 128 letters, digits"),
        ("tools", [{"type": "function", "function": {"name": "f"}}] * 2, "'tools' has two functions of the name 'f'. Give each its own name."),
        ("tool_choice", "required", "'tool_choice' is \"required\", but there are no 'tools' to choose from. Send some, or leave it out."),
        ("tool_choice", "any", '\'tool_choice\' must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}, not \'any\'.'),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}, "'tool_choice' names 'f', but no such function is among the 'tools'."),
        ("response_format", {"type": "xml"}, "'response_format.type' must be 'text', 'json_object' or 'json_schema', not 'xml'."),
        ("response_format", {"type": "json_schema"}, "'response_format' has the type json_schema, so it needs 'json_schema' with a 'schema' in it."),
        ("json_schema", "{", "'json_schema' is a text that is no JSON"),
        ("guided_json", 5, "'guided_json' must be a JSON schema, which is an object, not a number."),
        ("guided_choice", [], "'guided_choice' must not be empty."),
        ("reasoning_effort", "huge", "'reasoning_effort' must be 'none', 'minimal', 'low', 'medium', 'high' or 'xhigh', not 'huge'."),
        ("reasoning_effort", "high", "This model does not think before it answers, so a 'reasoning_effort' of 'high' is not possible. Leave it out."),
        ("chat_template_kwargs", {"messages": []}, "'chat_template_kwargs' has 'messages', which is not a switch of the template. Leave it out."),
        ("chat_template_kwargs", {"a": "x" * 20000}, "'chat_template_kwargs' has 20009 bytes; at most 16384 are possible."),
        ("stop_token_ids", [257], "'stop_token_ids' has the token id 257, but this model's ids go from 0 to 256."),
        ("audio", {"voice": "x"}, "'audio' is not supported by this server. Leave it out."),
    ],
)
def test_bad_fields(server: Live, field: str, value: object, said: str) -> None:
    error = refused(server.chat(**{field: value}))
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(field)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "'prompt' must be a string, an array of token ids, or an array of either, and not empty."),
        ([], "'prompt' must be a string, an array of token ids"),
        ([[]], "'prompt' must be a string, an array of token ids"),
        (["a", 5], "'prompt' must be a string, an array of token ids"),
        ({"text": "a"}, "'prompt' must be a string, an array of token ids"),
        ("", "'prompt' makes an empty prompt"),
        ([300], "'prompt' has the token id 300, but this model's ids go from 0 to 256."),
        ([-1], "'prompt' has the token id -1"),
    ],
)
def test_bad_prompts(server: Live, prompt: object, said: str) -> None:
    error = refused(server.post("/v1/completions", {"prompt": prompt}))
    assert said in error["message"]
    assert error["param"] == "prompt"


def test_completions_without_a_prompt(server: Live) -> None:
    assert refused(server.post("/v1/completions", {}))["message"] == "'prompt' is missing."


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_cannot_fit_gets_both_counts(server: Live, stream: bool) -> None:
    error = refused(server.post(CHAT, {**user("x" * 2000), "stream": stream}))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "2005 tokens" in error["message"]
    assert "1024 tokens" in error["message"]
    assert "--cache_lens" in error["message"]


def test_what_a_template_refuses_is_said_in_its_words() -> None:
    with live(template="{{ raise_exception('Roles must alternate.') }}") as server:
        error = refused(server.chat())
        assert (error["message"], error["param"]) == ("Roles must alternate.", "messages")


def test_a_chat_that_its_template_makes_nothing_of() -> None:
    with live(template="{# nothing #}") as server:
        assert "'messages' makes an empty prompt" in refused(server.chat())["message"]


def test_unknown_routes_and_wrong_methods(server: Live) -> None:
    error = refused(server.get("/v1/nothing"), 404)
    assert (error["code"], "no GET /v1/nothing here" in error["message"]) == ("unknown_url", True)
    reply = server.get(CHAT)
    assert "does not take GET. It takes POST." in refused(reply, 405)["message"]
    assert reply.headers["allow"] == "POST"
    assert "'other' here" in refused(server.get("/v1/models/other"), 404)["message"]


def test_the_content_type_does_not_matter(server: Live) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}]}'
    assert server.request("POST", CHAT, content=body, headers={"Content-Type": "application/x-www-form-urlencoded"}).status_code == 200


def test_a_bug_of_ours_is_a_500_that_tells_nothing_of_the_inside() -> None:
    def broken(request: object) -> None:
        raise RuntimeError("a secret")

    with live() as server:
        server.service.check = broken  # type: ignore[method-assign]
        error = refused(server.chat(), 500)
    assert error == {"message": "The server failed on this request; its log has the traceback.", "type": "server_error", "param": None, "code": None}


def test_bad_tokens(server: Live) -> None:
    assert refused(server.post("/tokenize", {}))["message"].startswith("The body needs either 'prompt' or 'messages'")
    assert "either 'prompt' or 'messages'" in refused(server.post("/tokenize", {"prompt": "x", "messages": USER}))["message"]
    assert "no token 300" in refused(server.post("/detokenize", {"tokens": [300]}))["message"]
    assert "'tokens[0]' must be an integer" in refused(server.post("/detokenize", {"tokens": ["a"]}))["message"]
