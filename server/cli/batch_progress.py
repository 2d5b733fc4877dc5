"""How far a batch is: a bar on a terminal, a line of the log now and then elsewhere, and a summary at the end."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from server.cli.batch_files import STANDARD, Output, Tally
from server.metrics import Metrics

_log = logging.getLogger(__name__)

LOOKS_PER_S = 2  # at the figures, on a terminal
LOG_S = 60.0  # between two lines of the log
BAR = 24  # columns


class Watch:
    """The figures of a run of `lines` lines, of which `tally` may have some already. The time counts from the first look."""

    def __init__(self, metrics: Metrics, tally: Tally, lines: int) -> None:
        self.tally = tally
        self._metrics = metrics
        self.lines = lines
        self._before = tally.lines
        self._started = time.monotonic()

    @property
    def left(self) -> int:
        """Lines that are not done."""
        return self.lines - self.tally.lines

    @property
    def seconds(self) -> float:
        """Since the first line of this run was begun."""
        return time.monotonic() - self._started

    @property
    def tokens_per_s(self) -> float:
        """Tokens drawn a second, over all of this run, prompts and all."""
        drawn = self._metrics.registry.get_sample_value("moespan_generation_tokens_total") or 0.0
        return drawn / self.seconds

    def line(self) -> str:
        """ "12 of 5000 lines, 1 refused, 8.7 tok/s, 6:12:00 left". What is left is taken to be like what this run has done."""
        done = self.tally.lines - self._before
        parts = [f"{self.tally.lines} of {self.lines} lines"]
        parts += [f"{count} {what}" for what, count in (("refused", self.tally.refused), ("failed", self.tally.failed)) if count]
        parts.append(f"{self.tokens_per_s:.1f} tok/s")
        if done:
            parts.append(f"{_clock(self.seconds / done * self.left)} left")
        return ", ".join(parts)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the figures as long as this lasts."""
        self._started = time.monotonic()
        with _bar(self) if sys.stderr.isatty() else _logged(self):
            yield


@contextmanager
def _bar(watch: Watch) -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    def look() -> Table:
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(watch.lines, watch.tally.lines, width=BAR), watch.line())
        return row

    with Live(get_renderable=look, console=Console(stderr=True), refresh_per_second=LOOKS_PER_S, transient=True, redirect_stdout=False):
        yield


@contextmanager
def _logged(watch: Watch) -> Iterator[None]:
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOG_S):
            _log.info("%s.", watch.line())

    looking = threading.Thread(target=look, name="progress", daemon=True)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()


def summary(output: Output, watch: Watch) -> str:
    """What came of it, over all runs, and how it goes on."""
    tally = output.tally
    counts = f"{tally.answered} answered, {tally.refused} refused, {tally.failed} failed"
    tokens = f"{tally.prompt_tokens} prompt tokens, {tally.completion_tokens} tokens of replies"
    said = [f"{output.path}: {counts}; {tokens}; this run took {_clock(watch.seconds)} at {watch.tokens_per_s:.1f} tok/s."]
    if left := watch.left:
        goes_on = "" if output.path == STANDARD else ": the same command goes on from there"
        said.append(f"{left} of {watch.lines} lines are still to be done{goes_on}.")
    if tally.failed and output.path != STANDARD:
        said.append("Remove the lines of those that failed, and the same command asks them again.")
    return " ".join(said)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
