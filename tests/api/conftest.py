from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.live import Live, live


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    """One server for all tests of a module that need nothing special. Every request must have left it idle."""
    with live() as server:
        yield server
        server.wait_idle()
