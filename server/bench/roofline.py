"""The roofline of a run (Williams, Waterman and Patterson 2009) as an SVG: what memory and arithmetic allow, and where the points are.

Both axes are logarithmic: operations per byte of expert weights to the right, TFLOPS up. A point under the slope waits for memory, one under a flat roof for
arithmetic; how far it is below its roof is what the kernel leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from server.bench.experts import Limits, Point

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 84, 924, 72, 532  # of the plot in the picture
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
STYLE = """
    text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; fill: #334155 }
    .title { font-size: 18px; font-weight: 600; fill: #0f172a }
    .small { font-size: 11px; fill: #64748b }
    .grid { stroke: #e2e8f0; stroke-width: 1 }
    .roof { stroke: #0f172a; stroke-width: 2; fill: none }
    .lower { stroke: #94a3b8; stroke-width: 1.5; stroke-dasharray: 6 4 }
    .path { fill: none; stroke-width: 1.5; stroke-opacity: 0.35 }
"""


@dataclass(frozen=True, slots=True)
class Axis:
    """Logarithmic: `low` .. `high` lies over the pixels `begin` .. `end`."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.begin + share * (self.end - self.begin), 1)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of each power of ten."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [step * 10.0**power for power in powers for step in (1, 2, 5) if self.low <= step * 10.0**power <= self.high]


def roofline(title: str, subtitle: str, limits: Limits, points: Sequence[Point]) -> str:
    """The SVG's text. Points of one format have one colour and are joined; each is labelled with its q."""
    x, y = _axes(limits, points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text class="title" x="{LEFT}" y="32">{escape(title)}</text>',
        f'<text x="{LEFT}" y="53">{escape(subtitle)}</text>',
        *_grid(x, y),
        *_roofs(x, y, limits),
        *_points(x, y, points),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _axes(limits: Limits, points: Sequence[Point]) -> tuple[Axis, Axis]:
    """Room for every point, and for the corner where the slope meets the highest roof."""
    highest = max(limits.peaks.values()) / 1e12
    intensities = [point.intensity for point in points] + [1000 * highest / limits.gbps]
    speeds = [point.tflops for point in points] + [rate / 1e12 for rate in limits.peaks.values()]
    return Axis(min(intensities) / 1.6, max(intensities) * 3, LEFT, RIGHT), Axis(min(speeds) / 2, max(speeds) * 1.8, BOTTOM, TOP)


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    for value in x.ticks():
        yield f'<line class="grid" x1="{x(value)}" y1="{TOP}" x2="{x(value)}" y2="{BOTTOM}"/>'
        yield f'<text class="small" x="{x(value)}" y="{BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
    for value in y.ticks():
        yield f'<line class="grid" x1="{LEFT}" y1="{y(value)}" x2="{RIGHT}" y2="{y(value)}"/>'
        yield f'<text class="small" x="{LEFT - 8}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>'
    yield f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 44}" text-anchor="middle">operations per byte of expert weights</text>'
    yield f'<text transform="translate(26 {(TOP + BOTTOM) / 2}) rotate(-90)" text-anchor="middle">TFLOPS</text>'


def _roofs(x: Axis, y: Axis, limits: Limits) -> Iterator[str]:
    """The slope up to the highest peak, and a flat line for each peak, from where the slope reaches it."""
    peaks = sorted((rate / 1e12, name) for name, rate in limits.peaks.items())
    highest = peaks[-1][0]
    slope = limits.gbps / 1000  # TFLOPS at one operation a byte
    start = max(x.low, y.low / slope)
    corners = [(start, start * slope), (highest / slope, highest), (x.high, highest)]
    yield f'<polyline class="roof" points="{" ".join(f"{x(a)},{y(b)}" for a, b in corners)}"/>'
    for rate, name in peaks:
        if rate < highest:
            yield f'<line class="lower" x1="{x(max(rate / slope, x.low))}" y1="{y(rate)}" x2="{RIGHT}" y2="{y(rate)}"/>'
        yield f'<text x="{RIGHT - 6}" y="{y(rate) - 7}" text-anchor="end">{escape(name)} peak, {rate:.3g} T</text>'
    middle = math.sqrt(corners[0][0] * corners[1][0])
    angle = math.degrees(math.atan2(y(corners[1][1]) - y(corners[0][1]), x(corners[1][0]) - x(corners[0][0])))
    place = f"translate({x(middle)} {round(y(middle * slope) - 8, 1)}) rotate({angle:.1f})"
    yield f'<text transform="{place}" text-anchor="middle">memory, {limits.gbps:.3g} GB/s</text>'


def _points(x: Axis, y: Axis, points: Sequence[Point]) -> Iterator[str]:
    for index, name in enumerate(dict.fromkeys(point.format for point in points)):
        colour, own = COLOURS[index % len(COLOURS)], [point for point in points if point.format == name]
        yield f'<polyline class="path" stroke="{colour}" points="{" ".join(f"{x(p.intensity)},{y(p.tflops)}" for p in own)}"/>'
        for point in own:
            at, height = x(point.intensity), y(point.tflops)
            words = f"{name}, q={point.q}: {point.ms:.3g} ms, {point.gbps:.3g} GB/s, {point.tflops:.3g} TFLOPS"
            yield f'<circle cx="{at}" cy="{height}" r="4.5" fill="{colour}" stroke="#ffffff" stroke-width="1"><title>{escape(words)}</title></circle>'
            yield f'<text class="small" x="{at + 7}" y="{height + 13}">{point.q}</text>'
        yield f'<circle cx="{LEFT + 16}" cy="{TOP + 18 + 20 * index}" r="4.5" fill="{colour}"/>'
        yield f'<text x="{LEFT + 28}" y="{TOP + 22 + 20 * index}">{escape(name)}</text>'
    yield f'<text class="small" x="{LEFT + 12}" y="{TOP + 26 + 20 * len({p.format for p in points})}">numbers: tokens at once (q)</text>'
