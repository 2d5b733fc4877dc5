"""Who may talk to the server: keys, names, web pages, TLS, and the metrics' own port."""

from __future__ import annotations

import logging
import shutil
import socket
import ssl
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.api.auth import all_keys
from server.api.guard import is_loopback
from server.api.runner import Runner, bind
from server.api.serving import Serving
from server.config import ApiConfig, Config
from server.errors import ConfigError, DeviceError
from server.metrics import Metrics
from tests.api.live import MODEL, USER, Live, live

CHAT = "/v1/chat/completions"
EVIL = "http://evil.example"


# --- Keys ---


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text("# of the team\n\nsk-three\n  sk-four  \n", encoding="utf-8")
    file.chmod(0o600)
    with live(api_key=("sk-one", "sk-two"), api_key_file=file, cors_origins=("http://localhost:3000",)) as server:
        yield server


@pytest.mark.parametrize("key", ["sk-one", "sk-two", "sk-three", "sk-four"])
@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_every_key_opens_in_either_header(locked: Live, key: str, header: str) -> None:
    value = f"bearer {key}" if header == "authorization" else key
    assert locked.post(CHAT, {"messages": USER}, headers={header: value}).status_code == 200


@pytest.mark.parametrize("key", ["-", "sk-", "sk-onex", "sk-one,sk-two", "# of the team", "schlüssel", "x" * 1000])
def test_anything_else_does_not(locked: Live, key: str) -> None:
    for headers in ({"authorization": f"Bearer {key}".encode()}, {"x-api-key": key.encode()}, {"authorization": f"Basic {key}".encode()}):
        reply = locked.get("/v1/models", headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(("bearer", "other"), [("sk-one", "sk-of-another-server"), ("sk-of-another-server", "sk-one"), ("", "sk-one"), ("sk-one", "")])
def test_of_two_keys_either_opens(locked: Live, bearer: str, other: str) -> None:
    assert locked.get("/v1/models", headers={"authorization": f"Bearer {bearer}".strip(), "x-api-key": other}).status_code == 200


def test_two_wrong_keys_are_wrong_and_two_empty_ones_missing(locked: Live) -> None:
    said = [locked.get("/v1/models", headers={"authorization": f"Bearer {key}".strip(), "x-api-key": key}).json()["error"]["message"] for key in ("sk-x", "")]
    assert ["wrong" in said[0], "missing" in said[1]] == [True, True]


def test_every_path_is_locked_but_those_of_probes(locked: Live) -> None:
    paths = ["/v1/models", "/v1/models/x", CHAT, "/tokenize", "/metrics", "/openapi.json", "/docs", "/nowhere", "/health/x", "/health/", "/HEALTH"]
    assert {path: locked.get(path).status_code for path in paths} == dict.fromkeys(paths, 401)
    assert [locked.get(path).status_code for path in ("/health", "/ready")] == [200, 200]


def test_a_file_of_keys_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: No such file or directory. Check --api_key_file"):
        all_keys(ApiConfig(api_key_file=tmp_path / "none"))
    (tmp_path / "empty").write_text("# none yet\n")
    with pytest.raises(ConfigError, match="There is no key in"):
        all_keys(ApiConfig(api_key_file=tmp_path / "empty"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        all_keys(ApiConfig(api_key_file=tmp_path / "binary"))


@pytest.mark.parametrize(("mode", "warned"), [(0o644, True), (0o640, False), (0o600, False)])
def test_a_file_of_keys_that_everybody_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-secret")
    file.chmod(mode)
    assert all_keys(ApiConfig(api_key=("a",), api_key_file=file)) == ("a", "sk-secret")
    assert ("chmod 600" in caplog.text) is warned
    assert "sk-secret" not in caplog.text


@pytest.mark.parametrize(("host", "keys", "warned"), [("0.0.0.0", (), True), ("0.0.0.0", ("k",), False), ("127.0.0.1", (), False)])
def test_a_server_that_is_open_to_the_network_without_a_key_is_warned_of(
    caplog: pytest.LogCaptureFixture, host: str, keys: tuple[str, ...], warned: bool
) -> None:
    with caplog.at_level(logging.WARNING), live(host=host, api_key=keys) as server:
        assert server.get("/health").status_code == 200
    assert ("it asks for no key" in caplog.text) is warned


# --- Names and web pages ---


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "127.1.2.3", "[::1]:80", "chat.localhost"])
def test_this_machine_s_names_are_known(server: Live, host: str) -> None:
    assert server.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example:10002", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0", "192.168.1.5", "", "[::1", "a@localhost@b"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/"])
def test_a_name_that_is_not_known_is_refused(server: Live, host: str, path: str) -> None:
    """What DNS rebinding needs."""
    reply = server.get(path, headers={"host": host})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden")
    assert "--allowed_hosts" in reply.json()["error"]["message"]


@pytest.mark.parametrize("origin", [EVIL, "https://localhost.evil.example", "null", "http://", "http://[", "https://localhost@evil.example"])
@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_a_foreign_web_page_cannot_start_work(server: Live, origin: str, content_type: str) -> None:
    """A page may send text/plain anywhere without being asked; it must not even keep the engine busy."""
    steps = len(server.engine.steps)
    reply = server.request("POST", CHAT, content=b'{"messages":[{"role":"user","content":"hi"}]}', headers={"origin": origin, "content-type": content_type})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden")
    assert "access-control-allow-origin" not in reply.headers
    assert len(server.engine.steps) == steps


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:8080", "https://[::1]", "tauri://localhost", "app://obsidian.md"])
def test_pages_of_this_machine_and_applications_are_no_strangers(server: Live, origin: str) -> None:
    reply = server.post(CHAT, {"messages": USER}, headers={"origin": origin})
    assert reply.status_code == 200
    assert "access-control-allow-origin" not in reply.headers  # to read it, a page of another port needs --cors_origins


def test_names_that_were_allowed() -> None:
    with live(allowed_hosts=("host.docker.internal", "Box")) as server:
        statuses = {host: server.get("/v1/models", headers={"host": host}).status_code for host in ("host.docker.internal:10002", "box", "localhost", "x")}
        assert statuses == {"host.docker.internal:10002": 200, "box": 200, "localhost": 200, "x": 403}
        assert server.get("/v1/models", headers={"origin": "http://box:3000"}).status_code == 200
    with live(allowed_hosts=("*",)) as server:
        assert server.get("/v1/models", headers={"host": "x", "origin": EVIL}).status_code == 200


def test_with_a_key_the_key_decides() -> None:
    with live(api_key=("k",)) as server:
        assert server.get("/v1/models", headers={"host": "llm.example.com", "x-api-key": "k", "origin": EVIL}).status_code == 200
    with live(api_key=("k",), allowed_hosts=("llm.example.com",)) as server:
        statuses = [server.get("/v1/models", headers={"host": host, "x-api-key": "k"}).status_code for host in ("llm.example.com", "other.example.com")]
        assert statuses == [200, 403]


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("", False), ("10.0.0.1", False)])
def test_what_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def preflight(server: Live, origin: str) -> httpx.Response:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return server.request("OPTIONS", CHAT, headers={"origin": origin, **asked})


