"""Conversations that chat templates meet: system roles, tools, calls with and without text, tool results, reasoning."""

from __future__ import annotations

from typing import Any

Chat = list[dict[str, Any]]

SYSTEM = {"role": "system", "content": "Be brief & <polite>."}
USER = {"role": "user", "content": "Wetter in Köln, 今日?"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2, "deep": {"list": [1, None, True]}}}}
OTHER_CALL = {"id": "call00002", "type": "function", "function": {"name": "clock", "arguments": {}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": '{"celsius": 21}'}
OTHER_RESULT = {"role": "tool", "tool_call_id": "call00002", "name": "clock", "content": "12:00"}
ANSWER = {"role": "assistant", "content": "21 °C."}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n21 °C."}
REASONED = {"role": "assistant", "content": "21 °C.", "reasoning_content": "hm"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Tells the {name} — now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where?"}}, "required": ["city"]},
        },
    }
    for name in ("weather", "clock")
]

CHATS: dict[str, Chat] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, USER],
    "thought": [USER, THOUGHT, USER],
    "reasoned": [USER, REASONED, USER],
    "called": [SYSTEM, USER, CALLING, RESULT],
    "called with text": [USER, {**CALLING, "content": "Let me look."}, RESULT, ANSWER, USER],
    "called with empty text": [USER, {**CALLING, "content": ""}, RESULT],
    "called twice": [USER, {**CALLING, "tool_calls": [CALL, OTHER_CALL]}, RESULT, OTHER_RESULT, ANSWER, USER],
}
