"""`moespan serve`: check the model, take the port, load while /health answers, then serve until a signal.

What is cheap and may fail comes first: a wrong flag, a damaged file or a taken port is told within a second.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import socket
from argparse import Namespace

from server.cli.embedded import first_question
from server.cli.flags import config_of
from server.cli.load import load_chat, model_facts, model_file, model_id
from server.cli.logs import set_up_logging
from server.cli.machine import version
from server.config import ApiConfig, Config
from server.metrics import Metrics


def run(arguments: Namespace) -> int:
    """Serve; 0 after a signal, 130 after one in the first moment."""
    config = config_of(arguments)
    set_up_logging(arguments.verbose, config.api.log_format)
    file = model_file(config.model)
    from server.api.runner import Runner, bind
    from server.api.serving import Loaded, Serving

    listener = bind(config.api)
    serving = Serving(model_id(config.model, file), config, Metrics(), model_facts(file))
    serving.metrics.build.info({"version": version(), "python": platform.python_version()})
    url = address(config.api, listener)

    def load() -> Loaded:
        loaded = load_chat(config, file, serving.metrics)
        if serving.state != "stopping":
            print(welcome(serving.model_id, url, config), flush=True)
        return loaded

    runner = Runner(serving, listener, load)
    status = 0
    try:
        runner.run()
    except KeyboardInterrupt:  # before the server took the signals over
        status = 130
    if runner.loading:  # native code cannot be stopped in its tracks
        logging.shutdown()
        os._exit(status)
    return status


def address(api: ApiConfig, listener: socket.socket) -> str:
    """The URL at which this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(api.host, api.host)
    return f"{'https' if api.ssl_certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def welcome(model: str, url: str, config: Config) -> str:
    """Where the server is, and a line to try it with. A large model's reply is streamed; an embedded one's is there in a second."""
    api, stream = config.api, {} if config.model.gguf_path is None else {"stream": True}
    body = {"model": model, **stream, "temperature": 0, "messages": [{"role": "user", "content": first_question(config.model)}]}
    key = """ -H "Authorization: Bearer $API_KEY" """.rstrip() if api.api_key or api.api_key_file else ""
    insecure = " -k" if api.ssl_certfile else ""
    call = f"curl -N{insecure} {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"
    return f"\n{model} is ready at {url}/v1. Try:\n\n{call}\n"
