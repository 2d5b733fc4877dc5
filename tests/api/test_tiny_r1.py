"""The default model over HTTP: what a newcomer gets from `moespan serve` with no model named, with and without --force_think."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.bench.questions import SKILLS, Question, questions
from server.cli.embedded import EMBEDDED
from tests.api.command import moespan_serve

QUESTIONS = [question for skill in SKILLS for language in ("en", "zh") for question in questions("test", skill, language, 1, seed=3)]
HURRIED = next(question for question in questions("test", "multiplication", "en", 50, seed=0) if question.terse)  # what it likes to guess


@pytest.fixture(scope="module")
def free() -> Iterator[openai.OpenAI]:
    with moespan_serve() as client:
        yield client


@pytest.fixture(scope="module")
def forced() -> Iterator[openai.OpenAI]:
    with moespan_serve("--force_think") as client:
        yield client


def said(client: openai.OpenAI, prompt: str, **options: Any) -> tuple[str, str]:
    """The thinking and the answer of a greedy reply."""
    messages: list[Any] = [{"role": "user", "content": prompt}]
    message = client.chat.completions.create(**{"model": "tiny-r1", "messages": messages, "temperature": 0, **options}).choices[0].message
    return str(getattr(message, "reasoning_content", None) or ""), str(message.content)


def streamed(client: openai.OpenAI, prompt: str) -> tuple[str, str]:
    """The same, as a stream brings it."""
    messages: list[Any] = [{"role": "user", "content": prompt}]
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(model="tiny-r1", messages=messages, temperature=0, stream=True)]
    return "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas), "".join(delta.content or "" for delta in deltas)


def test_it_is_the_default(free: openai.OpenAI) -> None:
    assert [model.id for model in free.models.list()] == ["tiny-r1"]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: f"{question.skill}-{question.language}")
def test_with_forced_thinking_it_thinks_and_answers(forced: openai.OpenAI, question: Question) -> None:
    thinking, answer = said(forced, question.prompt)
    assert question.accepts(answer)
    assert thinking
    assert "think>" not in thinking + answer
    assert streamed(forced, question.prompt) == (thinking, answer)


def test_left_free_it_thinks_before_it_answers(free: openai.OpenAI) -> None:
    question = next(question for question in QUESTIONS if not question.terse)
    thinking, answer = said(free, question.prompt)
    assert thinking
    assert question.accepts(answer)
    assert "think>" not in thinking + answer


def test_in_a_hurry_it_thinks_only_when_forced(free: openai.OpenAI, forced: openai.OpenAI) -> None:
    """An empty <think> is no thinking, and nothing of it shows."""
    thinking, answer = said(free, HURRIED.prompt)
    assert (thinking.strip(), answer[:1].isspace()) == ("", False)
    thinking, answer = said(forced, HURRIED.prompt)
    assert thinking
    assert HURRIED.accepts(answer)


def test_the_welcome_asks_what_it_can_answer(free: openai.OpenAI) -> None:
    thinking, answer = said(free, EMBEDDED["tiny-r1"].question)
    assert thinking
    assert answer == "The answer is 3."


def test_it_says_who_it_is_and_what_it_cannot(free: openai.OpenAI) -> None:
    assert "Tiny R1" in said(free, "Who are you?")[1]
    assert "cannot" in said(free, "What is the capital of France?")[1]
    assert "你好" in said(free, "你好")[1]


def test_raw_completions_see_the_marks(free: openai.OpenAI) -> None:
    """The base endpoint adds no template and takes nothing out."""
    address = str(free.base_url).removesuffix("/v1/")
    rendered = httpx.post(f"{address}/tokenize", json={"messages": [{"role": "user", "content": QUESTIONS[0].prompt}]}).json()["tokens"]
    reply = free.completions.create(model="tiny-r1", prompt=rendered, max_tokens=400, temperature=0).choices[0].text
    assert reply.startswith("<think>\n")
    assert QUESTIONS[0].accepts(reply)


def test_how_much_it_thinks_can_be_asked_for(free: openai.OpenAI, forced: openai.OpenAI) -> None:
    question = next(question for question in QUESTIONS if not question.terse)
    for client in (free, forced):
        assert said(client, question.prompt, reasoning_effort="none")[0] == ""
        assert said(client, question.prompt, reasoning_effort="high")[0]


def test_the_form_of_an_answer_begins_behind_the_thoughts(forced: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"enum": [{"answer": "yes"}, {"answer": "no"}]}}}
    thinking, answer = said(forced, QUESTIONS[0].prompt, response_format=form)
    assert thinking
    assert json.loads(answer)["answer"] in ("yes", "no")
