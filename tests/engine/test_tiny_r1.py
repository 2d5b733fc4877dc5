"""The default model, shipped with the package: its logits against transformers' DeepSeek-V3 on the same weights, and what it answers.

The weights go from the file to transformers by the `gguf` package's dequantisation, so that neither our reader of blocks nor the recipe's export
is on both sides. transformers has no multi-token prediction block; ours does not run it either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as T
from numpy.typing import NDArray
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from recipes.tiny_r1.export import gguf_metadata, hf_config
from recipes.tiny_r1.shape import Shape
from server.bench.questions import SKILLS, Question, questions
from server.bench.windows import chat_windows
from server.cli.embedded import embedded_path
from server.config import EngineConfig
from server.engine.engine import LocalEngine
from server.engine.gguf.names import gguf_name
from server.engine.gguf.reader import GGUFFile
from server.engine.gguf.writer import TensorData, write_gguf
from server.engine.kv_cache import PAGE_SIZE
from server.engine.layers.reference import ReferenceOps
from server.engine.loader import load_model
from server.engine.native import NativeOps, open_ops
from server.engine.protocol import Step
from server.text.load import load_template, load_tokenizer
from server.text.template import ChatTemplate, force_think
from server.text.tokenizer import Tokenizer
from tests.engine.oracle import Runner, relative

FILE = GGUFFile.open(embedded_path("tiny-r1"))
Weights = dict[str, NDArray[np.float32]]


@dataclass
class Text:
    """The model's text side."""

    tokenizer: Tokenizer
    template: ChatTemplate

    def prompt(self, question: Question) -> list[int]:
        """Token ids up to and with a forced <think>."""
        return self.tokenizer.encode_prompt(force_think(self.template.render([{"role": "user", "content": question.prompt}])))


@pytest.fixture(scope="module")
def text() -> Text:
    tokenizer = load_tokenizer(FILE.metadata)
    return Text(tokenizer, load_template(FILE.metadata, tokenizer))


@pytest.fixture(scope="module")
def chats(text: Text) -> list[tuple[int, ...]]:
    """Held-out questions with their thinking, in tokens: one of each skill and language that fits the oracle's three pages."""
    return [window.ids for window in chat_windows(text.tokenizer, text.template, 16) if len(window.ids) <= 3 * PAGE_SIZE]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """The file's tensors in float32, as the gguf package reads them."""
    reader = gguf.GGUFReader(FILE.path)
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape.tolist()[::-1]) for tensor in reader.tensors}


@pytest.fixture(scope="module")
def transformers_model(weights: Weights) -> DeepseekV3ForCausalLM:
    """transformers' DeepSeek-V3 with the file's weights, float32."""
    config = DeepseekV3Config.from_dict(hf_config(Shape()), attn_implementation="eager", experts_implementation="eager")
    model = DeepseekV3ForCausalLM(config).float().eval()
    state = {name: torch.from_numpy(_joined(name, weights).copy()) for name in model.state_dict()}
    model.load_state_dict(state)
    return model


def _joined(name: str, weights: Weights) -> NDArray[np.float32]:
    """A parameter of transformers from the tensors that GGUF keeps apart."""
    stem, _, part = name.rpartition(".")
    if part == "gate_up_proj":
        return np.concatenate([weights[gguf_name("deepseek2", f"{stem}.{half}.weight")] for half in ("gate_proj", "up_proj")], axis=1)
    if stem.endswith("kv_b_proj"):  # GGUF has the keys' half transposed, for absorbed attention
        k, v = (weights[gguf_name("deepseek2", name.replace("kv_b_proj", f"{half}_b_proj"))] for half in "kv")
        return np.concatenate((k.swapaxes(1, 2), v), axis=1).reshape(-1, k.shape[1])
    if part == "down_proj":
        name += ".weight"
    return weights[gguf_name("deepseek2", name.replace("correction_bias", "correction.bias"))]


@pytest.fixture(scope="module")
def expected(transformers_model: DeepseekV3ForCausalLM, chats: list[tuple[int, ...]]) -> list[Tensor]:
    """transformers' logits [tokens, vocab] of each chat."""
    with torch.inference_mode():
        return [transformers_model(torch.tensor([ids])).logits[0] for ids in chats]


@pytest.fixture(scope="module")
def float_file(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with every tensor expanded to F32."""
    path = tmp_path_factory.mktemp("tiny-r1") / "tiny-r1-F32.gguf"
    write_gguf(path, FILE.metadata, (TensorData.from_array(name, values, T.F32) for name, values in weights.items()))
    return path


@pytest.fixture(scope="module")
def ops() -> Iterator[NativeOps]:
    ops = open_ops(2)
    yield ops
    ops.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    loaded = load_model(FILE, EngineConfig(cpu_infer=2, cache_lens=512))
    yield loaded.engine
    loaded.engine.close()


# --- The file ----------------------------------------------------------------


def test_the_file_is_what_the_recipe_makes() -> None:
    keys = gguf_metadata(Shape())
    assert {key: FILE.metadata[key] for key in keys} == pytest.approx(keys)  # GGUF's floats have 32 bits
    assert FILE.nbytes <= 24e6


# --- Logits ------------------------------------------------------------------


def test_float32_logits_are_those_of_transformers(float_file: Path, chats: list[tuple[int, ...]], expected: list[Tensor], ops: NativeOps) -> None:
    """All weights in float32: only the order of sums differs, through 6 layers. Nothing is forced: a router that chose otherwise would show."""
    runner = Runner(float_file, ops)
    for ids, logits in zip(chats, expected, strict=True):
        assert relative(runner.run(tokens=ids), logits) < 1e-4


def test_the_plain_twin_reads_the_same_from_the_shipped_blocks(chats: list[tuple[int, ...]], expected: list[Tensor]) -> None:
    runner = Runner(FILE.path, ReferenceOps(torch.float64))
    assert relative(runner.run(tokens=chats[0]), expected[0]) < 1e-4


def test_int8_activations_stay_within_their_rounding(chats: list[tuple[int, ...]], expected: list[Tensor], ops: NativeOps) -> None:
    """2e-2 as everywhere (see test_models.py), over all tokens: a near-tie between experts may tip for one of them."""
    runner = Runner(FILE.path, ops)
    got = torch.cat([runner.run(tokens=ids) for ids in chats])
    assert relative(got, torch.cat(expected)) < 2e-2


# --- Answers -----------------------------------------------------------------


def greedy(engine: LocalEngine, prompt: list[int], stop: frozenset[int], most: int = 300) -> list[int]:
    pages, reply, fed = tuple(range(engine.num_pages)), list[int](), prompt
    while len(reply) < most:
        start = len(prompt) + len(reply) - len(fed)
        token = int(engine.logits(Step(tuple(fed), start, pages, None))[-1].argmax())
        if token in stop:
            break
        reply.append(token)
        fed = [token]
    return reply


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("skill", SKILLS)
def test_it_thinks_as_transformers_does_and_answers(
    skill: str, language: str, text: Text, engine: LocalEngine, transformers_model: DeepseekV3ForCausalLM
) -> None:
    """A held-out question of each kind: after each of our tokens, from the quantised file, transformers in float32 would go on as we did."""
    (question,) = questions("test", skill, language, 1, seed=11)
    prompt, stop = text.prompt(question), frozenset(text.tokenizer.stop_ids)
    reply = greedy(engine, prompt, stop)
    with torch.inference_mode():
        *theirs, last = transformers_model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 :].argmax(-1).tolist()
    assert theirs == reply
    assert last in stop
    assert question.accepts(text.tokenizer.decode(reply))
