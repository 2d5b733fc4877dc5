"""Questions are asked as a client would ask them, what counts is the answer after the thinking, and gains are paired."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from server.api.serving import Loaded
from server.bench import accuracy
from server.bench.accuracy import Examiner, plan
from server.bench.journal import Json
from server.bench.questions import LANGUAGES, SKILLS, Question
from server.config import SchedulerConfig
from server.errors import ConfigError
from server.metrics import Metrics
from server.scheduler.service import Service
from server.text.template import CHATML, ChatTemplate
from server.text.tokenizer import ByteTokenizer
from server.types import SamplingParams, TokenMask
from tests.fakes import STOP_ID, FakeEngine, FakeSampler

Student = Callable[[str], str]  # prompt -> reply


class StudentEngine(FakeEngine):
    """Says what a function of the prompt says."""

    def __init__(self, student: Student) -> None:
        super().__init__(num_pages=256)
        self.student = student

    def new_sampler(self, params: SamplingParams, prompt_ids: tuple[int, ...], constraint: TokenMask | None = None) -> FakeSampler:
        self.script = list(self.student(bytes(prompt_ids).decode()).encode())
        return super().new_sampler(params, prompt_ids, constraint)


@contextmanager
def examiner(student: Student, max_new_tokens: int = 400) -> Iterator[tuple[Examiner, StudentEngine]]:
    engine = StudentEngine(student)
    loaded = Loaded(Service(engine, SchedulerConfig(), 4096, Metrics()), ByteTokenizer(vocab_size=257, stop_ids=[STOP_ID]), ChatTemplate(CHATML))
    try:
        yield Examiner(loaded, max_new_tokens), engine
    finally:
        loaded.service.close()


def question(prompt: str = "What is 3 + 4?", answer: str = "7", skill: str = "addition") -> Question:
    return Question(skill, "en", (3, 4), prompt, answer, terse=False)


def test_a_plan_asks_every_skill_and_language_in_turns() -> None:
    planned = plan(3, (True, False), seed=0)
    assert len(planned) == 3 * len(SKILLS) * len(LANGUAGES) * 2
    turn = planned[: len(planned) // 3]
    assert {(asked.skill, asked.language, forced) for asked, forced in turn} == {(s, g, f) for s in SKILLS for g in LANGUAGES for f in (True, False)}
    assert planned == plan(3, (True, False), seed=0)
    assert planned != plan(3, (True, False), seed=1)
    with pytest.raises(ConfigError, match=r"--each 2001 is more questions .* Ask for 2000 or fewer"):
        plan(2001, (True,), seed=0)


@pytest.mark.parametrize("forced", [True, False])
def test_the_prompt_is_the_servers_and_drawing_is_greedy(forced: bool) -> None:
    with examiner(lambda prompt: "") as (ask, engine):
        ask.ask((question(), forced))
    prompt = bytes(engine.samplers[0].prompt_ids).decode()
    assert prompt == "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n" + ("<think>\n" if forced else "")
    assert engine.samplers[0].params.temperature == 0


@pytest.mark.parametrize(
    ("forced", "reply", "thinking", "said", "right"),
    [
        (True, "3+4=7\n</think>\n\nThe answer is 7.", "3+4=7", "The answer is 7.", True),
        (True, "7 </think>\n\nThe answer is 8.", "7 ", "The answer is 8.", False),
        (True, "It is 7. It is 7.", "It is 7. It is 7.", "", False),  # never stops thinking
        (False, "<think>\n\n</think>\n\n7", "", "7", True),
        (False, "<think>\nhm\n</think>\n\n7", "hm", "7", True),
        (False, "Seven: 7", "", "Seven: 7", True),
    ],
)
def test_only_the_answer_after_the_thinking_counts(forced: bool, reply: str, thinking: str, said: str, right: bool) -> None:
    with examiner(lambda prompt: reply) as (ask, _):
        record = ask.ask((question(), forced))
    assert (record["thinking"], record["reply"], record["right"]) == (thinking, said, right)
    assert (record["tokens"], record["finish_reason"]) == (len(reply.encode()) + 1, "stop")


def test_a_reply_is_cut_at_max_new_tokens() -> None:
    with examiner(lambda prompt: "x" * 50, max_new_tokens=20) as (ask, _):
        record = ask.ask((question(), False))
    assert (record["tokens"], record["finish_reason"], record["reply"]) == (20, "length", "x" * 20)


def record(skill: str, prompt: str, right: bool, *, forced: bool = True, language: str = "en", thinking: str = "hm", finish: str = "stop") -> Json:
    return {
        "skill": skill, "language": language, "force_think": forced, "right": right, "prompt": prompt,
        "thinking": thinking, "tokens": 10, "finish_reason": finish,
    }  # fmt: skip


def test_a_summary_counts_by_mode_skill_and_language() -> None:
    records = [
        record("addition", "a", True), record("addition", "b", False), record("dates", "c", True), record("dates", "d", True, language="zh"),
        record("addition", "a", False, forced=False, thinking=""), record("addition", "b", False, forced=False, finish="length"),
    ]  # fmt: skip
    result = accuracy.summary(records)
    forced, free = result["force_think"], result["no_force_think"]
    assert (forced["all"].value, forced["all"].n, free["all"].value) == (0.75, 4, 0.0)
    assert {skill: found["all"].value for skill, found in forced["skills"].items()} == {"addition": 0.5, "dates": 1.0}
    assert {key: forced["skills"]["dates"][key].value for key in ("en", "zh")} == {"en": 1.0, "zh": 1.0}
    assert {language: found.n for language, found in forced["languages"].items()} == {"en": 3, "zh": 1}
    assert (free["thinking"].value, free["cut"], forced["cut"], forced["tokens"].value) == (0.5, 1, 0, 10.0)
    gained = result["gained_by_force_think"]
    assert (gained["gain"].value, gained["gain"].n, gained["won"], gained["lost"]) == (0.5, 2, 1, 0)  # a and b, which were asked in both ways
    assert "gained_by_force_think" not in accuracy.summary(records[:4])


def test_a_paired_gain_is_surer_than_two_shares() -> None:
    before = [record("letters", str(n), n % 2 == 0) for n in range(100)]
    after = [record("letters", str(n), n % 2 == 0 or n == 1) for n in range(100)]
    changed = accuracy.difference(before, after)["force_think"]
    assert (changed["won"], changed["lost"], changed["gain"].value) == (1, 0, 0.01)
    assert changed["gain"].error == pytest.approx(0.01)  # sqrt(0.01 * 0.99 / 99); that of each share is 0.05
    assert changed["skills"]["letters"] == changed["gain"]


def test_runs_of_one_mode_each_are_compared_across_the_modes() -> None:
    free = [record("letters", str(n), n % 2 == 0, forced=False) for n in range(10)]
    forced = [record("letters", str(n), True) for n in range(10)]
    changed = accuracy.difference(free, forced)
    assert list(changed) == ["no_force_think_to_force_think"]
    assert (changed["no_force_think_to_force_think"]["won"], changed["no_force_think_to_force_think"]["lost"]) == (5, 0)


def test_runs_without_a_common_question_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="no question in common"):
        accuracy.difference([record("letters", "a", True)], [record("letters", "b", True), record("letters", "a", True, forced=False)])
