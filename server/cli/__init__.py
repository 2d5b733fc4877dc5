"""`moespan serve | chat | batch | bench | eval | inspect | synth`: the composition root, and the only importer of every room.

A command is a module with `run(arguments) -> exit status`. It is imported once it is chosen, so that `--help` costs nothing.
Exit statuses: 0 done, 1 the model or the machine cannot do it, 2 a flag or a configuration value is wrong, 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence

from server.cli.flags import parse
from server.cli.logs import set_up_logging
from server.errors import ConfigError, MoespanError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a person's mistake becomes one line on stderr."""
    verbose = False
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        verbose = arguments.verbose
        set_up_logging(verbose)
        return _run(arguments)
    except MoespanError as error:
        return _told(str(error), verbose, 2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `moespan inspect | head`
        sys.stderr.close()
        return 1
    except OSError as error:  # of a file that a person named; what is likelier is told where it is opened
        if error.filename is None:
            raise
        return _told(f"{error.filename} cannot be used: {error.strerror}. Check its name, its permissions and the disk.", verbose, 1)


def _told(sentence: str, verbose: bool, status: int) -> int:
    """Say what is wrong; returns the exit status."""
    if verbose:
        traceback.print_exc()
    print(f"moespan: {sentence}", file=sys.stderr)
    return status


def _run(arguments: Namespace) -> int:
    match arguments.command:
        case "serve":
            from server.cli import serve

            return serve.run(arguments)
        case "chat":
            from server.cli import chat

            return chat.run(arguments)
        case "batch":
            from server.cli import batch

            return batch.run(arguments)
        case "bench" if arguments.task == "experts":
            from server.cli import bench_experts

            return bench_experts.run(arguments)
        case "bench":
            from server.cli import bench

            return bench.run(arguments)
        case "eval":
            from server.cli import eval as evaluation

            return evaluation.run(arguments)
        case "synth":
            from server.cli import synth

            return synth.run(arguments)
        case _:
            from server.cli import inspect

            return inspect.run(arguments)
