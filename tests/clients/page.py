"""The built-in page in a real browser: `python -m tests.clients.page [--screenshots DIRECTORY]`.

It needs Debian's chromium and `pip install playwright` (no download of a browser), which is why it is not among the tests that always run. The servers are
real ones: over the fake engine, which repeats what it is told, for what the page does with text; and with Tiny R1 for thinking and for the screenshots.
"""

from __future__ import annotations

import argparse
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, expect, sync_playwright

from server.api.runner import Runner, bind
from server.api.serving import Loaded, Serving
from server.config import ApiConfig, Config
from server.metrics import Metrics
from server.scheduler.service import Service
from server.text.template import ChatTemplate
from tests.api.command import moespan_serve
from tests.api.live import MODEL, TEMPLATE, Live, fake_tokenizer, live, wait_for
from tests.fakes import FakeEngine

MARKDOWN = """# Title
Some **bold**, *slanted* and `code` with <img src=x onerror="document.title='broken'"><script>document.title='broken'</script>

- one
- two
  - inner

1. first
2. second

| a | b |
|---|---|
| 1 | [link](https://example.org/x) |

> said

```python
print("<b>not bold</b>")
```
[bad](javascript:alert(1)) ends."""


@contextmanager
def page_of(
    browser: Browser, url: str, width: int = 1100, height: int = 760, scheme: Literal["dark", "light"] = "light", language: str = "en-GB"
) -> Iterator[Page]:
    """A page in a context of its own that must neither log an error nor ask for anything elsewhere."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, locale=language)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" and "status of 4" not in message.text else None)
    page.on("request", lambda request: None if request.url.startswith(url) else troubles.append(request.url))
    page.goto(url)
    yield page
    context.close()
    assert not troubles, troubles


def say(page: Page, text: str) -> None:
    """Send a message and wait for the reply's end."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:not([hidden])")


def text_is_text(browser: Browser, server: Live) -> None:
    """Markdown becomes nodes, and HTML in a reply stays text."""
    with page_of(browser, f"http://127.0.0.1:{server.port}/") as page:
        expect(page.locator("#state")).to_have_text("ready")
        say(page, MARKDOWN)
        reply = page.locator(".message.assistant .text").last
        for selector, text in (("strong", "bold"), ("em", "slanted"), ("p code", "code"), ("ul ul li", "inner"), ("td >> nth=0", "1"), ("blockquote", "said")):
            expect(reply.locator(selector)).to_have_text(text)
        assert reply.locator("ol > li").count() == 2
        assert reply.locator("a").evaluate_all("links => links.map(a => a.href)") == ["https://example.org/x"]
        expect(reply.locator("pre code")).to_have_text('print("<b>not bold</b>")')
        assert page.locator("#chat img, #chat script, #chat b").count() == 0
        assert page.title() != "broken"
        page.locator(".code button").last.click()
        assert page.evaluate("navigator.clipboard.readText()") == 'print("<b>not bold</b>")'


def however_deep(browser: Browser, server: Live) -> None:
    """Quotes and lists within each other, however many, do not stop the page; the innermost stay text."""
    drawn = "async (text) => { const box = document.createElement('div'); (await import('/page/text.js')).render(box, text); return box.outerHTML; }"
    with page_of(browser, f"http://127.0.0.1:{server.port}/") as page:
        for deep in (">" * 20_000, "1. " * 20_000, "- > " * 20_000):
            assert "end<" in page.evaluate(drawn, deep + "end")
        assert page.evaluate(drawn, "> > 1. said").count("<blockquote>") == 2


def stop_and_again(browser: Browser, server: Live) -> None:
    """Stop ends the request in the engine; a reply can be drawn anew; a reload keeps the conversation and a new chat forgets it."""
    with page_of(browser, f"http://127.0.0.1:{server.port}/") as page:
        server.engine.step_s = 0.02
        page.fill("#prompt", "x" * 300)
        page.press("#prompt", "Enter")
        expect(page.locator(".assistant > .text")).to_contain_text("xxxxx")
        assert server.service.open == 1
        page.keyboard.press("Escape")
        wait_for(lambda: server.service.open == 0)
        expect(page.locator(".foot span")).to_contain_text("stopped")
        server.engine.step_s = 0.0
        page.get_by_role("button", name="Again").click()
        expect(page.locator(".message.assistant")).to_contain_text("x" * 300)
        page.get_by_role("button", name="Copy").click()
        assert "x" * 300 in page.evaluate("navigator.clipboard.readText()")
        page.reload()
        assert page.locator(".message").count() == 2
        page.get_by_role("button", name="New chat").click()
        assert page.locator(".message").count() == 0


