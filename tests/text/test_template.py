"""Chat templates: what they can use, what they are refused, and <think> forced once."""

from __future__ import annotations

import re
from datetime import datetime

import pytest

from server.errors import RequestError, UnsupportedModel
from server.text.template import CHATML, ChatTemplate, force_think, opens_think

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>Grüß & 你好</b>"}]


def test_chatml() -> None:
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<b>Grüß & 你好</b><|im_end|>\n"
    assert ChatTemplate(CHATML).render(CHAT) == prompt + "<|im_start|>assistant\n"
    assert ChatTemplate(CHATML).render(CHAT, add_generation_prompt=False) == prompt


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{{ messages[1].content | tojson }}", '"<b>Grüß & 你好</b>"'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=True) }}", '{\n "a": [\n  2\n ],\n "b": 1\n}'),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{% if tools is none %}\nno tools\n{% endif %}\n", "no tools\n"),
        ("  {% if true %}\n{{ enable_thinking }}\n  {% endif %}\n", "True\n"),
        ("{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{% macro twice(x) %}{% for i in range(2) %}{{ x }}{% endfor %}{% endmacro %}{{ twice('ab') }}", "abab"),
        ("{{ messages[1].content.split('>')[0] }}", "<b"),
        ("{{ messages[9] is defined }}", "False"),
    ],
)
def test_what_templates_use(source: str, prompt: str) -> None:
    assert ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(CHAT, enable_thinking=True) == prompt


def test_the_date() -> None:
    assert re.fullmatch(r"\d{4}", year := ChatTemplate("{{ strftime_now('%Y') }}").render([]))
    assert abs(int(year) - datetime.now().year) <= 1


def test_a_templates_refusal_is_the_answer() -> None:
    template = ChatTemplate("{% if messages[0].role != 'user' %}{{ raise_exception('The first message must be the user\\'s.') }}{% endif %}")
    with pytest.raises(RequestError) as caught:
        template.render(CHAT)
    assert str(caught.value) == "The first message must be the user's."
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + none }}",
        "{{ messages[0].missing.deeper }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 / 0 }}",
        "{% include 'other' %}",
    ],
)
def test_a_template_that_goes_wrong_is_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match=r"chat template cannot take these messages \(.+\)\. Check"):
        ChatTemplate(source).render(CHAT)


def test_the_budget_of_turns_is_each_renderings_own() -> None:
    template = ChatTemplate("{% for i in range(60000) %}{% endfor %}done")
    assert [template.render([]) for _ in range(3)] == ["done"] * 3


def test_invalid_jinja_is_told_at_load() -> None:
    with pytest.raises(UnsupportedModel, match=r"not valid Jinja \(line 2: .*--model_path"):
        ChatTemplate("a\n{% for %}")


@pytest.mark.parametrize(
    ("prompt", "forced"),
    [
        ("<|assistant|>", "<|assistant|><think>\n"),
        ("<|assistant|>\n", "<|assistant|>\n<think>\n"),
        ("<|assistant|><think>", "<|assistant|><think>\n"),
        ("<|assistant|><think>\n", "<|assistant|><think>\n"),
        ("<|assistant|><think>\n\n", "<|assistant|><think>\n"),
        ("<|assistant|><think>\n\n</think>\n\n", "<|assistant|><think>\n\n</think>\n\n<think>\n"),
        ("", "<think>\n"),
    ],
)
def test_think_is_forced_once(prompt: str, forced: str) -> None:
    assert force_think(prompt) == forced
    assert force_think(forced) == forced
    assert opens_think(forced)


def test_a_closed_tag_does_not_open() -> None:
    assert not opens_think("<think>\n\n</think>\n\n")
    assert not opens_think("<|assistant|>\n")


@pytest.mark.parametrize("arguments", ["{}", "", "null"])
def test_a_call_without_arguments_is_rendered(arguments: str) -> None:
    """Some clients send nothing for functions that take nothing; this template loops over them, as GLM's does."""
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}\n"
        "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n{% endfor %}</tool_call>"
        "{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "12"}]
    assert "<tool_call>clock\n</tool_call><tool>12" in template.render(messages)
