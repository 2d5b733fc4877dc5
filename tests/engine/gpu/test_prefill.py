"""Chunks of a prompt on the road that is asked for, or that the cost model picks; types that cannot be streamed stay with the pool."""

from __future__ import annotations

import logging

import pytest
from gguf import GGMLQuantizationType as Type

from server.engine.gpu.prefill import PrefillExperts
from server.engine.gpu.roads import Mode
from server.engine.gpu.staging import Staging
from server.engine.kernels import plain_kernels
from server.engine.native import NativeOps
from tests.engine.gpu.expert_layers import CPU, Layer, check, make_chunk, make_layer


def prefill_of(native: NativeOps, mode: Mode, layers: list[Layer], ring_bytes: int = 1 << 24) -> PrefillExperts:
    prefill = PrefillExperts(native, plain_kernels(), CPU, Staging(CPU), mode, ring_bytes)
    prefill.prepare([layer.weights for layer in layers], 2, 40)
    return prefill


def run(prefill: PrefillExperts, layer: Layer, n: int) -> None:
    y, ids, weights, out = chunk = make_chunk(layer, n, 2)
    wanted, before = layer.wanted(*chunk), out.clone()
    prefill.begin(layer.weights.gate, layer.weights.up, layer.weights.down, y, ids, weights, out)()
    check(out, wanted, before, 2e-2)  # the pool rounds activations to int8


@pytest.mark.parametrize("mode", ["cpu", "stream", "split"])
def test_the_road_that_is_asked_for(native: NativeOps, mode: Mode) -> None:
    layers = [make_layer(native, (Type.Q8_0, Type.Q8_0), count=8, seed=seed) for seed in range(2)]
    prefill = prefill_of(native, mode, layers)
    for n in (30, 1, 40):
        for layer in layers:
            run(prefill, layer, n)
    assert prefill.taken == {mode: 6}
    prefill.close()


def test_auto_takes_what_the_log_says(native: NativeOps, caplog: pytest.LogCaptureFixture) -> None:
    layers = [make_layer(native, (Type.Q8_0, Type.Q8_0), count=8)]
    with caplog.at_level(logging.INFO):
        prefill = prefill_of(native, "auto", layers)
    run(prefill, layers[0], 40)
    (road,) = prefill.taken
    assert f"{road} from " in caplog.text
    prefill.close()


def test_types_that_cannot_be_streamed_stay_with_the_pool(native: NativeOps, caplog: pytest.LogCaptureFixture) -> None:
    tiled = make_layer(native, (Type.Q8_0, Type.Q8_0), ffn=256, hidden=256)
    rows, more = (make_layer(native, (Type.IQ3_S, Type.IQ3_S), ffn=256, hidden=256, seed=seed) for seed in range(2))
    with caplog.at_level(logging.INFO):
        prefill = prefill_of(native, "stream", [tiled, rows, more])
    assert "2 of 3 layers of experts are computed by the CPU, since experts of type IQ3_S stay in the file's order" in caplog.text
    run(prefill, tiled, 9)
    run(prefill, rows, 9)
    assert prefill.taken == {"stream": 1, "cpu": 1}
    prefill.close()


def test_a_ring_that_is_too_small_leaves_all_to_the_pool(native: NativeOps, caplog: pytest.LogCaptureFixture) -> None:
    layer = make_layer(native, (Type.Q8_0, Type.Q8_0))
    with caplog.at_level(logging.INFO):
        prefill = prefill_of(native, "auto", [layer], ring_bytes=1000)
    assert "of the ring" in caplog.text
    run(prefill, layer, 9)
    assert prefill.taken == {"cpu": 1}
    prefill.close()
