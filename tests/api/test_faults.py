"""A server process among clients that behave badly: it leaks nothing, answers those that behave as if they were alone, and is as ever afterwards."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.api.chaos import Chaos, ask, kill_clients
from tests.api.command import moespan_serve
from tests.api.live import wait_for
from tests.api.process import process

FAKE = ("max_queue=6", "read_timeout_s=1", "write_timeout_s=5")
MOST_THREADS = 55  # 40 of them are the pool in which bodies are read, which grows as it is needed
PROMPTS = ["", *("".join(random.Random(number).choices("abcdefgh äöü 🦙\n", k=number)) for number in range(1, 60, 3))]
QUESTIONS = ["What is 7 + 8?", "Who are you?", "What is 12 * 12?", "Sort these numbers: 5, 3, 9.", "你好"]


@dataclass(frozen=True)
class Held:
    """What a process has."""

    rss_mb: float
    files: int
    threads: int

    @staticmethod
    def by(process: psutil.Process) -> Held:
        return Held(process.memory_info().rss / 1e6, process.num_fds(), process.num_threads())


def wait_idle(address: str) -> None:
    """Until nothing runs, nothing waits, and no page is used."""
    idle = ["moespan_num_requests_running 0.0", "moespan_num_requests_waiting 0.0", "moespan_kv_cache_usage_perc 0.0"]
    wait_for(lambda: all(line in httpx.get(f"{address}/metrics").text.splitlines() for line in idle), 60)


def settled(child: psutil.Process, address: str, files: int | None = None) -> Held:
    """What the process holds once every connection is closed."""
    wait_idle(address)
    if files is not None:
        wait_for(lambda: child.num_fds() <= files, 20)
    return Held.by(child)


@contextmanager
def serving_fake() -> Iterator[tuple[psutil.Process, str]]:
    with process(0.0002, 5, *FAKE) as (child, address):
        wait_for(lambda: httpx.get(f"{address}/ready").status_code == 200)
        yield psutil.Process(child.pid), address


@contextmanager
def serving_tiny_r1() -> Iterator[tuple[psutil.Process, str]]:
    with moespan_serve("--max_queue", "6", "--read_timeout_s", "1", "--write_timeout_s", "5") as client:
        address = str(client.base_url).removesuffix("/v1/")
        port = urlsplit(address).port
        (listening,) = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN and each.laddr.port == port]
        yield psutil.Process(listening.pid), address


def run_faults(child: psutil.Process, address: str, prompts: list[str], requests: int, killed: int, growth_mb: float) -> None:
    """Faults, twice: what the first round makes the process hold, the second must not make more."""
    where = (str(urlsplit(address).hostname), int(urlsplit(address).port or 0))
    alone = {prompt: ask(where, prompt) for prompt in prompts}
    assert {status for status, _ in alone.values()} == {200}
    answers = {prompt: text for prompt, (_, text) in alone.items()}
    Chaos(where, answers, seed=1).run(max(requests // 10, 30))
    before = settled(child, address)
    chaos, start = Chaos(where, answers, seed=2), time.monotonic()
    killing = Thread(target=kill_clients, args=(where, killed))
    killing.start()
    chaos.run(requests)
    killing.join()
    after = settled(child, address, before.files)
    print(f"\n{requests} requests in {time.monotonic() - start:.1f} s, {killed} clients killed; before {before}, after {after}")
    print("\n".join(f"{count:6} {outcome}" for outcome, count in sorted(chaos.outcomes.items())))
    assert chaos.wrong == []
    assert after.files <= before.files
    assert after.threads <= MOST_THREADS
    assert after.rss_mb <= before.rss_mb + growth_mb
    assert {prompt: ask(where, prompt) for prompt in prompts} == alone
    check_account(chaos, address, requests)


def check_account(chaos: Chaos, address: str, requests: int) -> None:
    """The faults did happen, and the server's own counters say so."""
    counts = {re.sub(": .*", "", outcome): 0 for outcome in chaos.outcomes}
    for outcome, count in chaos.outcomes.items():
        counts[re.sub(": .*", "", outcome)] += count
    assert len(counts) >= 7
    assert sum(count for outcome, count in counts.items() if not outcome.startswith("turned")) == requests
    metrics = httpx.get(f"{address}/metrics").text
    assert re.search(r'moespan_request_success_total\{finished_reason="cancelled"\} [1-9]', metrics)
    assert re.search(r'moespan_request_failure_total\{error="QueueFull"\} [1-9]', metrics)
    assert not re.search(r'_total\{error="EngineFailure"\} [1-9]', metrics)


def test_a_server_among_clients_that_behave_badly() -> None:
    with serving_fake() as (child, address):
        run_faults(child, address, PROMPTS, requests=200, killed=2, growth_mb=8)


@pytest.mark.slow
def test_1800_faults() -> None:
    with serving_fake() as (child, address):
        run_faults(child, address, PROMPTS, requests=1800, killed=25, growth_mb=8)


@pytest.mark.slow
def test_200_faults_with_a_real_model() -> None:
    with serving_tiny_r1() as (child, address):
        run_faults(child, address, QUESTIONS, requests=200, killed=5, growth_mb=32)
