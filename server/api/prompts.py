"""From a body to a prompt: a chat through the model's template, with its tools and switches, or a completion with a gap to fill."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.api.sampling import check_ids
from server.api.schemas.openai import ChatRequest, CompletionRequest, Message, Prompt
from server.api.schemas.tools import ToolDefinition
from server.api.serving import Loaded
from server.errors import RequestError
from server.text.reasoning import THINK_CLOSE, THINK_OPEN
from server.text.template import force_think, opens_think
from server.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_SWITCHES = ("enable_thinking", "thinking")  # what templates call whether the model is to think
_UNTHINKING = ("none", "minimal")
_NO_THOUGHTS = f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n"

# What tells a model, family by family, that a text has a gap: before the text, where the suffix begins, and before what fills the gap.
_GAP_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen's, and others'
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek's
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM's
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder's
)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as text, and how the reply to it begins."""

    text: str
    thinking: Literal["opened", "closed"]  # whether the prompt ends inside <think>
    forced: bool  # by --force_think
    tools: Sequence[ToolDefinition]  # those that the model is told of


def chat_prompt(body: ChatRequest, loaded: Loaded, *, force: bool) -> ChatPrompt:
    """The messages as the model's template writes them. `force`: the prompt ends in <think>, unless the request wants no thoughts or continues a reply."""
    switches = _effort(body.reasoning_effort, loaded) | (body.chat_template_kwargs or {})
    messages = template_messages(body.messages)
    offered = _offered(body, loaded)
    tools = [tool.model_dump(exclude_none=True) for tool in offered] or None
    if body.continues:
        text = loaded.template.continued(messages, tools=tools, **switches)
        return ChatPrompt(text, "opened" if _within_thought(text, messages[-1]) else "closed", False, offered)
    begins = body.add_generation_prompt is not False
    text = loaded.template.render(messages, tools=tools, add_generation_prompt=begins, **switches)
    thoughtless = _wants_no_thoughts(body)
    forced = begins and force and not thoughtless
    if forced:
        text = force_think(text)
    elif begins and thoughtless:
        text = _closed(text, loaded)
    return ChatPrompt(text, "opened" if opens_think(text) else "closed", forced, offered)


def _within_thought(text: str, last: Mapping[str, Any]) -> bool:
    """Whether a prompt that ends in `last` ends within its thought. What earlier messages say of <think> does not count."""
    said = last.get("content") or ""
    if not said and last.get("reasoning_content"):
        return True
    begun = said.lstrip().startswith(THINK_OPEN) or opens_think(text[: len(text) - len(said)])
    return begun and THINK_CLOSE not in said


def _offered(body: ChatRequest, loaded: Loaded) -> Sequence[ToolDefinition]:
    """The tools that the model is told of.

    One that was taught no calls is told only where a call must come: clients such as Open WebUI send dozens of tools with every chat to whatever model,
    thousands of tokens that it could do nothing with.
    """
    if not body.tools or body.tool_choice == "none":
        return []
    if body.tool_choice in (None, "auto") and not loaded.template.dialect.known:
        _warn_once()
        return []
    return body.tools


@functools.cache
def _warn_once() -> None:
    log.warning("The model's chat template knows no tools: they are left out of its prompts, unless 'tool_choice' asks for a call.")


def _effort(effort: str | None, loaded: Loaded) -> dict[str, Any]:
    """The switches for a `reasoning_effort`. RequestError for one that a model which never thinks cannot make."""
    if effort is None:
        return {}
    known = loaded.template.variables
    switches: dict[str, Any] = {name: effort not in _UNTHINKING for name in _SWITCHES if name in known}
    if "reasoning_effort" in known:
        switches["reasoning_effort"] = effort
    if not switches and effort not in _UNTHINKING and not _thinks(loaded):
        raise RequestError(
            f"This model does not think before it answers, so a 'reasoning_effort' of {effort!r} is not possible. Leave it out.", param="reasoning_effort"
        )
    return switches


def _wants_no_thoughts(body: ChatRequest) -> bool:
    """Whether the model is not to think, by the template's own switches or else by the effort."""
    given = [value for name, value in (body.chat_template_kwargs or {}).items() if name in _SWITCHES]
    return any(value is False for value in given) if given else body.reasoning_effort in _UNTHINKING


def _thinks(loaded: Loaded) -> bool:
    """Whether the model was taught to think, as far as its vocabulary tells."""
    return len(loaded.tokenizer.encode(THINK_OPEN)) == 1


def _closed(text: str, loaded: Loaded) -> str:
    """A prompt after which the model does not think: where its template has no switch for that, empty thoughts stand there already."""
    if opens_think(text):
        return text.rstrip().removesuffix(THINK_OPEN) + _NO_THOUGHTS
    has_switch = not loaded.template.variables.isdisjoint((*_SWITCHES, "reasoning_effort"))
    return text if has_switch or not _thinks(loaded) else text + _NO_THOUGHTS


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates want them: content as one text, no absent keys, and the newer role `developer` by its older name."""
    dumped = [message.model_dump(exclude_none=True) for message in messages]
    return [{**message, "role": "system"} if message["role"] == "developer" else message for message in dumped]


def completion_ids(body: CompletionRequest, prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """A completion's prompt as token ids; with a `suffix`, as a text with a gap before it."""
    if not body.suffix:
        return prompt_ids(prompt, tokenizer)
    before = list(check_ids(prompt, tokenizer, "prompt")) if not isinstance(prompt, str) else tokenizer.encode(prompt)
    begin, hole, end = _gap_ids(tokenizer)
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return (*start, begin, *before, hole, *tokenizer.encode(body.suffix), end)


def _gap_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    for names in _GAP_TOKENS:
        ids = [tokenizer.encode(name) for name in names]
        if all(len(each) == 1 for each in ids):
            return ids[0][0], ids[1][0], ids[2][0]
    raise RequestError("This model's vocabulary has no tokens for filling a gap in a text, so 'suffix' is not possible. Leave it out.", param="suffix")


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids as they are, after a check; text through the tokenizer."""
    return text_ids(prompt, "prompt", tokenizer) if isinstance(prompt, str) else check_ids(prompt, tokenizer, "prompt")


def text_ids(text: str, field: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """A whole prompt's ids. An empty text is only possible where BOS stands before it."""
    ids = tokenizer.encode_prompt(text)
    if not ids:
        raise RequestError(f"'{field}' makes an empty prompt, and this model starts from at least one token. Send some text.", param=field)
    return tuple(ids)
