"""Nodes of memory: what the kernel's files say, which CPUs work where, what is refused; and a model that runs over pretended nodes as it does without."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as T
from torch import Tensor

from server.config import EngineConfig, Numa
from server.engine import native, numa
from server.engine.gguf.quants import random_blocks
from server.engine.gguf.reader import GGUFFile
from server.engine.loader import load_model
from server.engine.native import NativeOps, open_ops
from server.engine.numa import Node, nodes_here, parse_list, read_nodes, seats, share_threads
from server.engine.protocol import Step
from server.errors import ConfigError, DeviceError
from tests.engine.oracle import PAGES, TOKENS, relative
from tests.engine.tiny_models import write_tiny

CPUS = sorted(os.sched_getaffinity(0))
LIST = [CPUS[i % len(CPUS)] for i in range(4)]


def tree(root: Path, nodes: dict[int, str], memory: str, free_kb: int = 1 << 20) -> Path:
    """/sys/devices/system/node of a machine with these nodes' CPUs, each with a quarter of its free memory in files."""
    for node, cpus in nodes.items():
        directory = root / f"node{node}"
        directory.mkdir(parents=True)
        (directory / "cpulist").write_text(cpus + "\n")
        amounts = {"MemTotal": 1 << 30, "MemFree": 3 * free_kb // 4, "Active(file)": free_kb // 8, "Inactive(file)": free_kb // 8, "AnonPages": 1 << 30}
        (directory / "meminfo").write_text("".join(f"Node {node} {name}: {kb:>12} kB\n" for name, kb in amounts.items()))
    (root / "has_memory").write_text(memory + "\n")
    return root


def pretended(root: Path, count: int, free_kb: int = 1 << 20) -> list[Node]:
    """Nodes that all lie in the machine's first one, as far as the kernel is concerned."""
    return [Node(nodes_here()[0].memory, (cpu,), tree(root / str(i), {0: str(cpu)}, "0", free_kb) / "node0") for i, cpu in enumerate(LIST[:count])]


# --- the kernel's files ------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"), [("0", [0]), ("0-3\n", [0, 1, 2, 3]), ("0-1,8,10-11", [0, 1, 8, 10, 11]), ("\n", []), ("0-63,128-191", [*range(64), *range(128, 192)])]
)
def test_the_kernels_lists(text: str, numbers: list[int]) -> None:
    assert parse_list(text) == numbers


def test_only_nodes_with_memory_and_with_cpus_of_ours(tmp_path: Path) -> None:
    root = tree(tmp_path / "node", {0: "0-3", 1: "4-7", 2: "", 3: "8-11", 5: "12-15"}, "0-2,5")
    nodes = read_nodes(range(2, 12), root=root)
    assert [(node.memory, node.cpus) for node in nodes] == [(0, (2, 3)), (1, (4, 5, 6, 7))]  # 2 has no CPUs, 3 no memory, 5 none of ours
    assert [node.memory for node in read_nodes(range(16), [1, 5], root)] == [1, 5]  # a cpuset's memory
    assert read_nodes(range(16), root=tmp_path / "nothing") == []


def test_free_memory_is_what_is_free_and_what_files_hold(tmp_path: Path) -> None:
    root = tree(tmp_path / "node", {0: "0"}, "0", free_kb=800)
    assert read_nodes([0], root=root)[0].free() == 800 << 10


def test_this_machine_has_nodes() -> None:
    """Every CPU of ours has one, and its memory is not empty."""
    nodes = read_nodes(CPUS)
    assert sorted(cpu for node in nodes for cpu in node.cpus) == CPUS
    assert all(node.free() > 1 << 20 for node in nodes)