def settings(browser: Browser) -> None:
    """The page asks for the key; system prompt and limits are sent; errors are told in the server's words."""
    with live(FakeEngine(), api_key=("secret",)) as server, page_of(browser, f"http://127.0.0.1:{server.port}/") as page:
        expect(page.locator("#settings")).to_be_visible()
        expect(page.locator("#key")).to_be_focused()
        page.fill("#key", "secret")
        page.fill("#system", "be brief")
        page.fill("#max-tokens", "10")
        page.get_by_role("button", name="Done").click()
        expect(page.locator("#state")).to_have_text("ready")
        say(page, "hello")
        expect(page.locator(".message.assistant .text").last).to_have_text("s:be brief")
        expect(page.locator(".foot")).to_contain_text("ended at the limit of tokens")
        say(page, "y" * 1100)
        expect(page.locator(".problem")).to_contain_text("tokens")
        assert page.input_value("#prompt") == "y" * 1100


def keyboard(browser: Browser, server: Live) -> None:
    """Everything is reached without a mouse, and each control has a name."""
    with page_of(browser, f"http://127.0.0.1:{server.port}/") as page:
        expect(page.locator("#prompt")).to_be_focused()
        reached = set()
        for _ in range(8):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        assert {"new", "open-settings", "chat", "prompt", "send", "skip"} <= reached, reached
        page.focus("#open-settings")
        page.keyboard.press("Enter")
        expect(page.locator("#settings")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#settings")).to_be_hidden()
        unnamed = "nodes => nodes.filter(n => !n.innerText && !n.labels?.length && !n.ariaLabel).map(n => n.id)"
        assert page.locator("button:visible, input, textarea").evaluate_all(unnamed) == []


def small_screens(browser: Browser, server: Live) -> None:
    """Nothing is wider than a small phone, in English and in Chinese."""
    for language, button in (("en-GB", "Send"), ("zh-CN", "发送")):
        with page_of(browser, f"http://127.0.0.1:{server.port}/", 320, 560, "dark", language) as page:
            say(page, MARKDOWN + " " + "w" * 200)
            assert page.evaluate("document.documentElement.scrollWidth") <= 320
            expect(page.locator("#send")).to_have_text(button)


def loading(browser: Browser) -> None:
    """While the model is read the page says how far it is, and then it is ready without a reload."""
    let_go, serving = threading.Event(), Serving(MODEL, Config(api=ApiConfig(port=0)), Metrics())
    service = Service(FakeEngine(), serving.config.scheduler, 1024, serving.metrics)

    def load() -> Loaded:
        let_go.wait(30)
        return Loaded(service, fake_tokenizer(), ChatTemplate(TEMPLATE))

    listener = bind(serving.config.api)
    runner = Runner(serving, listener, load)
    thread = threading.Thread(target=runner.run)
    thread.start()
    with page_of(browser, f"http://127.0.0.1:{listener.getsockname()[1]}/") as page:
        expect(page.locator("#loading-text")).to_have_text("The model's file is being opened.")
        serving.metrics.loading(94_300_000_000, 377_200_000_000)
        expect(page.locator("#loading-text")).to_have_text("The model is being read: 94 of 377 GB.")
        assert page.locator("#loading-bar").evaluate("bar => bar.value") == 0.25
        serving.metrics.loading(377_200_000_000, 377_200_000_000)
        expect(page.locator("#loading-text")).to_contain_text("warmed up")
        let_go.set()
        expect(page.locator("#loading")).to_be_hidden()
        expect(page.locator("#state")).to_have_text("ready")
    runner.stop()
    thread.join(20)


def thinking(browser: Browser, screenshots: Path | None) -> None:
    """Thinking is folded, and opens; speeds are shown; and the screenshots."""
    with moespan_serve("--force_think", "--cache_lens", "2048") as client:
        url = re.sub(r"v1/?$", "", str(client.base_url))
        screens: list[tuple[str, int, int, Literal["dark", "light"]]] = [("page", 1100, 760, "light"), ("page-phone", 390, 780, "dark")]
        for name, width, height, scheme in screens:
            with page_of(browser, url, width, height, scheme) as page:
                say(page, "How many letters r are there in strawberry?")
                expect(page.locator(".thinking").last).not_to_have_attribute("open", "")
                expect(page.locator(".text").last).to_contain_text("3")
                say(page, "Sort 51, 77, 90, 12 and 3.")
                page.locator(".thinking summary").last.click()
                expect(page.locator(".thinking .text").last).to_be_visible()
                expect(page.locator("#decode")).to_have_text(re.compile(r"\d"))
                expect(page.locator("#pool")).to_have_text(re.compile(r"\d"))
                page.wait_for_timeout(2500)
                if screenshots:
                    page.screenshot(path=screenshots / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    arguments = parser.parse_args()
    with sync_playwright() as playwright, live(FakeEngine(num_pages=128), cache_lens=1024) as server:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox", "--disable-gpu"])
        for check in (text_is_text, however_deep, stop_and_again, keyboard, small_screens):
            check(browser, server)
            print(f"{check.__name__}: well")
        for alone in (settings, loading):
            alone(browser)
            print(f"{alone.__name__}: well")
        thinking(browser, arguments.screenshots)
        print("thinking: well")
        browser.close()


if __name__ == "__main__":
    main()
