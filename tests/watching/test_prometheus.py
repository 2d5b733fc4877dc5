"""Prometheus, Grafana's dashboard and the alerts against a live server: everything that they name is there."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from server.config import SchedulerConfig
from server.types import EngineUse, GpuUse
from tests.api.live import Live, live
from tests.fakes import FakeEngine
from tests.watching.prometheus import CONFIGS, ROOT, dashboard, dashboard_queries, program, prometheus, promtool, values


def use_of_a_gpu_machine() -> EngineUse:
    """What an engine with a GPU would count, rising with the time."""
    now = time.monotonic()
    return EngineUse(16, 8 * now, int(9e10 * now), int(1e9 * now), int(2e10 * now), {"cpu": int(now), "stream": int(now)}, GpuUse(now / 2, 14 << 30, 24 << 30))


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(FakeEngine(step_s=0.002), scheduler=SchedulerConfig(max_queue=1, grace_s=5)) as server:
        server.serving.metrics.build.info({"version": "1", "python": "3"})
        server.serving.metrics.model.info({"model": "fake", "device": "none"})
        server.serving.metrics.watch_engine(use_of_a_gpu_machine)
        yield server


def named(text: str) -> set[str]:
    """The metrics that some PromQL names."""
    return set(re.findall(r"\b(?:moespan|process)_[a-z0-9_]+", text))


def test_dashboard_and_alerts_name_metrics_that_there_are(server: Live) -> None:
    scrape = {re.split(r"[{ ]", line)[0] for line in server.get("/metrics").text.splitlines() if line and line[0] != "#"}
    rules = [rule["expr"] for group in yaml.safe_load((CONFIGS / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    assert len(rules) > 8
    for query in [*dashboard_queries().values(), *rules]:
        assert named(query) or "up{" in query, query
        assert named(query) <= scrape, (query, named(query) - scrape)


def test_the_table_in_the_docs_has_every_metric_and_no_other(server: Live) -> None:
    kinds = [line.split(" ") for line in server.get("/metrics").text.splitlines() if line.startswith("# TYPE moespan_")]
    there = {name.removeprefix("moespan_") for _, _, name, _ in kinds if not name.endswith("_created")}
    table = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("| metric, behind")[2].partition("\n\n")[0]
    told = {name for row in table.splitlines() for name in re.findall(r"`([a-z0-9_]+)(?:\{\w+\})?`", row.split("|")[1] if row.startswith("| `") else "")}
    assert told == there


def test_the_dashboard_is_one_that_grafana_10_reads() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 36
    assert [variable["name"] for variable in board["templating"]["list"] if variable["type"] == "datasource"] == ["datasource"]
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in board["panels"]:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["datasource"] == source
        assert all(target["datasource"] == source and '{instance=~"$instance"' in target["expr"] for target in panel["targets"])
        assert panel["title"]
        assert panel["description"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    cells = [(x, y) for panel in board["panels"] for x in cells_of(panel["gridPos"], "x", "w") for y in cells_of(panel["gridPos"], "y", "h")]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24


def cells_of(place: dict[str, int], start: str, length: str) -> range:
    return range(place[start], place[start] + place[length])


def test_promtool_passes_the_metrics(server: Live) -> None:
    server.chat()
    promtool("check", "metrics", stdin=server.get("/metrics").content)


def test_promtool_passes_configuration_and_rules_and_each_alert_fires_on_what_it_is_for() -> None:
    promtool("check", "config", CONFIGS / "prometheus.yml")
    promtool("check", "rules", CONFIGS / "alerts.yml")
    promtool("test", "rules", ROOT / "tests" / "watching" / "alerts_test.yml")


def test_prometheus_scrapes_the_server_and_each_query_of_the_dashboard_gives_data(server: Live, tmp_path: Path) -> None:
    program("prometheus")
    with prometheus(f"127.0.0.1:{server.port}", tmp_path) as client:
        deadline = time.monotonic() + 20
        empty = dict(dashboard_queries())
        while empty and time.monotonic() < deadline:
            server.chat(messages=[{"role": "user", "content": "x" * 40}])
            server.chat(messages=[{"role": "user", "content": "too long" * 200}])
            empty = {panel: query for panel, query in empty.items() if not gives_data(values(client, filled(query)))}
        assert not empty
        assert not values(client, "count(ALERTS)")
        health = client.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert {rule["health"] for rule in health} <= {"ok", "unknown"}


def filled(query: str) -> str:
    """As Grafana fills it in."""
    return query.replace("$instance", ".*").replace("$__rate_interval", "4s")


def gives_data(found: list[float]) -> bool:
    return bool(found) and not all(map(math.isnan, found))
