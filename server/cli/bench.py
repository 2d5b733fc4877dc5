"""`moespan bench offline`: prefill and decode speed of a model on this machine, offline, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from server.bench.offline import Speed, Spread, measure
from server.cli.flags import config_of
from server.cli.load import load_engine, model_file
from server.cli.machine import cpu_name, version
from server.config import Config
from server.engine.gguf.reader import GGUFFile
from server.errors import ConfigError

if TYPE_CHECKING:
    from server.engine.loader import LoadedModel


@dataclass(frozen=True, slots=True)
class Setting:
    """Under what conditions a speed was measured: without them it means nothing."""

    version: str
    cpu: str
    device: str  # "cpu", or the GPU's name
    model: str
    file: str
    threads: int
    isa: str
    cache_type: str
    prefill_chunk: int


def run(arguments: Namespace) -> int:
    """Load, measure, print."""
    config = config_of(arguments)
    config = replace(config, engine=replace(config.engine, cache_lens=arguments.prompt + arguments.gen))
    setting, speed = _measured(config, arguments)
    if arguments.json:
        print(json.dumps(as_json(setting, speed), indent=2))
    else:
        _print_table(setting, speed)
    return 0


def _measured(config: Config, arguments: Namespace) -> tuple[Setting, Speed]:
    file = model_file(config.model)
    _check_fits(file, arguments)
    loaded = load_engine(config, file)
    engine = loaded.engine
    try:
        engine.start()  # this thread is one of the pool's, as the scheduler's worker is in the server
        counts = {name: getattr(arguments, name) for name in ("prompt", "gen", "repeat")}
        drawn = _timeline_of(loaded, arguments)
        speed = measure(engine, engine.vocab_size, **counts, progress=partial(_tell, arguments.repeat))
        drawn()
    finally:
        engine.close()
    ran_as = (loaded.threads, loaded.isa, loaded.cache_type, engine.prefill_chunk)
    setting = Setting(version(), cpu_name(), loaded.device, loaded.name, file.path.name, *ran_as)
    return setting, speed


def _timeline_of(loaded: LoadedModel, arguments: Namespace) -> Callable[[], None]:
    """What draws --timeline, once it may; whether it can at all is found out before anything is measured."""
    if arguments.timeline is None:
        return lambda: None
    if not arguments.timeline.parent.is_dir():
        raise ConfigError(f"--timeline {arguments.timeline}: there is no directory {arguments.timeline.parent}. Make it first.")
    from server.bench import timeline

    engine = timeline.takes_turns(loaded.engine)
    title = f"One token of {loaded.name} after {arguments.prompt}, on {loaded.device} and {loaded.threads} CPU threads"
    return lambda: arguments.timeline.write_text(timeline.draw(title, timeline.measure(engine, arguments.prompt)))


def _check_fits(file: GGUFFile, arguments: Namespace) -> None:
    context = file.metadata.get(f"{file.architecture}.context_length")
    if isinstance(context, int) and arguments.prompt + arguments.gen > context:
        raise ConfigError(f"--prompt {arguments.prompt} and --gen {arguments.gen} together are more than the model's context of {context} tokens.")


def as_json(setting: Setting, speed: Speed) -> dict[str, object]:
    """What --json prints; all speeds are tokens per second."""
    return {**asdict(setting), "prompt": speed.prompt, "gen": speed.gen, "prefill": _spread(speed.prefill), "decode": _spread(speed.decode)}


def _spread(spread: Spread) -> dict[str, object]:
    return {"median": spread.median, "min": spread.low, "max": spread.high, "runs": list(spread.runs)}


def _tell(repeat: int, done: int) -> None:
    """Overwrite one line on a terminal; say nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\rrun {done} of {repeat}", end="\n" if done == repeat else "", file=sys.stderr, flush=True)


def _print_table(setting: Setting, speed: Speed) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    machine = setting.cpu if setting.device == "cpu" else f"{setting.device} and {setting.cpu}"
    console.print(f"{setting.model} ({setting.file}), {setting.threads} threads, {setting.isa}, {setting.cache_type} cache, on {machine}", markup=False)
    table = Table("", "tokens", "median tok/s", "min", "max", "runs", box=None)
    for name, tokens, spread in (("prefill", speed.prompt, speed.prefill), ("decode", speed.gen, speed.decode)):
        table.add_row(name, str(tokens), f"{spread.median:.1f}", f"{spread.low:.1f}", f"{spread.high:.1f}", str(len(spread.runs)))
    console.print(table)
