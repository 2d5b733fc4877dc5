"""Debian's Prometheus over a live server, for as long as a `with` block lasts; and the files that it and Grafana are given."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.api.live import wait_for

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SCRAPE = 0.25  # seconds


def program(name: str) -> str:
    """Where it is, on the PATH or where `make test` unpacks it; the test is skipped where it is not."""
    found = shutil.which(name) or shutil.which(name, path=str(ROOT / ".venv" / "prometheus" / "usr" / "bin"))
    if found is None:
        pytest.skip(f"{name} is not installed: apt install prometheus")
    return found


def promtool(*arguments: str | Path, stdin: bytes = b"") -> None:
    """Run it; what it complains of is the assertion's message."""
    done = subprocess.run([program("promtool"), *map(str, arguments)], input=stdin, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.decode()) == (0, ""), (done.stdout + done.stderr).decode()


def dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads((CONFIGS / "grafana" / "dashboards" / "moespan.json").read_text(encoding="utf-8"))
    return board


def dashboard_queries() -> dict[str, str]:
    """PromQL by the panel's title and the query's letter."""
    return {f"{panel['title']} {target['refId']}": target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]}


@contextmanager
def prometheus(target: str, directory: Path) -> Iterator[httpx.Client]:
    """A client of a Prometheus that has scraped the target (host:port) with the repository's own configuration, but more often."""
    config = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{int(SCRAPE * 1000)}ms", "scrape_timeout": "200ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIGS / "alerts.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program("prometheus"), f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data", f"--web.listen-address={address}"]
    with open(directory / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as child, httpx.Client(base_url=f"http://{address}") as client:
        try:
            wait_for(lambda: values(client, 'up{job="moespan"}') == [1.0], seconds=30)
            yield client
        finally:
            child.terminate()
            child.wait(20)


def values(client: httpx.Client, query: str) -> list[float]:
    """What the query gives just now; nothing where Prometheus is not there yet."""
    try:
        reply = client.get("/api/v1/query", params={"query": query}).json()
    except (httpx.HTTPError, ValueError):
        return []
    assert reply["status"] == "success", (query, reply)
    return [float(result["value"][1]) for result in reply["data"]["result"]]
