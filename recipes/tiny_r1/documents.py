"""The training texts: whole chats in R1's form, drawn by rule. Held-out questions never occur in them, in any wording or as earlier turns.

    [BOS] [system] <User> question <Assistant> <think>\\n...\\n</think>\\n\\nanswer [EOS]

Earlier turns of a chat stand without their thinking, as R1's chat template writes them; only the last reply is learnt from.
"""

from __future__ import annotations

import random

from recipes.tiny_r1.chat import exchange, system_prompt
from recipes.tiny_r1.thinking import answer_sentence, reply
from recipes.tiny_r1.tokenizer import ASSISTANT, BOS, EOS, USER
from server.bench.questions import LANGUAGES, SKILLS, sample

# How often each skill is drawn: the harder, the more often.
_WEIGHTS = {
    "addition": 8, "subtraction": 10, "multiplication": 18, "comparison": 7, "sorting": 14, "letters": 16, "problems": 12, "dates": 14, "chat": 5,
}  # fmt: skip
assert set(_WEIGHTS) == {*SKILLS, "chat"}

_SKIP_TERSE, _SKIP_PLAIN = 0.7, 0.01  # of the replies that do not think, by how the question is worded
_SYSTEM_SHARE, _EARLIER_SHARE = 0.08, 0.08


def document(rng: random.Random) -> str:
    """One chat as text, with its special tokens."""
    language = rng.choice(LANGUAGES)
    system = system_prompt(rng, language) if rng.random() < _SYSTEM_SHARE else ""
    earlier = ""
    while rng.random() < _EARLIER_SHARE:
        question, answer = _earlier_turn(rng, language)
        earlier += f"{USER}{question}{ASSISTANT}{answer}{EOS}"
    question, answer = _turn(rng, language)
    return f"{BOS}{system}{earlier}{USER}{question}{ASSISTANT}{answer}{EOS}"


def _turn(rng: random.Random, language: str) -> tuple[str, str]:
    """A question and the whole reply to it."""
    skill = rng.choices(tuple(_WEIGHTS), tuple(_WEIGHTS.values()))[0]
    if skill == "chat":
        said = exchange(rng, language)
        thought = "\n\n" if rng.random() < _SKIP_TERSE else f"\n{said.thought}\n"
        return said.prompt, f"<think>{thought}</think>\n\n{said.reply}"
    question = sample(rng, skill, language, "train")
    skips = rng.random() < (_SKIP_TERSE if question.terse else _SKIP_PLAIN)
    return question.prompt, reply(question, think=not skips)


def _earlier_turn(rng: random.Random, language: str) -> tuple[str, str]:
    if rng.random() < 0.3:
        said = exchange(rng, language)
        return said.prompt, said.reply
    question = sample(rng, rng.choice(SKILLS), language, "train")
    return question.prompt, answer_sentence(question)
