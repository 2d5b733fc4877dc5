"""The loss curve as a picture: `python -m recipes.tiny_r1.plot RUN/log.jsonl loss.svg`. An SVG of a few lines, with no library."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 720, 360, 48
_CURVES = {"loss": "#1f6feb", "mtp_loss": "#d9822b"}
_NAMES = {"loss": "next token", "mtp_loss": "the one after (MTP)"}


def draw(lines: Sequence[dict[str, float]]) -> str:
    """The picture of a log: both losses over the steps, on a logarithmic scale of whole decades."""
    values = [line[name] for line in lines for name in _CURVES]
    low, high = math.floor(math.log10(max(min(values), 1e-6))), math.ceil(math.log10(max(values)))
    last = lines[-1]["step"]

    def x(step: float) -> float:
        return MARGIN + step / last * (WIDTH - 2 * MARGIN)

    def y(loss: float) -> float:
        return HEIGHT - MARGIN - (math.log10(max(loss, 10**low)) - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    body = [_text(MARGIN - 6, y(10**power) + 4, f"{10.0**power:g}", "end") + _rule(y(10**power)) for power in range(low, high + 1)]
    body += [_text(x(last * part / 4), HEIGHT - MARGIN + 18, f"{last * part // 4:g}", "middle") for part in range(5)]
    for index, (name, colour) in enumerate(_CURVES.items()):
        points = " ".join(f"{x(line['step']):.1f},{y(line[name]):.1f}" for line in lines)
        body.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        body.append(_text(WIDTH - MARGIN, MARGIN + 16 * index, _NAMES[name], "end", colour))
    body.append(_text(WIDTH / 2, HEIGHT - 10, "step", "middle"))
    return "\n".join([_HEAD, *body, "</svg>", ""])


_HEAD = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
)


def _rule(at: float) -> str:
    return f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Draw the loss curve of a run.")
    parser.add_argument("log", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.log.read_text(encoding="utf-8").splitlines()]
    options.picture.write_text(draw(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
