"""The questions that the tiny reasoning model is trained and measured on: made by rule, in English and Chinese, each with its checker.

    for question in questions("test", "addition", "zh", n=200, seed=0):
        right = question.accepts(reply_to(question.prompt))

A question is a skill with operands. A hash of these alone, the same for every phrasing and both languages, puts it into the training share or
the held-out one, so no held-out question can occur in training. Pure Python: neither torch nor a tokenizer is needed.
"""

from server.bench.questions.question import LANGUAGES, SKILLS, Question, held_out
from server.bench.questions.sampling import questions, sample

__all__ = ["LANGUAGES", "SKILLS", "Question", "held_out", "questions", "sample"]
