"""Clients as they really are: they leave at any moment, read slowly, send half, are killed. Standard library only, for it runs as a process of its own too:
`python -m tests.api.chaos HOST PORT` asks and asks until it is killed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATH = "/v1/chat/completions"
ROOT = Path(__file__).parents[2]


def body_of(prompt: str, **options: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": prompt}], "temperature": 0, **options}).encode()


def said(reply: bytes, *, stream: bool) -> str:
    """Thinking and answer of a whole reply. Raises what a reply that is none raises."""
    if not stream:
        return text_of(json.loads(reply)["choices"][0]["message"])
    *lines, done = [line.removeprefix("data: ") for line in reply.decode().splitlines() if line.startswith("data: ")]
    assert done == "[DONE]", done
    return "".join([text_of(choice["delta"]) for line in lines for choice in json.loads(line)["choices"]])


def text_of(message: Mapping[str, Any]) -> str:
    return (message.get("reasoning_content") or "") + (message.get("content") or "")


def ask(address: tuple[str, int], prompt: str, *, stream: bool = False, slowly: random.Random | None = None) -> tuple[int, str]:
    """(status, what was said) of a client that behaves, though it may read slowly."""
    connection = http.client.HTTPConnection(*address, timeout=120)
    with contextlib.closing(connection):
        connection.request("POST", PATH, body_of(prompt, stream=stream), {"Content-Type": "application/json"})
        response = connection.getresponse()
        reply = b""
        while part := response.read1(slowly.randint(1, 400) if slowly else 65536):
            reply += part
            if slowly:
                time.sleep(0.002)
        return response.status, said(reply, stream=stream) if response.status == 200 else reply.decode()


@dataclass
class Chaos:
    """`run` sends requests of all kinds, and keeps account of what became of them."""

    address: tuple[str, int]
    answers: Mapping[str, str]  # prompt -> what the server says when it is asked alone
    seed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, requests: int, workers: int = 24) -> None:
        """So many requests, so many at a time."""
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(self._one, range(requests)))

    def _one(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        kinds: dict[Callable[[random.Random], str], int] = {
            self._behaves: 30, self._reads_slowly: 10, self._leaves_while_it_waits: 20, self._leaves_while_it_reads: 20,
            self._sends_half: 10, self._sends_half_and_stays: 3, self._sends_nonsense: 7,
        }  # fmt: skip
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        outcome = kind(rng)
        with self._lock:
            self.outcomes[f"{kind.__name__.strip('_')}: {outcome}"] += 1

    def _behaves(self, rng: random.Random, slowly: random.Random | None = None) -> str:
        """Its answer must be the one that it gets alone; where the queue is full it comes again."""
        prompt, stream = rng.choice(list(self.answers)), rng.random() < 0.6
        while True:
            status, text = ask(self.address, prompt, stream=stream, slowly=slowly)
            if status == 429:
                with self._lock:
                    self.outcomes["turned away with 429"] += 1
                time.sleep(rng.uniform(0.02, 0.2))
                continue
            if status != 200 or text != self.answers[prompt]:
                self.wrong.append(f"{status} {prompt!r} -> {text!r}")
            return "answered"

    def _reads_slowly(self, rng: random.Random) -> str:
        return self._behaves(rng, slowly=rng)

    def _leaves_while_it_waits(self, rng: random.Random) -> str:
        with self._sent(rng, self._request(rng)):
            time.sleep(rng.uniform(0, 0.2))
        return "left"

    def _leaves_while_it_reads(self, rng: random.Random) -> str:
        with self._sent(rng, self._request(rng)) as connection:
            for _ in range(rng.randint(1, 20)):
                if not connection.recv(rng.randint(1, 200)):
                    return "all read"
        return "left"

    def _sends_half(self, rng: random.Random) -> str:
        request = self._request(rng)
        with self._sent(rng, request[: rng.randrange(len(request))]):
            time.sleep(rng.uniform(0, 0.05))
        return "left"

    def _sends_half_and_stays(self, rng: random.Random) -> str:
        """Until the server has enough of it."""
        request = self._request(rng)
        with self._sent(rng, request[: rng.randrange(len(request))]) as connection, contextlib.suppress(ConnectionResetError):
            while connection.recv(1000):
                pass
        return "sent away"

    def _sends_nonsense(self, rng: random.Random) -> str:
        nonsense = [rng.randbytes(rng.randint(1, 300)), b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 7\r\n\r\n{{{{{{{"]
        with self._sent(rng, rng.choice(nonsense)) as connection:
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                return connection.recv(12).decode(errors="replace") or "closed"
        return "closed"

    def _request(self, rng: random.Random) -> bytes:
        body = body_of(rng.choice(list(self.answers)), stream=rng.random() < 0.6)
        return b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(body)) + body

    @contextlib.contextmanager
    def _sent(self, rng: random.Random, request: bytes) -> Any:
        """A connection over which that much was sent; it ends with a goodbye, or as a crash ends it."""
        with socket.create_connection(self.address, timeout=120) as connection:
            connection.sendall(request)
            yield connection
            if rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST


def kill_clients(address: tuple[str, int], clients: int, seed: int = 0) -> None:
    """Processes that ask without end, killed one after another in the midst of it."""
    rng = random.Random(seed)
    for _ in range(clients):
        with subprocess.Popen([sys.executable, "-m", "tests.api.chaos", address[0], str(address[1])], cwd=ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()  # it has begun
            time.sleep(rng.uniform(0.05, 0.5))
            child.send_signal(signal.SIGKILL)


def _ask_for_ever(address: tuple[str, int]) -> None:
    while True:
        ask(address, "x" * 40, stream=True)


if __name__ == "__main__":
    print("begun", flush=True)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(_ask_for_ever, (sys.argv[1], int(sys.argv[2])))
