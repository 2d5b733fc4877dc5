"""A step of decode as an SVG: what the GPU and the pool of CPU threads do when, over the whole step and within one layer of experts.

The two take turns: the GPU asks for a layer's routed experts, goes on with the shared ones, and waits; so a step is as long as what neither does under the
other's work. `measure` takes the last of a few profiled steps. The profiler makes a launch several times as long, and so the time before the first layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from server.engine.engine import LocalEngine
from server.engine.gpu.engine import GpuEngine
from server.engine.gpu.profile import Span, profiled
from server.engine.protocol import Step
from server.errors import ConfigError
from server.types import SamplingParams

STEPS = 5  # profiled, of which the last is shown
WIDTH, LEFT, RIGHT = 1200, 96, 1160
LANE, TOP, APART = 34, 84, 150  # a lane's height, the first view's top, and from view to view
KINDS = {  # of kernels: (words of their names, colour)
    "products": (("_tiles", "_floats"), "#2563eb"),
    "attention": (("_attend", "_latent", "_combine", "_rotate"), "#7c3aed"),
    "hand-over": (("_send", "_receive", "_fetch", "Memcpy", "flag"), "#d97706"),
    "norm, SwiGLU, router": (("_rms_norm", "_swiglu", "_route"), "#0891b2"),
    "sampling and the rest": ((), "#64748b"),
}
POOL = "#059669"
STYLE = """
    text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; fill: #334155 }
    .title { font-size: 18px; font-weight: 600; fill: #0f172a }
    .small { font-size: 11px; fill: #64748b }
    .grid { stroke: #e2e8f0; stroke-width: 1 }
    .lane { fill: #f8fafc }
"""


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step. Times are microseconds from its launch."""

    kernels: tuple[Span, ...]
    turns: tuple[Span, ...]  # of the pool: from when it saw that experts are asked for to its answer

    @property
    def end(self) -> float:
        return max(span.end for span in (*self.kernels, *self.turns))

    @property
    def pool_share(self) -> float:
        """How much of the time from the first layer of experts to the last one's end the pool works."""
        return sum(turn.end - turn.begin for turn in self.turns) / (self.turns[-1].end - self.turns[0].begin)

    @property
    def gpu_share(self) -> float:
        """How much of the step's time a kernel runs."""
        return sum(kernel.end - kernel.begin for kernel in self.kernels) / self.end


def takes_turns(engine: LocalEngine) -> GpuEngine:
    """The engine, once it has been started. ConfigError where no step is captured, or the model has no experts."""
    if not isinstance(engine, GpuEngine) or not engine.turns:
        raise ConfigError("--timeline shows how a GPU and the CPUs take turns over experts: it needs a GPU (--device cuda) and a model that has them.")
    return engine


def measure(engine: GpuEngine, context: int) -> Timeline:
    """A step behind `context` tokens, of which the cache holds whatever it holds."""
    pages, sampler = tuple(range(context // engine.page_size + 1)), engine.new_sampler(SamplingParams(temperature=0.0), ())
    kernels = profiled(engine, [Step((index,), context, pages, sampler) for index in range(STEPS)])
    return Timeline(tuple(kernels), tuple(Span("routed experts", begin / 1e3, end / 1e3) for begin, end in engine.turns))


def draw(title: str, timeline: Timeline) -> str:
    """The SVG's text: the step, and below it what lies between two layers of experts in its middle."""
    height = TOP + 2 * APART + 20
    middle = len(timeline.turns) // 2
    first = timeline.turns[max(middle - 1, 0)].end
    shares = f"from the first layer of experts to the last the pool works {timeline.pool_share:.0%} of the time; the GPU {timeline.gpu_share:.0%}"
    said = f"{timeline.end / 1e3:.2f} ms; {shares}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            f'<text class="title" x="16" y="30">{escape(title)}</text>',
            f'<text x="16" y="54">{escape(said)}</text>',
            *_view(timeline, "the step", 0.0, timeline.end, TOP),
            *_view(timeline, "between two layers of experts", first - 10, timeline.turns[middle].begin + 60, TOP + APART),
            *_legend(height - 14),
            "</svg>",
            "",
        ]
    )


def kind_of(name: str) -> str:
    """Which of KINDS a kernel is."""
    return next((kind for kind, (words, _) in KINDS.items() if any(word in name for word in words)), list(KINDS)[-1])


def _view(timeline: Timeline, name: str, begin: float, end: float, top: int) -> Iterator[str]:
    """Both lanes from `begin` to `end`."""
    yield f'<text x="16" y="{top - 6}">{name}, {_time(end - begin)}</text>'
    for lane, label in enumerate(("GPU", "CPU pool")):
        y = top + lane * (LANE + 8)
        yield f'<rect class="lane" x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" height="{LANE}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + LANE / 2 + 4}" text-anchor="end">{label}</text>'
    for kernel in timeline.kernels:
        yield from _bar(kernel, KINDS[kind_of(kernel.name)][1], begin, end, top)
    for turn in timeline.turns:
        yield from _bar(turn, POOL, begin, end, top + LANE + 8)
    yield from _axis(begin, end, top + 2 * (LANE + 8))


def _bar(span: Span, colour: str, begin: float, end: float, y: float) -> Iterator[str]:
    """A span, as far as it can be seen."""
    first, last = max(span.begin, begin), min(span.end, end)
    if first >= last:
        return
    scale = (RIGHT - LEFT) / (end - begin)
    words = f"{span.name.strip('_')}: {span.end - span.begin:.1f} us"
    width = max((last - first) * scale, 0.3)
    yield f'<rect x="{LEFT + (first - begin) * scale:.1f}" y="{y}" width="{width:.2f}" height="{LANE}" fill="{colour}"><title>{escape(words)}</title></rect>'


def _axis(begin: float, end: float, y: float) -> Iterator[str]:
    for tick in range(11):
        x = LEFT + (RIGHT - LEFT) * tick / 10
        yield f'<line class="grid" x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 5}"/>'
        yield f'<text class="small" x="{x:.1f}" y="{y + 18}" text-anchor="middle">{_time((end - begin) * tick / 10)}</text>'


def _legend(y: int) -> Iterator[str]:
    x = LEFT
    entries: Sequence[tuple[str, str]] = [*((kind, colour) for kind, (_, colour) in KINDS.items()), ("routed experts (CPU)", POOL)]
    for kind, colour in entries:
        yield f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{colour}"/>'
        yield f'<text x="{x + 16}" y="{y}">{escape(kind)}</text>'
        x += 40 + 8 * len(kind)


def _time(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 1000 else f"{microseconds:.0f} us"
