"""How a reply is drawn and when it ends: the body's fields as the scheduler takes them. Pure; every mistake is a RequestError."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.schemas.openai import Sampling
from server.api.sentences import quoted
from server.errors import RequestError
from server.text.tokenizer import Tokenizer
from server.types import SamplingParams

_SAME_NAMES = ("temperature", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty")


def sampling_params(body: Sampling, top_logprobs: int | None, tokenizer: Tokenizer) -> SamplingParams:
    """The body's sampling fields; what is absent or null has OpenAI's default."""
    given = {name: getattr(body, name) for name in _SAME_NAMES if getattr(body, name) is not None}
    return SamplingParams(
        **given,
        top_k=max(body.top_k or 0, 0),
        logit_bias=_logit_bias(body.logit_bias or {}, tokenizer),
        top_logprobs=top_logprobs,
    )


def stop_ids(body: Sampling, tokenizer: Tokenizer, *, formed: bool) -> frozenset[int]:
    """The tokens that end the reply: the model's own, unless they are to be ignored, and the body's. `formed`: the reply has a form, and ends with it."""
    if formed and body.ignore_eos:
        said = "'ignore_eos' is not possible where the reply must have a form or its calls must follow schemas: it ends where they do. Leave 'ignore_eos' out."
        raise RequestError(said, param="ignore_eos")
    own = frozenset() if body.ignore_eos else tokenizer.stop_ids
    return own.union(check_ids(body.stop_token_ids or [], tokenizer, "stop_token_ids"))


def check_ids(ids: Sequence[int], tokenizer: Tokenizer, field: str) -> tuple[int, ...]:
    """The ids; RequestError for one that the vocabulary lacks."""
    for token_id in ids:
        if not 0 <= token_id < tokenizer.vocab_size:
            raise RequestError(f"'{field}' has the token id {token_id}, but this model's ids go from 0 to {tokenizer.vocab_size - 1}.", param=field)
    return tuple(ids)


def _logit_bias(biases: dict[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError(f"'logit_bias' has the key {quoted(key)}; its keys are token ids, such as \"42\".", param="logit_bias")
    return dict(zip(check_ids([int(key) for key in biases], tokenizer, "logit_bias"), biases.values(), strict=True))