def test_nodes_can_be_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESPAN_NUMA_NODES", f"{CPUS[0]}:{CPUS[-1]}:{CPUS[0]},{CPUS[-1]}")
    real = read_nodes(CPUS)
    nodes = nodes_here()
    assert [node.cpus for node in nodes] == [(CPUS[0],), (CPUS[-1],), (CPUS[0], CPUS[-1])]
    assert nodes[0].memory == real[0].memory
    for wrong in ("x", "0:", "0:100000", "0-"):
        monkeypatch.setenv("MOESPAN_NUMA_NODES", wrong)
        with pytest.raises(DeviceError, match=rf"MOESPAN_NUMA_NODES is '{wrong}', but must list the CPUs of each node, as 0-3:4-7 does.*Unset it\."):
            nodes_here()


# --- who works where ---------------------------------------------------------


def machine(*cpus: Sequence[int]) -> list[Node]:
    return [Node(i, tuple(own), Path()) for i, own in enumerate(cpus)]


@pytest.mark.parametrize(
    ("cpus", "count", "shares"),
    [
        ((range(8), range(8, 16)), 15, [8, 7]),
        ((range(8), range(8, 16)), 16, [8, 8]),
        ((range(8), range(8, 16)), 99, [8, 8]),
        ((range(8), range(8, 16)), 2, [1, 1]),
        ((range(2), range(8, 16)), 9, [2, 7]),  # the first has no more
        ((range(4), range(4, 8), range(8, 12), range(12, 16)), 10, [3, 3, 2, 2]),
        ((range(8),), 5, [5]),
    ],
)
def test_threads_are_shared_evenly(cpus: tuple[range, ...], count: int, shares: list[int]) -> None:
    taken = share_threads(machine(*cpus), count)
    assert [len(own) for own in taken] == shares
    assert taken == [list(own[:share]) for own, share in zip(cpus, shares, strict=True)]


def test_auto_shards_where_there_are_several_nodes() -> None:
    two, one = machine(range(8), range(8, 16)), machine(range(8))
    cpus, spread = seats("auto", two, 15, 16)
    assert [len(own) for own in cpus] == [8, 7]
    assert spread is not None
    assert (spread.mode, spread.threads) == ("shard", (8, 7))
    assert seats("auto", one, None, 8) == ([], None)
    assert seats("auto", two, 1, 16) == ([], None)
    assert seats("auto", [], None, 8) == ([], None)
    assert seats("off", two, None, 16) == ([], None)
    assert [len(own) for own in seats("shard", one, None, 6)[0]] == [6]  # a cgroup's quota of 6
    replicated = seats("replicate", two, None, 16)[1]
    assert replicated is not None
    assert replicated.mode == "replicate"


def test_what_cannot_be_is_refused_with_a_sentence() -> None:
    two = machine(range(8), range(8, 16))
    with pytest.raises(ConfigError, match=r"--numa shard needs a thread on each of the 2 memory nodes, but there are 1\. Use a larger --cpu_infer"):
        seats("shard", two, 1, 16)
    with pytest.raises(DeviceError, match=r"--numa replicate: the kernel shows no memory nodes.*Use --numa off"):
        seats("replicate", [], None, 16)
    with pytest.raises(DeviceError, match=r"There are 17 memory nodes, and at most 16 are supported\. Use --numa off"):
        seats("auto", machine(*([i] for i in range(17))), None, 17)


# --- NativeOps ---------------------------------------------------------------


def experts(ops: NativeOps, width: int, hidden: int = 256) -> list[native.Matrix]:
    """gate, up and down of 4 experts in Q8_0: 34 bytes for 32 weights."""
    rng = np.random.default_rng(0)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return [ops.matrix(int(T.Q8_0), rows, cols, random_blocks(T.Q8_0, 4 * rows, cols, 0.1, rng).reshape(-1).data, 4) for rows, cols in shapes]


