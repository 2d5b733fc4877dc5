"""The page at `/`: each file is served with a strict policy, nothing in it reaches outside, and /stats has what it shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from server.api.routes import page
from server.types import EngineUse
from tests.api.live import MODEL, Live, live

FILES = sorted(file.name for file in page.FILES.iterdir())


class References(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def all(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


def test_the_page_is_served_under_a_policy_that_lets_nothing_in_or_out(server: Live) -> None:
    reply = server.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self'", "connect-src": "'self'",
        "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert server.request("HEAD", "/").status_code == 200


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_served_once_and_then_by_its_etag(server: Live, name: str) -> None:
    reply = server.get(f"/page/{name}")
    assert (reply.status_code, reply.content) == (200, (page.FILES / name).read_bytes())
    assert reply.headers["content-type"] == page.TYPES[Path(name).suffix]
    again = server.get(f"/page/{name}", headers={"If-None-Match": reply.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["", "none.js", "..%2fpage.py", "../routes/page.py"])
def test_there_are_no_other_files(server: Live, name: str) -> None:
    assert server.get(f"/page/{name}").status_code == 404


def test_what_the_page_asks_for_is_there_and_nothing_is_elsewhere(server: Live) -> None:
    references = References(server.get("/").text)
    asked = [address for address in references.all("href", "src") if not address.startswith("#")]
    assert {"/page/page.css", "/page/page.js"} <= set(asked)
    for address in asked:
        assert address.startswith("/page/")
        assert server.get(address).status_code == 200
    assert not references.all("style", *(f"on{event}" for event in ("click", "load", "error", "submit", "input")))
    assert "iframe" not in references.tags


def test_the_files_name_no_other_host_and_make_no_html_of_text() -> None:
    for file in page.FILES.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]{2,}", text, re.IGNORECASE), file
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|@import|url\(", text), file


def test_modules_import_modules_that_there_are() -> None:
    for file in page.FILES.glob("*.js"):
        imported = re.findall(r'^import .* from "\./(.*)";$', file.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(imported) <= set(FILES)


def test_each_word_of_the_page_has_its_chinese() -> None:
    references = References((page.FILES / "page.html").read_text(encoding="utf-8"))
    chinese = (page.FILES / "words.js").read_text(encoding="utf-8").partition("const CHINESE")[2]
    wanted = set(references.all("data-text", "data-label", "data-hint", "data-placeholder"))
    assert len(wanted) > 20
    assert wanted <= set(re.findall(r"\b(\w+):", chinese))


def test_ids_that_the_script_looks_for_are_in_the_page() -> None:
    ids = set(References((page.FILES / "page.html").read_text(encoding="utf-8")).all("id"))
    assert set(re.findall(r'\bat\("([\w-]+)"\)', (page.FILES / "page.js").read_text(encoding="utf-8"))) <= ids


@pytest.fixture
def keyed() -> Iterator[Live]:
    with live(api_key=("secret",)) as server:
        yield server


def test_with_a_key_the_page_is_open_and_the_figures_are_not(keyed: Live) -> None:
    assert keyed.get("/").status_code == 200
    assert keyed.get("/page/page.js").status_code == 200
    assert keyed.get("/stats").status_code == 401
    assert keyed.get("/stats", headers={"Authorization": "Bearer secret"}).json()["model"] == MODEL


def test_stats_has_what_the_page_shows(server: Live) -> None:
    before = server.get("/stats").json()
    assert (before["model"], before["state"], before["engine"]) == (MODEL, "ready", None)
    server.chat()
    after = server.get("/stats").json()
    assert after["generation_tokens"] - before["generation_tokens"] == len("u:hello\na:") + 1
    assert after["prompt_tokens"] - before["prompt_tokens"] == len("u:hello\na:")
    assert after["clock_s"] > before["clock_s"]
    assert after["decode_s"] > before["decode_s"]
    assert (after["running"], after["waiting"], after["kv_tokens"], after["queue_capacity"]) == (0, 0, 1024, 64)
    server.serving.metrics.watch_engine(lambda: EngineUse(4, 1.5, 100, 10, 1))
    assert server.get("/stats").json()["engine"] == {"pool_threads": 4, "pool_busy_s": 1.5, "expert_bytes": 101, "dense_bytes": 10, "gpu": None}
    server.serving.metrics.watch_engine(lambda: None)
