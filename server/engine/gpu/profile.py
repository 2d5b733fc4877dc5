"""What the GPU does in a step, by torch's profiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile, record_function

from server.engine.protocol import Step

if TYPE_CHECKING:
    from server.engine.gpu.engine import GpuEngine

_MARK = "moespan_step_"
_LAUNCH = "cudaGraphLaunch"


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took a while; begin and end in microseconds."""

    name: str
    begin: float
    end: float


def profiled(engine: GpuEngine, steps: Sequence[Step]) -> list[Span]:
    """Run captured steps; what the GPU ran in the last of them, in order, in time from its launch."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        for index, step in enumerate(steps):
            with record_function(f"{_MARK}{index}"):
                engine.step(step)
    events = profiler.events()
    began = min(event.time_range.start for event in events if event.name == f"{_MARK}{len(steps) - 1}")
    launched = min(event.time_range.start for event in events if event.name == _LAUNCH and event.time_range.start >= began)
    ran = [
        Span(event.name, event.time_range.start - launched, event.time_range.end - launched)
        for event in events
        if event.device_type.name == "CUDA" and event.time_range.start >= launched and not event.name.startswith(_MARK)
    ]
    return sorted(ran, key=lambda span: span.begin)
