"""Constraints and the engine together: whatever the temperature, the default model's replies fit the schema that was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from server.cli.embedded import embedded_path
from server.config import EngineConfig
from server.engine.engine import LocalEngine
from server.engine.gguf.reader import GGUFFile
from server.engine.loader import load_model
from server.engine.protocol import Step
from server.text.grammar import GrammarSpec, JsonSchema, Regex, compile_constraint
from server.text.load import load_template, load_tokenizer
from server.text.reasoning import ReasoningParser
from server.text.tokenizer import Tokenizer
from server.types import SamplingParams

SUM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "terms": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 2, "maxItems": 3},
        "operation": {"enum": ["sum", "product"]},
        "remark": {"type": "string", "maxLength": 30},
    },
    "required": ["terms", "operation", "remark"],
    "additionalProperties": False,
}


class Model:
    """The default model and its tokenizer."""

    def __init__(self) -> None:
        file = GGUFFile.open(embedded_path("tiny-r1"))
        self.engine: LocalEngine = load_model(file, EngineConfig(cpu_infer=1, cache_lens=512)).engine
        self.tokenizer: Tokenizer = load_tokenizer(file.metadata)
        self.template = load_template(file.metadata, self.tokenizer)
        self.engine.start()

    def reply(self, spec: GrammarSpec, params: SamplingParams, *, thought: str | None) -> str:
        """The answer to a question, behind a thought that the prompt has closed already, or behind the model's own, for which it has opened no tag."""
        question = self.template.render([{"role": "user", "content": "What is 34 + 57?"}])
        prompt = question if thought is None else f"{question}<think>\n{thought}</think>\n\n"
        ids = self.tokenizer.encode_prompt(prompt)
        sampler = self.engine.new_sampler(params, tuple(ids), compile_constraint(spec, self.tokenizer, after_think=False))
        pages, done, text = tuple(range(self.engine.num_pages)), 0, b""
        while len(ids) < 500:
            drawn = self.engine.step(Step(tuple(ids[done:]), done, pages, sampler))
            assert drawn is not None
            if drawn.token_id in self.tokenizer.stop_ids:
                return answer_of(text.decode())
            text += self.tokenizer.token_bytes(drawn.token_id)
            done = len(ids)
            ids.append(drawn.token_id)
        raise AssertionError(f"the reply did not end: {text!r}")


def answer_of(reply: str) -> str:
    parser = ReasoningParser(opened=False)
    return "".join([text for kind, text in parser.push(reply) + parser.flush() if kind == "content"])


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    loaded = Model()
    yield loaded
    loaded.engine.close()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5, 5.0])
def test_a_reply_fits_its_schema_at_any_temperature(model: Model, temperature: float) -> None:
    for seed in range(3):
        text = model.reply(JsonSchema(SUM), SamplingParams(temperature=temperature, seed=seed, top_p=0.99), thought="a sum\n")
        jsonschema.validate(json.loads(text), SUM)


def test_the_model_thinks_freely_and_then_answers_in_form(model: Model) -> None:
    """Greedy, the thought is as without a constraint, so that the answer knows the sum; left to itself the model would end it with a full stop."""
    assert model.reply(Regex(r"The answer is [0-9]{2}"), SamplingParams(temperature=0.0), thought=None) == "The answer is 91"
