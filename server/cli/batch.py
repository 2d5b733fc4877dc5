"""`moespan batch in.jsonl out.jsonl`: OpenAI's batch format, answered in this process one request after another, as the server would.

Meant for nights: whatever ends the run, the same command goes on where it ended. A line that is wrong costs itself alone. When the engine fails,
a token is asked for: with none to be had the run ends, and the line stays to be done.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing

from server.api import batch
from server.api.batch import Line
from server.api.problems import Json
from server.api.serving import Loaded, Serving
from server.cli.batch_files import Output, read_input
from server.cli.batch_progress import Watch, summary
from server.cli.flags import config_of
from server.cli.load import load_chat, model_file, model_id
from server.errors import EngineFailure
from server.metrics import Metrics

_log = logging.getLogger(__name__)

SAME_SIGNAL_S = 1.0  # within it a second signal is the first one again, sent to the process and to its group


def run(arguments: Namespace) -> int:
    """Check the files, load, answer what is not answered yet; 130 when a signal ended it before the last line."""
    config = config_of(arguments)
    file = model_file(config.model)
    serving = Serving(model_id(config.model, file), config, Metrics())
    lines = read_input(arguments.input)
    with closing(Output(arguments.output, lines, serving.model_id)) as output:
        watch = Watch(serving.metrics, output.tally, len(lines))
        if output.tally.lines:
            _log.info("%d of %d lines are done already, in %s.", output.tally.lines, len(lines), output.path)
        left = [line for line in lines if line.id not in output.done]
        if left:
            if not arguments.verbose:
                logging.getLogger("server.scheduler").setLevel(logging.WARNING)  # which would log every line
            loaded = load_chat(config, file, serving.metrics)
            try:
                asyncio.run(Run(serving, loaded, output, watch).all(left))
            finally:
                loaded.service.close()
        print(summary(output, watch), file=sys.stderr)
    return 0 if output.tally.lines == len(lines) else 130


class Run:
    """The way of the lines through the engine, until the last one or a signal."""

    def __init__(self, serving: Serving, loaded: Loaded, output: Output, watch: Watch) -> None:
        self._serving, self._loaded = serving, loaded
        self._output, self._watch = output, watch
        self._running: asyncio.Task[Json] | None = None
        self._signalled_at: float | None = None  # the loop's time

    async def all(self, left: Sequence[Line]) -> None:
        """Answer these lines. Raises EngineFailure, or DeviceError when the output takes no more."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        with self._watch.shown():
            for line in left:
                if self._signalled_at is not None:
                    return
                await self._one(line)

    async def _one(self, line: Line) -> None:
        self._running = asyncio.ensure_future(batch.answer(line, self._serving, self._loaded))
        try:
            answer = await self._running
        except asyncio.CancelledError:
            return  # by a signal: the line stays to be done
        if (batch.status(answer) or 0) >= 500 and not await batch.engine_works(self._loaded):
            raise EngineFailure(f"The engine has not worked since line {line.number}; the log has the traceback. The same command goes on from there.")
        self._output.append(answer)

    def _on_signal(self, number: int) -> None:
        """The running line may end within the grace time; a second signal ends it at once."""
        loop = asyncio.get_running_loop()
        if self._signalled_at is None:
            grace_s = self._serving.config.scheduler.grace_s
            _log.info("%s: no new line; the running one has %g s to finish. A second signal ends it at once.", signal.Signals(number).name, grace_s)
            self._signalled_at = loop.time()
            loop.call_later(grace_s, self._end)
        elif loop.time() - self._signalled_at > SAME_SIGNAL_S:
            self._end()

    def _end(self) -> None:
        if self._running is not None:
            self._running.cancel()