def test_cors_is_for_the_pages_that_were_named(locked: Live) -> None:
    allowed = preflight(locked, "http://localhost:3000")
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "http://localhost:3000")
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    refused = preflight(locked, EVIL)
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (400, False)
    for key, status in (("sk-one", 200), ("wrong", 401)):  # a page can read what is wrong, too
        reply = locked.post(CHAT, {"messages": USER, "stream": True}, headers={"origin": "http://localhost:3000", "x-api-key": key})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, "http://localhost:3000")
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
    assert reply.json()["error"]["code"] == "invalid_api_key"


def test_cors_lets_a_stream_through_as_it_comes() -> None:
    with live(cors_origins=("*",)) as server:
        assert preflight(server, EVIL).headers["access-control-allow-origin"] == "*"
        with httpx.stream("POST", f"http://127.0.0.1:{server.port}{CHAT}", json={"messages": USER, "stream": True}, headers={"origin": EVIL}) as reply:
            assert reply.headers["access-control-allow-origin"] == "*"
            assert list(reply.iter_lines())[-2] == "data: [DONE]"


# --- TLS, the metrics' port ---


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_https_from_tls_1_2_on(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with live(ssl_keyfile=key, ssl_certfile=certificate) as server:
        address, context = f"https://127.0.0.1:{server.port}", ssl.create_default_context(cafile=certificate)
        lines = httpx.post(f"{address}{CHAT}", json={"messages": USER, "stream": True}, verify=context).text.splitlines()
        assert lines[-2] == "data: [DONE]"
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings(action="ignore"):  # of its age
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection(("127.0.0.1", server.port)) as plain, pytest.raises(ssl.SSLError):
            old.wrap_socket(plain)
        with socket.create_connection(("127.0.0.1", server.port)) as plain:  # http where https is spoken
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            plain.settimeout(10)
            assert plain.recv(100)[:4] != b"HTTP"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_metrics_on_a_port_of_their_own_need_no_key() -> None:
    port = free_port()
    with live(api_key=("k",), metrics_port=port) as server:
        assert "moespan_num_requests_running 0.0" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert server.get("/metrics").status_code == 401
        assert server.get("/metrics", headers={"x-api-key": "k"}).status_code == 404
    with pytest.raises(httpx.ConnectError):  # it ends with the server
        httpx.get(f"http://127.0.0.1:{port}/metrics")


def test_metrics_on_the_api_s_port_need_the_key(locked: Live) -> None:
    assert "moespan_" in locked.get("/metrics", headers={"authorization": "Bearer sk-one"}).text
    assert locked.get("/metrics").status_code == 401


def test_a_metrics_port_that_is_taken(server: Live) -> None:
    config = ApiConfig(port=0, metrics_port=server.port)
    runner = Runner(Serving(MODEL, Config(api=config), Metrics()), bind(config), lambda: pytest.fail("loaded nevertheless"))
    with pytest.raises(DeviceError, match=rf"port {server.port}: Address already in use. Stop what uses it, or choose another with --metrics_port"):
        runner.run()
