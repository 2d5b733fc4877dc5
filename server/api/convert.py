"""From a client's body to what the scheduler runs: template, token ids, limits, sampling. Pure; every mistake is a RequestError."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.api.schemas import ChatRequest, CompletionRequest, Message, Prompt, Sampling
from server.api.sentences import quoted
from server.api.serving import Loaded
from server.config import Config
from server.errors import RequestError
from server.scheduler.reply import TextRules
from server.text.reasoning import THINK_OPEN
from server.text.template import force_think, opens_think
from server.text.tokenizer import Tokenizer
from server.types import GenerateRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Prepared:
    """One sequence to run, and how its ids become text."""

    request: GenerateRequest
    rules: TextRules


def chat(body: ChatRequest, loaded: Loaded, config: Config, request_id: str) -> Prepared:
    """A chat as one sequence. With --force_think the prompt ends in <think>."""
    prompt = loaded.template.render(template_messages(body.messages))
    if config.api.force_think:
        prompt = force_think(prompt)
    sampling = sampling_params(body, _chat_logprobs(body), loaded.tokenizer)
    limit = body.max_completion_tokens or body.max_tokens or config.scheduler.max_new_tokens
    request = GenerateRequest(request_id, _text_ids(prompt, "messages", loaded.tokenizer), limit, sampling, loaded.tokenizer.stop_ids)
    return Prepared(request, _chat_rules(body, prompt, config))


def _chat_rules(body: ChatRequest, prompt: str, config: Config) -> TextRules:
    if config.api.reasoning_format == "none":
        return TextRules(body.stop, prefix=f"{THINK_OPEN}\n" if config.api.force_think else "")
    return TextRules(body.stop, reasoning="opened" if opens_think(prompt) else "closed")


def _chat_logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    return None


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates want them: content as one text, no absent keys, and the newer role `developer` by its older name."""
    dumped = [message.model_dump(exclude_none=True) for message in messages]
    return [{**message, "role": "system"} if message["role"] == "developer" else message for message in dumped]


def completions(body: CompletionRequest, loaded: Loaded, config: Config, request_id: str) -> list[Prepared]:
    """Each prompt as a sequence of its own."""
    sampling = sampling_params(body, body.logprobs, loaded.tokenizer)
    limit = body.max_tokens or config.scheduler.max_new_tokens
    return [
        Prepared(
            GenerateRequest(f"{request_id}-{index}", prompt_ids(prompt, loaded.tokenizer), limit, sampling, loaded.tokenizer.stop_ids),
            TextRules(body.stop),
        )
        for index, prompt in enumerate(body.prompt)
    ]


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids as they are, after a check; text through the tokenizer."""
    if isinstance(prompt, str):
        return _text_ids(prompt, "prompt", tokenizer)
    for token_id in prompt:
        _check_id(token_id, tokenizer, "prompt")
    return tuple(prompt)


def _text_ids(text: str, field: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """A whole prompt's ids. An empty text is only possible where BOS stands before it."""
    ids = tokenizer.encode_prompt(text)
    if not ids:
        raise RequestError(f"'{field}' makes an empty prompt, and this model starts from at least one token. Send some text.", param=field)
    return tuple(ids)


def sampling_params(body: Sampling, top_logprobs: int | None, tokenizer: Tokenizer) -> SamplingParams:
    """The body's sampling fields; what is absent or null has OpenAI's default."""
    given = {name: getattr(body, name) for name in _SAMPLING_FIELDS if getattr(body, name) is not None}
    return SamplingParams(
        **given,
        top_k=max(body.top_k or 0, 0),
        logit_bias=_logit_bias(body.logit_bias or {}, tokenizer),
        top_logprobs=top_logprobs,
    )


_SAMPLING_FIELDS = ("temperature", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty")


def _logit_bias(biases: dict[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    by_id: dict[int, float] = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError(f"'logit_bias' has the key {quoted(key)}; its keys are token ids, such as \"42\".", param="logit_bias")
        by_id[_check_id(int(key), tokenizer, "logit_bias")] = bias
    return by_id


def _check_id(token_id: int, tokenizer: Tokenizer, field: str) -> int:
    if not 0 <= token_id < tokenizer.vocab_size:
        raise RequestError(f"'{field}' has the token id {token_id}, but this model's ids go from 0 to {tokenizer.vocab_size - 1}.", param=field)
    return token_id
