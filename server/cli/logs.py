"""One log format for every room, on stderr: standard output belongs to what a command was asked for."""

from __future__ import annotations

import logging


def set_up_logging(verbose: bool) -> None:
    """INFO and above, DEBUG when verbose; libraries speak up from WARNING on."""
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, force=True)
    logging.getLogger("server").setLevel(logging.DEBUG if verbose else logging.INFO)
