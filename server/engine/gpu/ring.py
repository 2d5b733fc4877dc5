"""The ring that experts go through: how its memory is cut, and what orders the copies into it and the products that read it.

For each group of experts:

    fill(slot)      copy stream: its bytes, once what the slot held has been opened
    take(slot)      compute stream: wait until it is filled
    release(slot)   compute stream: opened, so that it can be filled again
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.engine.gpu.matrix import DeviceMatrix
from server.engine.gpu.sections import Section

SLOTS = 3
_ALIGN = 256  # of what lies in the ring
Copy = tuple[Tensor, Tensor, bool]  # to, source, whether the source is page-locked


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ring's memory is cut for a layer: SLOTS slots of at most `experts`, and behind them the scratch for opened weights."""

    experts: int
    slot_bytes: int

    @classmethod
    def of(cls, sections: Sequence[Section], ring_bytes: int, experts: int) -> Layout | None:
        """For groups of at most `experts`, fewer where the ring is small; None where not even one fits."""
        layouts = (cls._for(sections, count) for count in range(experts, 0, -1))
        return next((layout for layout in layouts if layout.scratch + layout.experts * _opened_bytes(sections) <= ring_bytes), None)

    @classmethod
    def needed_bytes(cls, sections: Sequence[Section]) -> int:
        """The smallest ring that serves such experts, one at a time."""
        return cls._for(sections, 1).scratch + _opened_bytes(sections)

    @classmethod
    def _for(cls, sections: Sequence[Section], count: int) -> Layout:
        return cls(count, max(sum(_aligned(count * matrix.each) for matrix in section) for section in sections))

    @property
    def scratch(self) -> int:
        """Where it begins."""
        return SLOTS * self.slot_bytes


@dataclass(frozen=True, slots=True)
class Slot:
    """A group's place in the ring, and where its weights are opened. Down is opened where gate was, which has done its work by then."""

    parts: tuple[Tensor, Tensor, Tensor]  # uint8: gate, up and down, expert behind expert
    gate_up: list[tuple[DeviceMatrix, Tensor]]  # as they lie, and opened; one pair where both are of one type
    opened: Tensor  # bf16 [2, count, ffn, hidden]: gate and up
    down: tuple[DeviceMatrix, Tensor]  # as it lies, and opened [count, hidden, ffn]


def cut_slot(ring: Tensor, layout: Layout, slot: int, section: Section, count: int) -> Slot:
    """The slot for `count` of the section's experts, views of the ring."""
    at = slot * layout.slot_bytes
    starts = [at := at + nbytes for nbytes in (0, *(_aligned(count * matrix.each) for matrix in section[:2]))]
    gate, up, down = (ring[start : start + count * matrix.each] for start, matrix in zip(starts, section, strict=True))
    ffn, hidden = section[0].rows, section[0].cols
    opened = ring[layout.scratch : layout.scratch + 4 * count * ffn * hidden].view(torch.bfloat16).view(2, count, ffn, hidden)
    gate_up = [(matrix.on_device(part, count), to) for matrix, part, to in zip(section, (gate, up), opened, strict=False)]
    if section[0].type_id == section[1].type_id and starts[1] == starts[0] + len(gate):
        gate_up = [(section[0].on_device(ring[starts[0] : starts[1] + len(up)], 2 * count), opened.flatten(0, 1))]
    return Slot((gate, up, down), gate_up, opened, (section[2].on_device(down, count), opened[0].view(count, hidden, ffn)))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _opened_bytes(sections: Sequence[Section]) -> int:
    """Of an expert's gate and up in bfloat16. Down comes when these have done their work, and takes half of it."""
    return max(2 * 2 * gate.rows * gate.cols for gate, _, _ in sections)


class Lane(Protocol):
    """The order of one layer after the other; all but fill and drain are of the caller's stream."""

    def mark(self) -> Callable[[], None]:
        """Here; what is returned waits, without spinning, until the stream has come here."""
        ...

    def bound(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work with this thread's stream, for another thread to call."""
        ...

    def wait(self) -> None:
        """Copies wait for what the stream does now: the ring is cut anew."""
        ...

    def start(self) -> None:
        """A layer's copies begin."""
        ...

    def end(self) -> None:
        """Its products end."""
        ...

    def seconds(self) -> float | None:
        """What lay between; None where it is not over, or was told before."""
        ...

    def fill(self, slot: int, copies: Iterable[Copy], copy: Callable[[Tensor, Tensor, bool], None]) -> None: ...
    def take(self, slot: int) -> None: ...
    def release(self, slot: int) -> None: ...
    def drain(self) -> None:
        """Wait for the copies."""
        ...


class PlainLane:
    """On the CPU everything happens in its turn."""

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds: float | None = None

    def mark(self) -> Callable[[], None]:
        return _nothing

    def bound(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def wait(self) -> None:
        pass

    def start(self) -> None:
        self._started = time.perf_counter()

    def end(self) -> None:
        self._seconds = time.perf_counter() - self._started

    def seconds(self) -> float | None:
        seconds, self._seconds = self._seconds, None
        return seconds

    def fill(self, slot: int, copies: Iterable[Copy], copy: Callable[[Tensor, Tensor, bool], None]) -> None:
        for each in copies:
            copy(*each)

    def take(self, slot: int) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def drain(self) -> None:
        pass


class CudaLane:
    """A copy stream beside the caller's, and the events between them."""

    def __init__(self, device: torch.device) -> None:
        self._copies = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event() for _ in range(SLOTS)]
        self._released = [torch.cuda.Event() for _ in range(SLOTS)]
        self._started, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._timed = False

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event(blocking=True)
        event.record()
        return event.synchronize

    def bound(self, work: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.current_stream()

        def bound() -> None:
            with torch.cuda.stream(stream):  # which sets the device too
                work()

        return bound

    def wait(self) -> None:
        self._copies.wait_stream(torch.cuda.current_stream())

    def start(self) -> None:
        self._started.record(self._copies)
        self._timed = False

    def end(self) -> None:
        self._ended.record()
        self._timed = True

    def seconds(self) -> float | None:
        if not self._timed or not self._ended.query():
            return None
        self._timed = False
        return float(self._started.elapsed_time(self._ended)) / 1e3

    def fill(self, slot: int, copies: Iterable[Copy], copy: Callable[[Tensor, Tensor, bool], None]) -> None:
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._released[slot])
            for each in copies:
                copy(*each)
            self._filled[slot].record()

    def take(self, slot: int) -> None:
        torch.cuda.current_stream().wait_event(self._filled[slot])

    def release(self, slot: int) -> None:
        self._released[slot].record()

    def drain(self) -> None:
        self._copies.synchronize()


def _nothing() -> None:
    """There is nothing to wait for."""
