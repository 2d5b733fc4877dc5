"""A model that calls tools: a template that writes calls as Qwen's and Hermes' do, what was thought and whose result is whose; a reply with calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.api.live import Live, live
from tests.fakes import FakeEngine

TEMPLATE = (
    "{% if tools %}t:{{ tools | map(attribute='function') | map(attribute='name') | join(',') + '\n' }}{% endif %}"
    "{% for message in messages %}{{ message.tool_call_id or message.role[0] }}:"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}{{ message.content }}"
    '{% for call in message.tool_calls or [] %}<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
ARGUMENTS = {"city": "Oslo", "days": 2}
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}


def call_of(name: str, **arguments: object) -> str:
    """A call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


SAID = "Let me see.\n" + call_of("weather", **ARGUMENTS) + "\n" + call_of("time")


@contextmanager
def calling(said: str = SAID) -> Iterator[Live]:
    """A server whose model says that."""
    with live(FakeEngine(num_pages=256, script=list(said.encode())), template=TEMPLATE, cache_lens=4096) as server:
        yield server
