"""From an open port to the exit status: the port is bound first, the model loads in a thread while /health answers, SIGTERM drains.

On the first SIGTERM or SIGINT the waiting requests get 503 and the running one may finish within the grace time; only then does the HTTP server
stop, so that every reply has left. A second signal ends the running request as well; one that comes within a second of the first is the same
signal, sent to the process and to its group.
"""

from __future__ import annotations

import errno
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from prometheus_client import start_http_server
from sse_starlette.sse import AppStatus

from server.api.app import create_app
from server.api.connection import Listener, most_connections, with_limits
from server.api.serving import Loaded, Serving
from server.config import ApiConfig
from server.errors import ConfigError, DeviceError

log = logging.getLogger(__name__)

SAME_SIGNAL_S = 1.0
IDLE_CONNECTION_S = 75  # longer than proxies and clients keep theirs, so that none sends into a connection that just closes
DEAD_CLIENT_S = 60  # of silence, after which the kernel asks whether the client is still there (and six times more, 10 s apart)
CLOSING_S = 5  # for replies that are written but not read yet, once the engine has nothing left to do


def bind(config: ApiConfig) -> socket.socket:
    """The listening socket, before anything expensive happens. DeviceError when the port or the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = Listener(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _notice_dead_clients(listener)
    try:
        listener.bind((config.host, config.port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise _cannot_listen(config.host, config.port, error) from error
    return listener


def _notice_dead_clients(listener: socket.socket) -> None:
    """For its connections too: one whose machine lost power sends no goodbye, and would be waited for as long as its request takes."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, DEAD_CLIENT_S), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6)):
        listener.setsockopt(socket.IPPROTO_TCP, option, value)


def _cannot_listen(host: str, port: int | None, error: Exception, prefix: str = "") -> DeviceError:
    """`prefix` is what the flags of this address begin with."""
    remedies = {
        errno.EADDRINUSE: f"Stop what uses it, or choose another with --{prefix}port.",
        errno.EACCES: f"Ports below 1024 are the system's: choose another with --{prefix}port.",
    }
    own = f"--{prefix}host wants an address of this machine: 127.0.0.1 for itself alone, 0.0.0.0 for every network."
    remedy = remedies.get(getattr(error, "errno", 0), own)
    return DeviceError(f"Cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}. {remedy}")


class Runner:
    """One server process: `Runner(serving, listener, load).run()`."""

    def __init__(self, serving: Serving, listener: socket.socket, load: Callable[[], Loaded]) -> None:
        self._serving = serving
        self._listener = listener
        self._load = load
        self._loaded: Loaded | None = None
        self._failure: BaseException | None = None
        self._loading = threading.Thread(target=self._load_model, name="load", daemon=True)
        self._signalled_at = 0.0  # time.monotonic()
        self._server = _Server(_uvicorn_config(serving), self._on_signal)
        # Streams end because their requests end; the library would cut them at the signal.
        AppStatus.enable_automatic_graceful_drain = False

    def run(self) -> None:
        """Serve until a signal. Raises what `load` raised. Call it in the main thread, for the signals."""
        with _metrics_server(self._serving):
            self._loading.start()
            self._server.run(sockets=[self._listener])
        if self._loaded is not None:
            self._loaded.service.close()
        if self._failure is not None:
            raise self._failure

    @property
    def loading(self) -> bool:
        """Whether the model is being loaded, which `run` does not wait for. The interpreter must not end under such a thread: os._exit does."""
        return self._loading.is_alive()

    def stop(self) -> None:
        """Drain in a thread of its own, then end the server; what a signal does."""
        self._serving.stop()
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _load_model(self) -> None:
        try:
            self._loaded = self._load()
        except BaseException as error:
            self._failure = error
            self._server.should_exit = True
            return
        self._serving.ready(self._loaded)

    def _on_signal(self, number: int) -> None:
        if self._serving.state == "stopping":
            if time.monotonic() - self._signalled_at > SAME_SIGNAL_S:
                log.warning("A second signal: the running request is ended.")
                threading.Thread(target=self._end, name="end", daemon=True).start()
            return
        self._signalled_at = time.monotonic()
        name = signal.Signals(number).name
        if self._loaded is None:
            log.info("%s: the model is not loaded any further.", name)
        else:
            log.info("%s: no new requests; the running one has %g s to finish.", name, self._serving.config.scheduler.grace_s)
        self.stop()

    def _drain(self) -> None:
        if self._loaded is not None:
            self._loaded.service.drain(self._serving.config.scheduler.grace_s)
        self._end()

    def _end(self) -> None:
        if self._loaded is not None:
            self._loaded.service.close()  # what has not ended by now hears so
        self._server.should_exit = True


@contextmanager
def _metrics_server(serving: Serving) -> Iterator[None]:
    """/metrics on --metrics_port, if there is one. DeviceError when it cannot be had."""
    host, port = serving.config.api.metrics_host, serving.config.api.metrics_port
    if port is None:
        yield
        return
    try:
        server, thread = start_http_server(port, host, serving.metrics.registry)
    except (OSError, OverflowError) as error:
        raise _cannot_listen(host, port, error, "metrics_") from error
    log.info("Metrics are at http://%s:%d/metrics, without a key.", f"[{host}]" if ":" in host else host, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(uvicorn.Server):
    """uvicorn, with its signals handed to the runner: by itself it stops at once and raises the signal again, so that the exit status is not 0."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[int], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal(sig)


def _uvicorn_config(serving: Serving) -> uvicorn.Config:
    api = serving.config.api
    config = uvicorn.Config(
        create_app(serving),
        ssl_keyfile=api.ssl_keyfile,
        ssl_certfile=api.ssl_certfile,
        http=with_limits(api.read_timeout_s, api.write_timeout_s, most_connections(serving.config.scheduler.max_queue)),
        ws="none",
        lifespan="off",
        server_header=False,
        timeout_keep_alive=IDLE_CONNECTION_S,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=CLOSING_S,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"The TLS files cannot be used: {error}. Check --ssl_keyfile and --ssl_certfile.") from error
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return config
