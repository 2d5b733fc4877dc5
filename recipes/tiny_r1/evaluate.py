"""A quick measure during training: exact answers to held-out questions, greedily and all questions at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipes.tiny_r1.model import Cache, TinyR1
from recipes.tiny_r1.tokenizer import ASSISTANT, BOS, EOS_ID, PAD_ID, USER
from server.bench.questions import LANGUAGES, SKILLS, Question, questions


@dataclass(frozen=True, slots=True)
class Result:
    """Exact answers, by skill and language."""

    right: Mapping[tuple[str, str], float]  # share of right answers
    wrong: Sequence[tuple[Question, str]]  # with the replies

    def table(self) -> str:
        """A line for each skill, and the mean."""
        lines = [f"{skill:16}" + "".join(f"{self.right[skill, language]:9.1%}" for language in LANGUAGES) for skill in SKILLS]
        mean = sum(self.right.values()) / len(self.right)
        return "\n".join([" " * 16 + "".join(f"{language:>9}" for language in LANGUAGES), *lines, f"{'mean':16}{mean:9.1%}"])


def evaluate(model: TinyR1, tokenizer: Tokenizer, each: int, *, force_think: bool, seed: int = 0, most: int = 320) -> Result:
    """`each` held-out questions of every skill and language, replies of at most `most` tokens."""
    asked = [question for skill in SKILLS for language in LANGUAGES for question in questions("test", skill, language, each, seed)]
    opening = "<think>\n" if force_think else ""
    prompts = [tokenizer.encode(f"{BOS}{USER}{question.prompt}{ASSISTANT}{opening}").ids for question in asked]
    replies = [tokenizer.decode(ids, skip_special_tokens=False) for ids in generate(model, prompts, most)]
    wrong = [(question, reply) for question, reply in zip(asked, replies, strict=True) if not _right(question, reply)]
    missed = [(question.skill, question.language) for question, _ in wrong]
    return Result({(skill, language): 1 - missed.count((skill, language)) / each for skill in SKILLS for language in LANGUAGES}, wrong)


@torch.inference_mode()
def generate(model: TinyR1, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Greedy replies, without EOS, of at most `most` tokens. Prompts are padded on the left, which rope does not see."""
    device, shape = model.embed_tokens.weight.device, model.shape
    width = max(map(len, prompts))
    tokens = torch.tensor([[PAD_ID] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    seen = torch.zeros(len(prompts), width + most, dtype=torch.bool, device=device)
    seen[:, :width] = tokens != PAD_ID
    caches = [_cache(model, len(prompts), width + most) for _ in range(shape.layers)]
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    # A padding token sees itself alone, for a row of nothing would be no number.
    mask = (causal & seen[:, None, :width]) | torch.eye(width, dtype=torch.bool, device=device)
    replies, running = [], torch.ones(len(prompts), dtype=torch.bool, device=device)
    for end in range(width, width + most):
        hidden, _ = model(tokens, mask[:, None], caches)
        token: Tensor = model.logits(hidden[:, -1]).argmax(-1).where(running, EOS_ID)
        replies.append(token)
        running = running & (token != EOS_ID)
        if end % 16 == 0 and not running.any():
            break
        seen[:, end] = True
        tokens, mask = token[:, None], seen[:, None, : end + 1]
    return [_until_end(row) for row in torch.stack(replies, 1).tolist()]


def _right(question: Question, reply: str) -> bool:
    """A reply that never stops thinking is none."""
    return "</think>" in reply and question.accepts(reply)


def _until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids


def _cache(model: TinyR1, rows: int, capacity: int) -> Cache:
    shape, device = model.shape, model.embed_tokens.weight.device
    keys = torch.zeros(rows, shape.heads, capacity, shape.qk_dim, dtype=model.dtype, device=device)
    return Cache(keys, torch.zeros(rows, shape.heads, capacity, shape.v_dim, dtype=model.dtype, device=device))