@pytest.mark.parametrize("mode", ["shard", "replicate"])
def test_bytes_of_each_node_are_told_before_anything_is_loaded(mode: Numa, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ops = open_ops(4, mode, pretended(tmp_path, 2))
    try:
        assert (ops.numa, ops.threads) == (mode, 2)
        for _ in range(10):
            ops.spread_experts(*experts(ops, 1024))
        ops.check_nodes()
    finally:
        ops.close()
    nbytes = 10 * 3 * 4 * 1024 * 256 // 32 * 34  # of all
    on_each = f"{nbytes / (2 if mode == 'shard' else 1) / 1e9:.3g} GB on node {nodes_here()[0].memory} (1 threads)"
    how = "slices of all experts" if mode == "shard" else "a copy of all experts"
    assert f"NUMA, {mode}: {how}; {on_each}, {on_each}." in caplog.text


def test_an_uneven_split_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ops = open_ops(4, "shard", pretended(tmp_path, 2))
    try:
        ops.spread_experts(*experts(ops, 96))
        ops.check_nodes()
    finally:
        ops.close()
    assert "(1 threads). Their types and shapes cannot be cut evenly." in caplog.text


@pytest.mark.parametrize(("mode", "instead"), [("shard", "--numa off, where pages"), ("replicate", "--numa shard, where each node")])
def test_a_node_that_is_too_small_is_refused_with_a_sentence(mode: Numa, instead: str, tmp_path: Path) -> None:
    """Two nodes that share one memory of 1 MB: a little less than each of them takes would do for one of them."""
    ops = open_ops(2, mode, pretended(tmp_path, 2, free_kb=1000))
    try:
        ops.spread_experts(*experts(ops, 256))  # 0.84 MB
        if mode == "shard":
            ops.check_nodes()
            ops.spread_experts(*experts(ops, 512))  # what was checked before is there already
        with pytest.raises(DeviceError, match=rf"NUMA node \d+ has 0.00102 GB of memory left, but its part of the experts takes 0.0016\d GB\. Use {instead}"):
            ops.check_nodes()
    finally:
        ops.close()


def test_a_kernel_that_binds_no_pages_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Module:
        bind_error = staticmethod(lambda node: "Operation not permitted")

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    real = native._module()
    monkeypatch.setattr(native, "_module", Module)
    open_ops(2, "shard", pretended(tmp_path, 2)).close()
    assert "NUMA: pages cannot be bound to nodes here (Operation not permitted), so they lie where" in caplog.text


# --- a model -----------------------------------------------------------------


def logits(path: Path, mode: Numa, cpu_infer: int = 4) -> Tensor:
    """Of a prompt in one step, then of a token after it."""
    loaded = load_model(GGUFFile.open(path), EngineConfig(cpu_infer=cpu_infer, cache_type="f32", numa=mode))
    try:
        with torch.inference_mode():
            prompt = loaded.engine.logits(Step(TOKENS[:-1], 0, PAGES, None))
            return torch.cat([prompt, loaded.engine.logits(Step(TOKENS[-1:], len(TOKENS) - 1, PAGES, None))])
    finally:
        loaded.engine.close()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_a_model_over_pretended_nodes_says_the_same(family: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats: what differs is the order of the sums. (With quantised experts a router's near-tie may flip.)"""
    write_tiny(tmp_path / "m.gguf", family)
    alone = logits(tmp_path / "m.gguf", "auto", 2)
    monkeypatch.setenv("MOESPAN_NUMA_NODES", ":".join(map(str, LIST[:count])))
    assert relative(logits(tmp_path / "m.gguf", "auto"), alone) < 1e-5
    assert torch.equal(logits(tmp_path / "m.gguf", "replicate"), alone)
    assert torch.equal(logits(tmp_path / "m.gguf", "off", 2), alone)


def test_a_model_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "m.gguf", "mixtral")
    monkeypatch.setattr(numa.Node, "free", lambda node: 1000)
    monkeypatch.setenv("MOESPAN_NUMA_NODES", f"{CPUS[0]}:{CPUS[-1]}")
    seen: list[int] = []
    with pytest.raises(DeviceError, match=r"NUMA node \d+ has 1e-06 GB of memory left"):
        load_model(GGUFFile.open(tmp_path / "m.gguf"), EngineConfig(cpu_infer=2), progress=lambda done, total: seen.append(done))
    assert seen == []
