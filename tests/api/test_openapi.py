"""/openapi.json is true: whatever is sent after it, by someone who means no good, is answered as it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from server.api.openapi import POSTS
from tests.api.live import Live, live
from tests.fakes import FakeEngine

EXAMPLES = 6  # of each operation that takes a body, and a few of the others
CHECKS: list[Any] = [content_type_conformance, response_schema_conformance, status_code_conformance]


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live(FakeEngine(script=list(b"some words")), max_body_mb=0.2) as server:
        yield server
        server.wait_idle()


def test_every_route_is_as_described(served: Live) -> None:
    """No 5xx but the 501s of what is not served here; every answer of the type and shape that is written down."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{served.port}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) > 30
    statuses = Counter(status for operation in operations for status in tried(operation))
    assert min(statuses[200], statuses[400], statuses[501]) > 10, statuses
    assert set(statuses) <= {200, 400, 404, 405, 501}


def tried(operation: Any) -> list[int]:
    """The statuses that one operation answered with."""
    statuses: list[int] = []

    @settings(max_examples=EXAMPLES if operation.path in POSTS else 2, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of(operation.as_strategy(), operation.as_strategy(GenerationMode.NEGATIVE)))
    def check(case: Any) -> None:
        response = case.call(timeout=20)
        statuses.append(response.status_code)
        case.validate_response(response, checks=CHECKS if response.status_code == 501 else [not_a_server_error, *CHECKS])

    check()
    return statuses


def test_the_document_names_every_route_and_what_is_refused(served: Live) -> None:
    document = served.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert {"/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat", "/tokenize", "/health", "/metrics"} <= set(document["paths"])
    chat = document["components"]["schemas"]["server__api__schemas__openai__ChatRequest"]
    assert chat["properties"]["audio"] == {"enum": [None], "description": "Not supported."}
    assert chat["properties"]["min_tokens"]["enum"] == [0, None]
    assert "security" not in document
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)


def test_with_a_key_the_document_says_so_and_needs_it() -> None:
    with live(api_key=("k",)) as server:
        assert server.get("/openapi.json").status_code == 401
        assert server.get("/openapi.json", headers={"x-api-key": "k"}).json()["security"] == [{"bearer": []}, {"x-api-key": []}]
        assert [server.get(path, headers={"x-api-key": "k"}).status_code for path in ("/docs", "/redoc")] == [404, 404]
