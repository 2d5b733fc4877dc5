"""What runs the server for good: the images' file, compose, and systemd's unit, held to the command line, the Makefile and each other."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from server.cli.flags import config_of, parse
from server.config import Config

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]
    return found


def filled(text: str, **variables: str) -> str:
    """With ${NAME:-default} replaced, as compose does it."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1], found[2]), text)


def configured(words: list[str]) -> Config:
    """What a command line of `moespan` means; an unknown flag is an error."""
    return config_of(parse(words))


def test_the_images_have_the_makefiles_torch() -> None:
    pin = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert pin is not None
    assert re.findall(r'^ARG TORCH="?(torch==[\d.]+)', DOCKERFILE, re.MULTILINE) == [pin[1], pin[1]]


def test_both_images_run_as_a_user_and_say_whether_they_are_alive() -> None:
    assert len(re.findall(r"^FROM base AS (cpu|cuda)$", DOCKERFILE, re.MULTILINE)) == 2
    assert len(re.findall(r"^USER \d+$", DOCKERFILE, re.MULTILINE)) == 2
    assert "HEALTHCHECK" in DOCKERFILE
    assert "/health" in DOCKERFILE


def test_the_images_command_is_one_of_ours() -> None:
    found = re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    config = configured(json.loads(found[1]))
    assert (config.api.host, config.api.port) == ("0.0.0.0", 10002)


def test_the_build_gets_all_that_it_copies() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored


def test_composes_server_is_reached_by_the_others_and_by_this_machine_alone() -> None:
    words = shlex.split(filled(services()["server"]["command"], MODEL_FLAGS="--gguf_path /models/m.gguf"))
    config = configured(words)
    assert config.model.gguf_path == Path("/models/m.gguf")
    assert configured(shlex.split(filled(services()["server"]["command"]))).model.model == "tiny-r1"
    assert config.api.allowed_hosts == ("server",)
    assert services()["open-webui"]["environment"]["OPENAI_API_BASE_URL"] == f"http://server:{config.api.port}/v1"
    scraped = yaml.safe_load((DOCKER / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert [job["static_configs"][0]["targets"] for job in scraped] == [[f"server:{config.api.metrics_port}"]]
    assert config.api.metrics_host == "0.0.0.0"
    for service in services().values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_compose_gives_a_reply_the_time_that_the_server_gives_it() -> None:
    assert int(services()["server"]["stop_grace_period"].rstrip("s")) > Config().scheduler.grace_s


def test_compose_mounts_what_there_is() -> None:
    named = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["volumes"]
    for service in services().values():
        for volume in service["volumes"]:
            source = filled(volume).split(":")[0]
            assert source in named or source == "../models" or (DOCKER / source).exists(), source
            assert source in named or volume.endswith(":ro")


def test_both_prometheus_configurations_scrape_alike() -> None:
    inside, outside = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (DOCKER / "prometheus.yml", ROOT / "configs" / "prometheus.yml"))
    for config in (inside, outside):
        config["scrape_configs"][0].pop("static_configs")
    assert inside == outside


def test_the_unit_starts_what_there_is() -> None:
    lines = (ROOT / "configs" / "moespan.service").read_text(encoding="utf-8").splitlines()
    unit = dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))
    program, *words = shlex.split(unit["ExecStart"])
    assert Path(program).name == "moespan"
    config = configured([str(ROOT / "configs" / "server.yaml") if word == "/etc/moespan/server.yaml" else word for word in words])
    assert config.api.log_format == "json"
    assert float(unit["TimeoutStopSec"]) > config.scheduler.grace_s
