"""From a client's body to what the scheduler runs: prompt, limits, sampling, constraint. Pure; every mistake is a RequestError.

To be called off the event loop: templates are foreign programs, and a grammar is compiled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.api.constraints import Constrain, chat_constraint, form_constraint, tool_rules
from server.api.prompts import ChatPrompt, chat_prompt, completion_ids, text_ids
from server.api.sampling import sampling_params, stop_ids
from server.api.schemas.openai import ChatRequest, CompletionRequest, Prompt
from server.api.serving import Loaded
from server.config import Config
from server.errors import RequestError
from server.scheduler.reply import TextRules
from server.text.reasoning import THINK_OPEN
from server.text.tokenizer import Tokenizer
from server.types import GenerateRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Prepared:
    """One sequence to run, and how its ids become text."""

    request: GenerateRequest
    rules: TextRules
    first: bool = True  # of the choices for one prompt: the one whose prompt is counted


def chat(body: ChatRequest, loaded: Loaded, config: Config, request_id: str) -> Prepared:
    """A chat as one sequence."""
    return chats(body, loaded, config, request_id)[0]


def chats(body: ChatRequest, loaded: Loaded, config: Config, request_id: str) -> list[Prepared]:
    """A chat as `n` sequences. With --force_think the prompt ends in <think>."""
    prompt = chat_prompt(body, loaded, force=config.api.force_think)
    tokenizer = loaded.tokenizer
    limit = body.max_completion_tokens or body.max_tokens or config.scheduler.max_new_tokens
    tools = tool_rules(body, prompt.tools, loaded.template.dialect.format)
    rules = replace(_chat_rules(body, prompt, config), tools=tools)
    constraint = chat_constraint(body, tools, tokenizer, after_think=prompt.thinking == "opened")
    sampling = sampling_params(body, _chat_logprobs(body), tokenizer)
    ends = stop_ids(body, tokenizer, formed=constraint is not None)
    request = GenerateRequest(request_id, text_ids(prompt.text, "messages", tokenizer), limit, sampling, ends)
    return _choices(Prepared(request, rules), body.choices, constraint)


def _chat_rules(body: ChatRequest, prompt: ChatPrompt, config: Config) -> TextRules:
    if config.api.reasoning_format == "none":
        return TextRules(body.stop, reasoning=prompt.thinking, raw=True, prefix=f"{THINK_OPEN}\n" if prompt.forced else "")
    return TextRules(body.stop, reasoning=prompt.thinking)


def _chat_logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    return None


def completions(body: CompletionRequest, loaded: Loaded, config: Config, request_id: str) -> list[Prepared]:
    """Each prompt as `n` sequences of their own."""
    sampling = sampling_params(body, body.logprobs, loaded.tokenizer)
    limit = body.max_tokens or config.scheduler.max_new_tokens
    constraint = form_constraint(body.form(), loaded.tokenizer, after_think=False)
    ends = stop_ids(body, loaded.tokenizer, formed=constraint is not None)
    prepared: list[Prepared] = []
    for index, prompt in enumerate(body.prompt):
        request = GenerateRequest(f"{request_id}-{index}", completion_ids(body, prompt, loaded.tokenizer), limit, sampling, ends)
        prepared += _choices(Prepared(request, TextRules(body.stop, prefix=_echoed(body, prompt, loaded.tokenizer))), body.choices, constraint)
    return prepared


def _echoed(body: CompletionRequest, prompt: Prompt, tokenizer: Tokenizer) -> str:
    """What the reply begins with."""
    if not body.echo:
        return ""
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


def _choices(prepared: Prepared, count: int, constraint: Constrain | None) -> list[Prepared]:
    """The same sequence several times: a seed that was given is one more for each, and each has its own walk through the constraint."""
    request = prepared.request
    ids: Sequence[str] = [request.request_id if count == 1 else f"{request.request_id}.{index}" for index in range(count)]
    return [
        replace(
            prepared,
            first=index == 0,
            request=replace(
                request,
                request_id=ids[index],
                sampling=_other_draw(request.sampling, index),
                constraint=constraint() if constraint else None,
            ),
        )
        for index in range(count)
    ]


def _other_draw(sampling: SamplingParams, index: int) -> SamplingParams:
    """The same sampling with the seed of another choice, within 64 bits."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + index + 2**63) % 2**64 - 2**63)
