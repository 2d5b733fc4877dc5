"""How a chat becomes a prompt: replies that are continued, the template's switches, and how much the model is to think."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.convert import chat, completions
from server.api.prompts import chat_prompt
from server.api.schemas.body import checked
from server.api.schemas.openai import ChatRequest, CompletionRequest
from server.api.serving import Loaded
from server.config import ApiConfig, Config
from server.errors import RequestError
from server.text.template import ChatTemplate
from server.text.tokenizer import ByteTokenizer, Tokenizer
from tests.fakes import STOP_ID

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
R1 = PLAIN.replace("<assistant>{% endif", "<assistant><think>\n{% endif")
SWITCHED = PLAIN.replace("{% endif %}", "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is false }}{% endif %}")
LEVELS = PLAIN + "{{ reasoning_effort }}"
NO_THOUGHTS = "<think>\n\n</think>\n\n"
USER = {"role": "user", "content": "hi"}


class Thinking(ByteTokenizer):
    """A vocabulary with tokens for <think> and for gaps, as a model's that was taught to use them."""

    TOKENS = ("<think>", "</think>", "<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>")

    def _encode(self, text: str, special: bool) -> list[int]:
        return [300 + self.TOKENS.index(text)] if text in self.TOKENS else super()._encode(text, special)


def loaded(template: str, tokenizer: Tokenizer | None = None) -> Loaded:
    return Loaded(None, tokenizer or Thinking(vocab_size=400, stop_ids=[STOP_ID]), ChatTemplate(template))  # type: ignore[arg-type]


def prompt_of(template: str, *messages: dict[str, Any], force: bool = False, tokenizer: Tokenizer | None = None, **body: Any) -> str:
    return chat_prompt(checked(ChatRequest, {"messages": [*messages] or [USER], **body}), loaded(template, tokenizer), force=force).text


SAID = {"role": "assistant", "content": "It is"}


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({}, "<user>hi<assistant>It is"),
        ({"continue_final_message": True}, "<user>hi<assistant>It is"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<user>hi<assistant>It is"),
        ({"continue_final_message": False}, "<user>hi<assistant>It is<assistant>"),
        ({"add_generation_prompt": True}, "<user>hi<assistant>It is<assistant>"),
        ({"continue_final_message": False, "add_generation_prompt": False}, "<user>hi<assistant>It is"),
    ],
)
def test_the_assistants_last_message_is_continued(body: dict[str, Any], prompt: str) -> None:
    assert prompt_of(PLAIN, USER, SAID, **body) == prompt


def test_a_users_message_is_continued_when_that_is_asked_for() -> None:
    assert prompt_of(PLAIN, USER, continue_final_message=True) == "<user>hi"


def test_what_templates_put_around_a_message_does_not_end_it() -> None:
    ended = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    assert prompt_of(ended, USER, {"role": "assistant", "content": "It is "}) == "<user>hi<end><assistant>It is "


def test_thoughts_can_be_continued() -> None:
    empty = PLAIN.replace("<{{ m.role }}>", "<{{ m.role }}>{{ '<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' }}")
    assert prompt_of(empty, USER, SAID) == f"<user>hi<assistant>{NO_THOUGHTS}It is"
    assert prompt_of(empty, USER, {"role": "assistant", "content": "<think>\nhm"}) == "<user>hi<assistant><think>\nhm"
    assert prompt_of(empty, USER, {"role": "assistant", "reasoning_content": "hm"}) == "<user>hi<assistant><think>\nhm"


@pytest.mark.parametrize(
    ("content", "thinking"), [("It is", "closed"), ("<think>\nhm", "opened"), ("<think>\nhm\n</think>\n\nIt", "closed"), ("hm</think>It is", "closed")]
)
def test_whether_a_continued_reply_is_still_thinking(content: str, thinking: str) -> None:
    body = checked(ChatRequest, {"messages": [USER, {"role": "assistant", "content": content}]})
    assert chat(body, loaded(R1), Config(), "id").rules.reasoning == thinking


@pytest.mark.parametrize("said", ["It is ", "A tag: <think>"])
def test_what_others_say_of_think_begins_no_thought(said: str) -> None:
    messages = [{"role": "user", "content": "What does the <think> tag mean?"}, {"role": "assistant", "content": said}]
    assert chat(checked(ChatRequest, {"messages": messages}), loaded(R1), Config(), "id").rules.reasoning == "closed"


