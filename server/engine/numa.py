"""Nodes of memory (NUMA) and the experts: how they are spread, which CPUs work on each node, whether each has room for its part.

A core reads its own node's memory about twice as fast as another's, and experts are all that a token reads from RAM. So with two nodes or more each
holds a part of every layer's experts, in pages that are bound to it, and its own threads work on that:

    shard      a slice of every expert's intermediate dimension: memory is used once, and each token keeps all nodes busy alike
    replicate  a copy of everything: nothing is added up between nodes, for as many times the memory
    off        pages lie where they come to lie

MOESPAN_NUMA_NODES pretends that there are nodes: the CPUs of each, as in 0-3,8:4-7 for two. Their memory is that of the node which their first CPU really
has. A CPU may be in several, so that four nodes can be tried on a machine with two CPUs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from server.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from server.config import Numa

_log = logging.getLogger(__name__)

SYSTEM = Path("/sys/devices/system/node")
STATUS = Path("/proc/self/status")
MOST = 16  # nodes that the native pool takes
_RECLAIMABLE = ("MemFree:", "Active(file):", "Inactive(file):", "SReclaimable:")  # of meminfo: what a program can get without swapping


@dataclass(frozen=True, slots=True)
class Node:
    """A node with memory, and those of its CPUs that this process may use."""

    memory: int  # the kernel's number of it
    cpus: tuple[int, ...]
    directory: Path  # /sys/devices/system/node/nodeN

    def free(self) -> int:
        """Bytes that can be had from its memory now: what is free, and what the kernel holds of files."""
        lines = (line.split() for line in (self.directory / "meminfo").read_text().splitlines())  # Node 0 MemFree:  123 kB
        return sum(int(words[3]) << 10 for words in lines if words[2] in _RECLAIMABLE)


@dataclass(slots=True)
class Spread:
    """How experts are spread over nodes. `add` counts what will be taken there, and `check` looks whether there is as much."""

    mode: Literal["shard", "replicate"]
    nodes: tuple[Node, ...]
    threads: tuple[int, ...]  # of each node
    _taken: list[int]  # bytes that are not checked yet

    @classmethod
    def over(cls, mode: Literal["shard", "replicate"], nodes: Sequence[Node], threads: Sequence[int]) -> Spread:
        return cls(mode, tuple(nodes), tuple(threads), [0] * len(nodes))

    def add(self, nbytes: Sequence[int]) -> None:
        """A matrix takes so much of each node."""
        self._taken = [taken + more for taken, more in zip(self._taken, nbytes, strict=True)]

    def check(self) -> None:
        """Tell the log what each node takes. Raises DeviceError where one has less than that."""
        taken, self._taken = self._taken, [0] * len(self.nodes)
        if not any(taken):
            return
        of_each = ", ".join(f"{_gb(nbytes)} on node {node.memory} ({n} threads)" for nbytes, node, n in zip(taken, self.nodes, self.threads, strict=True))
        how = "slices of all experts" if self.mode == "shard" else "a copy of all experts"
        uneven = "" if max(taken) <= 1.02 * min(taken) else ". Their types and shapes cannot be cut evenly"
        _log.info("NUMA, %s: %s; %s%s.", self.mode, how, of_each, uneven)
        for node in {node.memory: node for node in self.nodes}.values():
            self._check_node(node, sum(nbytes for nbytes, other in zip(taken, self.nodes, strict=True) if other.memory == node.memory))

    def _check_node(self, node: Node, needed: int) -> None:
        if needed <= (free := node.free()):
            return
        instead = "--numa shard, where each node holds its slice only" if self.mode == "replicate" else "--numa off, where pages lie wherever there is room"
        raise DeviceError(
            f"NUMA node {node.memory} has {_gb(free)} of memory left, but its part of the experts takes {_gb(needed)}. "
            f"Use {instead}, close other programs, or take a smaller quantisation of the model."
        )


def seats(wanted: Numa, nodes: Sequence[Node], count: int | None, limit: int) -> tuple[list[list[int]], Spread | None]:
    """The CPUs of each node's threads and how experts are spread; `[]` and None where nodes do not count.

    `count` is cpu_infer, None for all CPUs; `limit` what the cgroups allow. Raises ConfigError and DeviceError with a sentence.
    """
    if wanted == "off" or (wanted == "auto" and len(nodes) < 2):
        return [], None
    if not nodes:
        raise DeviceError(f"--numa {wanted}: the kernel shows no memory nodes in {SYSTEM}. Use --numa off.")
    if len(nodes) > MOST:
        raise DeviceError(f"There are {len(nodes)} memory nodes, and at most {MOST} are supported. Use --numa off.")
    listed = [cpu for node in nodes for cpu in node.cpus]
    limit = limit if len(set(listed)) == len(listed) else len(listed)  # CPUs that are in several nodes are pretended
    threads = min(count or limit, limit)
    if threads < len(nodes):
        if wanted == "auto":
            _log.info("NUMA: off, since %d threads cannot work on %d nodes.", threads, len(nodes))
            return [], None
        raise ConfigError(
            f"--numa {wanted} needs a thread on each of the {len(nodes)} memory nodes, but there are {threads}. Use a larger --cpu_infer, or --numa off."
        )
    cpus = share_threads(nodes, threads)
    return cpus, Spread.over("replicate" if wanted == "replicate" else "shard", nodes, [len(own) for own in cpus])


def share_threads(nodes: Sequence[Node], count: int) -> list[list[int]]:
    """The CPUs that threads are pinned to, as even over the nodes as they can be: 15 on two nodes are 8 and 7. At most all there are."""
    counts = [0] * len(nodes)
    for _ in range(min(count, sum(len(node.cpus) for node in nodes))):
        counts[min((i for i, node in enumerate(nodes) if counts[i] < len(node.cpus)), key=lambda i: (counts[i], i))] += 1
    return [list(node.cpus[:own]) for node, own in zip(nodes, counts, strict=True)]


# --- Which nodes there are ---------------------------------------------------


def nodes_here() -> list[Node]:
    """The nodes that this process may use, or those that MOESPAN_NUMA_NODES pretends. Raises DeviceError where that makes no sense."""
    real = read_nodes(os.sched_getaffinity(0), _memory_allowed())
    pretended = os.environ.get("MOESPAN_NUMA_NODES")
    return real if not pretended else _pretend(pretended, real)


def read_nodes(cpus: Collection[int], memory: Collection[int] | None = None, root: Path = SYSTEM) -> list[Node]:
    """The kernel's nodes that have memory and some of these CPUs, in order; [] where it does not tell. `memory`: only these nodes."""
    try:
        with_memory = parse_list((root / "has_memory").read_text())
        owned = {n: parse_list((root / f"node{n}" / "cpulist").read_text()) for n in with_memory if memory is None or n in memory}
    except OSError:
        return []
    usable = {n: tuple(cpu for cpu in own if cpu in cpus) for n, own in owned.items()}
    return [Node(n, own, root / f"node{n}") for n, own in usable.items() if own]


def parse_list(text: str) -> list[int]:
    """The kernel's lists of numbers: 0-3,8 is 0, 1, 2, 3, 8."""
    numbers: list[int] = []
    for run in text.strip().split(","):
        first, dash, last = run.partition("-")
        numbers += range(int(first), int(last if dash else first) + 1) if run else ()
    return numbers


def _memory_allowed() -> list[int] | None:
    """The nodes whose memory cpusets leave to this process; None where the kernel does not tell."""
    try:
        return next(parse_list(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("Mems_allowed_list:"))
    except (OSError, StopIteration, IndexError):
        return None


def _pretend(text: str, real: Sequence[Node]) -> list[Node]:
    try:
        owned = [parse_list(cpus) for cpus in text.split(":")]
    except ValueError:
        owned = [[]]
    homes = {cpu: node for node in real for cpu in node.cpus}
    if not all(cpus and set(cpus) <= homes.keys() for cpus in owned):
        raise DeviceError(f"MOESPAN_NUMA_NODES is {text!r}, but must list the CPUs of each node, as 0-3:4-7 does, all of them among {sorted(homes)}. Unset it.")
    return [Node(homes[cpus[0]].memory, tuple(cpus), homes[cpus[0]].directory) for cpus in owned]


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"
