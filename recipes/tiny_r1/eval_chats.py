"""Writes the chats that `moespan eval text` takes where no text is given: held-out questions of every skill, each with its thinking.

    python -m recipes.tiny_r1.eval_chats [--each 20] > server/bench/chats.jsonl

Lines of {"prompt", "reply"}, without any template: each model gets them in its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from recipes.tiny_r1.thinking import reply
from server.bench.questions import LANGUAGES, SKILLS, questions

EACH, SEED = 20, 1  # questions of a skill and language; `moespan eval questions` asks those of seed 0


def lines(each: int = EACH) -> Iterator[str]:
    """The skills and languages in turns, so that the first lines are a fair sample."""
    cells = [questions("test", skill, language, each, SEED) for skill in SKILLS for language in LANGUAGES]
    for turn in zip(*cells, strict=True):
        for question in turn:
            yield json.dumps({"prompt": question.prompt, "reply": reply(question)}, ensure_ascii=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=EACH, help=f"questions of each skill and language (default: {EACH})")
    print("\n".join(lines(parser.parse_args().each)))
