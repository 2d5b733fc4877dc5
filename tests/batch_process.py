"""`python -m tests.batch_process STEP_S IN OUT ...`: `moespan batch` over the fake engine, which takes STEP_S seconds a step; and what its tests write."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import server.cli.batch
from server.api.serving import Loaded
from server.cli import main
from server.config import Config
from server.metrics import Metrics
from server.scheduler.service import Service
from server.text.template import ChatTemplate
from server.text.tokenizer import ByteTokenizer
from tests.fakes import STOP_ID, FakeEngine

TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def over(engine: FakeEngine) -> None:
    """From now on `moespan batch` runs on this engine."""

    def load_chat(config: Config, file: object, metrics: Metrics) -> Loaded:
        tokenizer = ByteTokenizer(vocab_size=STOP_ID + 1, stop_ids=[STOP_ID])
        return Loaded(Service(engine, config.scheduler, 1024, metrics), tokenizer, ChatTemplate(TEMPLATE))

    server.cli.batch.load_chat = load_chat


def asks(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def echoes(count: int) -> list[dict[str, Any]]:
    """Requests that the fake engine answers with their own prompt."""
    return [asks(f"line-{i}", prompt=f"this is what line {i} says") for i in range(count)]


def write(path: Path, lines: Sequence[dict[str, Any] | str]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    over(FakeEngine(step_s=float(sys.argv[1])))
    sys.exit(main(["batch", *sys.argv[2:]]))
