"""What the HTTP side serves, from the first moment of the process on: loading, then ready, then stopping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from server.config import Config
from server.errors import ShuttingDown
from server.metrics import Metrics
from server.scheduler.service import Service
from server.scheduler.worker import GOING_DOWN
from server.text.template import ChatTemplate
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the model's file says of it, known before it is loaded. Made by the composition root."""

    architecture: str = ""
    nbytes: int = 0
    parameters: int = 0
    quantization: str = ""  # the type of the largest part of the file
    template: str = ""  # the chat template's source
    keys: Mapping[str, object] = field(default_factory=dict)  # the metadata, but for arrays and long texts


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can answer. Made by the composition root."""

    service: Service
    tokenizer: Tokenizer
    template: ChatTemplate


class Serving:
    """One model's place in the API. `ready` and `stop` are called by the runner, from any thread; requests read it in the event loop."""

    def __init__(self, model_id: str, config: Config, metrics: Metrics, facts: ModelFacts | None = None) -> None:
        self.model_id = model_id
        self.config = config
        self.metrics = metrics
        self.facts = facts or ModelFacts()
        self.created = int(time.time())
        self.long_reading = asyncio.Lock()  # held while a long body is made into tokens
        self._loaded: Loaded | None = None
        self._stopping = False
        metrics.watch_state(lambda: self.state)

    @property
    def state(self) -> Literal["loading", "ready", "stopping"]:
        """What /ready says."""
        if self._stopping:
            return "stopping"
        return "loading" if self._loaded is None else "ready"

    def ready(self, loaded: Loaded) -> None:
        """The model is loaded: answer requests from now on."""
        self._loaded = loaded

    def stop(self) -> None:
        """The server is going away: /ready says so, and requests are refused."""
        self._stopping = True

    def loaded(self) -> Loaded:
        """The model, or ShuttingDown while there is none."""
        if self._stopping:
            raise ShuttingDown(GOING_DOWN)
        if self._loaded is None:
            raise ShuttingDown(f"The model {self.model_id} is still loading. Try again in a moment; GET /ready says when it is there.")
        return self._loaded
