"""A body for each route that takes one, with as many of its fields as go together: what fuzzing starts from."""

from __future__ import annotations

from typing import Any

from tests.api.live import MODEL

CHAT = {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "hé 🦙"}]}]}
FUNCTION = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "max_tokens": 4}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **CHAT,
        **SAMPLING,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": {"42": 1},
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "chat_template_kwargs": {"a": 1},
        "top_k": 4,
        "min_p": 0.1,
        "presence_penalty": 1,
        "stop_token_ids": [7],
        "parallel_tool_calls": True,
    },
    "/v1/completions": {"prompt": ["ab", "c"], **SAMPLING, "echo": True, "n": 1, "suffix": "", "guided_choice": ["a", "b"]},
    "/v1/responses": {
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "3"},
        ],
        "instructions": "x",
        "include": ["message.output_text.logprobs"],
        "text": {"format": {"type": "text"}},
        "tools": [{"type": "function", **FUNCTION}],
        "max_output_tokens": 4,
        "stream": False,
    },
    "/v1/messages": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "3"}]},
        ],
        "system": "s",
        "max_tokens": 4,
        "tools": [{"name": "add", "input_schema": FUNCTION["parameters"]}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
        "stop_sequences": ["x"],
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}], "system": [{"type": "text", "text": "s"}]},
    "/api/chat": {
        "model": "m",
        **CHAT,
        "messages": [{"role": "user", "content": "hi"}],
        "options": {"num_predict": 4, "seed": 1},
        "format": "json",
        "think": False,
        "tools": [{"type": "function", "function": FUNCTION}],
        "stream": False,
    },
    "/api/generate": {
        "prompt": "hi",
        "system": "s",
        "raw": False,
        "stream": False,
        "options": {"temperature": 0, "num_predict": 3, "stop": ["x"]},
        "format": {"type": "object"},
    },
    "/api/show": {"model": MODEL},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [97, 98]},
}