def test_a_continued_reply_is_not_made_to_think() -> None:
    assert prompt_of(PLAIN, USER, SAID, force=True) == "<user>hi<assistant>It is"


def test_a_template_that_leaves_the_last_message_out_says_so() -> None:
    with pytest.raises(RequestError, match=r"leaves out the last message, so it cannot be continued\. Let a user's message be the last\."):
        prompt_of("{{ messages[0].content }}", USER, SAID)


@pytest.mark.parametrize(
    ("template", "effort", "prompt"),
    [
        (SWITCHED, "none", f"<user>hi<assistant>{NO_THOUGHTS}"),
        (SWITCHED, "minimal", f"<user>hi<assistant>{NO_THOUGHTS}"),
        (SWITCHED, "low", "<user>hi<assistant>"),
        (SWITCHED, "high", "<user>hi<assistant>"),
        (SWITCHED.replace("enable_thinking", "thinking"), "none", f"<user>hi<assistant>{NO_THOUGHTS}"),
        (LEVELS, "high", "<user>hi<assistant>high"),
        (LEVELS, "none", "<user>hi<assistant>none"),
        (R1, "none", f"<user>hi<assistant>{NO_THOUGHTS}"),
        (R1, "high", "<user>hi<assistant><think>\n"),
        (PLAIN, "none", f"<user>hi<assistant>{NO_THOUGHTS}"),  # R1's of January, which does not open the thoughts itself
        (PLAIN, "medium", "<user>hi<assistant>"),
    ],
)
def test_reasoning_effort(template: str, effort: str, prompt: str) -> None:
    assert prompt_of(template, USER, reasoning_effort=effort) == prompt


def test_no_effort_is_stronger_than_force_think() -> None:
    assert prompt_of(PLAIN, USER, force=True) == "<user>hi<assistant><think>\n"
    assert prompt_of(PLAIN, USER, force=True, reasoning_effort="none") == f"<user>hi<assistant>{NO_THOUGHTS}"
    body = checked(ChatRequest, {"messages": [USER], "reasoning_effort": "none"})
    prepared = chat(body, loaded(PLAIN), Config(api=ApiConfig(force_think=True, reasoning_format="none")), "id")
    assert prepared.rules.prefix == ""


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_a_switch_says_the_same_to_a_template_that_has_none(name: str) -> None:
    for force in (False, True):
        assert prompt_of(PLAIN, USER, force=force, chat_template_kwargs={name: False}) == f"<user>hi<assistant>{NO_THOUGHTS}"
        assert prompt_of(R1, USER, force=force, reasoning_effort="none", chat_template_kwargs={name: True}) == "<user>hi<assistant><think>\n"


def test_a_prompt_that_begins_no_reply_is_left_alone() -> None:
    assert prompt_of(PLAIN, USER, force=True, add_generation_prompt=False) == "<user>hi"
    assert prompt_of(PLAIN, USER, reasoning_effort="none", add_generation_prompt=False) == "<user>hi"


def test_a_model_that_does_not_think_cannot_be_made_to() -> None:
    plain = ByteTokenizer(vocab_size=257, stop_ids=[STOP_ID])
    assert prompt_of(PLAIN, USER, tokenizer=plain, reasoning_effort="none") == "<user>hi<assistant>"
    with pytest.raises(RequestError, match="This model does not think before it answers, so a 'reasoning_effort' of 'low' is not possible"):
        prompt_of(PLAIN, USER, tokenizer=plain, reasoning_effort="low")


def test_the_templates_own_switches() -> None:
    template = PLAIN + "{{ style }}{{ bos_token }}"
    assert prompt_of(template, USER, chat_template_kwargs={"style": "terse", "other": [1]}) == "<user>hi<assistant>terse"
    assert prompt_of(SWITCHED, USER, reasoning_effort="none", chat_template_kwargs={"enable_thinking": True}) == "<user>hi<assistant>"


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "range", "self", "add_generation_prompt"])
def test_what_is_no_switch_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="is not a switch of the template"):
        prompt_of(PLAIN, USER, chat_template_kwargs={name: 1})


def test_a_gap_is_filled() -> None:
    body = checked(CompletionRequest, {"prompt": ["a", [98, 99]], "suffix": "z"})
    prepared = completions(body, loaded(PLAIN), Config(), "id")
    assert [each.request.prompt_ids for each in prepared] == [(302, 97, 303, 122, 304), (302, 98, 99, 303, 122, 304)]
