"""How many questions a model answers: asked one by one as a client of the server would, greedily, and checked by the questions' own checker.

The prompt is the chat template's, with --force_think or without; the reply goes through the scheduler, the detokenizer and the reasoning parser.
What counts is the answer after the thinking: a reply that never stops thinking has none.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from server.api.serving import Loaded
from server.bench.estimates import Estimate, mean, stratified
from server.bench.journal import Json
from server.bench.questions import LANGUAGES, SKILLS, Question, questions
from server.errors import ConfigError
from server.scheduler.reply import Finished, Piece, ReplyText, SyncReply, TextRules
from server.text.template import force_think, opens_think
from server.types import GenerateRequest, SamplingParams

MOST = 2000  # of letters, the skill with the fewest, some 3,000 are held out
MODES = {True: "force_think", False: "no_force_think"}
Asked = tuple[Question, bool]  # a question, and whether thinking is forced


def plan(each: int, modes: Sequence[bool], seed: int) -> list[Asked]:
    """`each` held-out questions of every skill and language, in every mode; in turns, so that a part of a run is a fair sample. Raises ConfigError."""
    if each > MOST:
        raise ConfigError(f"--each {each} is more questions of each skill and language than can be told apart. Ask for {MOST} or fewer.")
    cells = [questions("test", skill, language, each, seed) for skill in SKILLS for language in LANGUAGES]
    return [(question, forced) for turn in zip(*cells, strict=True) for question in turn for forced in modes]


class Examiner:
    """Asks a loaded model."""

    def __init__(self, loaded: Loaded, max_new_tokens: int) -> None:
        self._loaded, self._max_new_tokens = loaded, max_new_tokens
        self._ids = (f"eval-{n}" for n in itertools.count(1))

    def ask(self, asked: Asked) -> Json:
        """The record of one question: what was asked, what came, and whether it was right."""
        question, forced = asked
        pieces, end = self._reply(question.prompt, forced)
        reply, thinking = ("".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("content", "reasoning"))
        return {
            "skill": question.skill,
            "language": question.language,
            "force_think": forced,
            "right": question.accepts(reply),
            "prompt": question.prompt,
            "answer": question.answer,
            "thinking": thinking,
            "reply": reply,
            "tokens": end.completion_tokens,
            "finish_reason": end.reason.value,
        }

    def _reply(self, message: str, forced: bool) -> tuple[list[Piece], Finished]:
        request, text = self._prepared(message, forced)
        with closing(SyncReply(self._loaded.service, request, text)) as reply:
            parts = list(reply)
        end = parts[-1]
        assert isinstance(end, Finished), "the end of a reply is its last part"
        return [part for part in parts if isinstance(part, Piece)], end

    def _prepared(self, message: str, forced: bool) -> tuple[GenerateRequest, ReplyText]:
        tokenizer = self._loaded.tokenizer
        prompt = self._loaded.template.render([{"role": "user", "content": message}])
        if forced:
            prompt = force_think(prompt)
        ids = tuple(tokenizer.encode_prompt(prompt))
        request = GenerateRequest(next(self._ids), ids, self._max_new_tokens, SamplingParams(temperature=0.0), tokenizer.stop_ids)
        return request, ReplyText(tokenizer, TextRules(reasoning="opened" if opens_think(prompt) else "closed"), len(ids))


# --- Results -----------------------------------------------------------------


def summary(records: Sequence[Json]) -> dict[str, Any]:
    """Shares of right answers by mode, skill and language; with both modes, what forcing changes on the same questions."""
    modes = {name: [record for record in records if record["force_think"] is forced] for forced, name in MODES.items()}
    result: dict[str, Any] = {name: _mode(asked) for name, asked in modes.items() if asked}
    if all(modes.values()):
        result["gained_by_force_think"] = _gained(_right(modes["no_force_think"]), _right(modes["force_think"]))
    return result


def difference(a: Sequence[Json], b: Sequence[Json]) -> dict[str, Any]:
    """What the second run gained on the questions that both were asked, by mode; where they have no mode in common, from the first's to the second's.

    Raises ConfigError where there are none.
    """
    runs = [{name: _right([record for record in run if record["force_think"] is forced]) for forced, name in MODES.items()} for run in (a, b)]
    result = {name: _gained(runs[0][name], runs[1][name]) for name in MODES.values() if set(runs[0][name]) & set(runs[1][name])}
    if not result:
        (of_a, of_b) = ([name for name in MODES.values() if run[name]] for run in runs)
        if len(of_a) == len(of_b) == 1 and set(runs[0][of_a[0]]) & set(runs[1][of_b[0]]):
            return {f"{of_a[0]}_to_{of_b[0]}": _gained(runs[0][of_a[0]], runs[1][of_b[0]])}
        raise ConfigError("The two runs have no question in common: compare runs with the same --seed.")
    return result


def _mode(records: Sequence[Json]) -> dict[str, Any]:
    cells = {(skill, language): found for skill in SKILLS for language in LANGUAGES if (found := _share(records, skill, language))}
    return {
        "all": stratified(list(cells.values())),
        "thinking": mean([bool(record["thinking"]) for record in records]),  # the share of replies that think at all
        "tokens": mean([record["tokens"] for record in records]),  # of a reply
        "cut": sum(record["finish_reason"] == "length" for record in records),  # replies that ran into --max_new_tokens or --cache_lens
        "languages": {language: stratified(_of(cells, 1, language)) for language in LANGUAGES if _of(cells, 1, language)},
        "skills": {skill: {"all": stratified(_of(cells, 0, skill)), **_by_language(cells, skill)} for skill in SKILLS if _of(cells, 0, skill)},
    }


Cells = dict[tuple[str, str], Estimate]


def _share(records: Sequence[Json], skill: str, language: str) -> Estimate | None:
    right = [record["right"] for record in records if (record["skill"], record["language"]) == (skill, language)]
    return mean(right) if right else None


def _of(cells: Cells, place: int, name: str) -> list[Estimate]:
    return [share for key, share in cells.items() if key[place] == name]


def _by_language(cells: Cells, skill: str) -> dict[str, Estimate]:
    return {language: share for (of, language), share in cells.items() if of == skill}


Right = dict[tuple[str, str, str], bool]  # skill, language, prompt -> whether it was answered


def _right(records: Sequence[Json]) -> Right:
    return {(record["skill"], record["language"], record["prompt"]): record["right"] for record in records}


def _gained(before: Right, after: Right) -> dict[str, Any]:
    """Paired: the mean of the differences question by question, whose error is smaller than that of two separate shares."""
    strata: dict[tuple[str, str], list[int]] = defaultdict(list)
    for key in before:
        if key in after:
            strata[key[:2]].append(int(after[key]) - int(before[key]))
    changes = list(itertools.chain.from_iterable(strata.values()))
    gains = {cell: mean(changed) for cell, changed in strata.items()}
    return {
        "gain": stratified(list(gains.values())),
        "won": changes.count(1),
        "lost": changes.count(-1),
        "skills": {skill: stratified(_of(gains, 0, skill)) for skill in SKILLS if _of(gains, 0, skill)},
    }


def progress_line(records: Sequence[Json]) -> str:
    """The share so far, for a progress bar."""
    return f"{sum(record['right'] for record in records) / len(records):.1%} right" if records else ""
