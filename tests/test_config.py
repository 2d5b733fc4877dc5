"""Merging, and the sentence for every bad value: whoever meets one must read what to do."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from server.cli.flags import HELP
from server.config import KEYS, SECTIONS, ApiConfig, Config, EngineConfig, ModelConfig, load_config
from server.errors import ConfigError

SHIPPED = Path(__file__).parent.parent / "configs" / "server.yaml"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        file = tmp_path / "server.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_nothing_given_is_the_defaults():
    assert load_config() == Config()


def test_keys_are_unique_over_the_sections():
    assert len(KEYS) == sum(len(fields(kind)) for kind in SECTIONS.values())


def test_the_shipped_file_shows_every_key_with_its_default():
    tree = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    assert {(section, key) for section, keys in tree.items() for key in keys} == {(section, key) for key, section in KEYS.items()}
    assert load_config(SHIPPED) == Config()
    for section, keys in tree.items():
        for key, value in keys.items():
            shown = tuple(value) if isinstance(value, list) else value
            assert shown == getattr(SECTIONS[section](), key), f"{section}.{key}"


def test_every_key_has_a_flag_that_says_what_it_does():
    assert list(HELP) == list(KEYS)


def test_the_file_wins_over_defaults_and_flags_win_over_the_file(write):
    file = write("engine: {cpu_infer: 3, cache_lens: 4096}\napi: {port: 8080}\n")
    config = load_config(file, {"cpu_infer": "5", "force_think": "true"})
    assert config.engine == EngineConfig(cpu_infer=5, cache_lens=4096)
    assert config.api == ApiConfig(port=8080, force_think=True)


def test_values_get_their_field_s_type(write):
    config = load_config(write("api: {force_think: 'on', keep_alive_s: 2}"), {"gguf_path": "~/m.gguf", "grace_s": "1.5", "port": "0"})
    assert config.api.force_think is True
    assert isinstance(config.api.keep_alive_s, float)
    assert config.model.gguf_path == Path(os.path.expanduser("~/m.gguf"))
    assert (config.scheduler.grace_s, config.api.port) == (1.5, 0)


def test_several_values_stand_between_commas_or_in_a_list(write):
    expected = ApiConfig(api_key=("a", "b"), cors_origins=("http://localhost:3000", "https://[::1]"), allowed_hosts=("box", "::1"))
    given = {"api_key": "a, b", "cors_origins": "http://localhost:3000,https://[::1]", "allowed_hosts": "box,::1"}
    assert load_config(flags=given).api == expected
    text = "api: {api_key: [a, b], cors_origins: ['http://localhost:3000', 'https://[::1]'], allowed_hosts: [box, '::1']}"
    assert load_config(write(text)).api == expected


def test_a_key_left_empty_keeps_its_default(write):
    assert load_config(write("engine:\n  prefill_chunk:\nmodel:\n")) == Config()
    assert load_config(write("")) == Config()


def test_yaml_reads_off_as_false_and_means_off_all_the_same(write):
    for text in ("off", "'off'", "no"):
        assert load_config(write(f"engine: {{numa: {text}}}\n")).engine.numa == "off"
    assert load_config(write("engine: {numa: replicate}\n"), {"numa": "shard"}).engine.numa == "shard"


def test_a_flag_names_another_model_than_the_file(write):
    assert load_config(write("model: {gguf_path: a.gguf}"), {"model": "smollm2"}).model == ModelConfig(model="smollm2")
    assert load_config(write("model: {model: smollm2}"), {"gguf_path": "a.gguf"}).model.gguf_path == Path("a.gguf")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("engin: {}", "there is no section 'engin'. Did you mean 'engine'?"),
        ("engine: {cpu_infr: 2}", "there is no key 'cpu_infr' in the section 'engine'. Did you mean 'cpu_infer'?"),
        ("engine: {cpu-infer: 2}", "Did you mean 'cpu_infer'?"),
        ("api: {cpu_infer: 2}", "'cpu_infer' belongs to the section 'engine', not to 'api'"),
        ("engine: {zzz: 2}", "There are: model, gguf_path"),
        ("engine: 3", "the section 'engine' must hold lines of `key: value`"),
        ("- engine", "must hold the sections model, engine, scheduler, api"),
        ("engine: {cpu_infer: many}", "engine.cpu_infer must be a whole number, not 'many'"),
        ("engine: {cpu_infer: 1.5}", "engine.cpu_infer must be a whole number, not 1.5"),
        ("engine: {cpu_infer: true}", "engine.cpu_infer must be a whole number, not True"),
        ("engine: [", "is not valid YAML in line 1, column 10"),
        ("api: {api_key: [00123456, yes]}", "api.api_key must be a list of texts. Put quotes around each of them"),
        ("api: {api_key: [~]}", "api.api_key must be a list of texts"),
        ("model: {model: smollm2, gguf_path: a.gguf}", "both name a model: give one of them"),
    ],
)
def test_a_wrong_file_says_where(write, text, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(write(text))
    assert sentence in str(error.value)


def test_what_cannot_be_read_is_not_quoted(write):
    """It may be a key, and the sentence goes to a log."""
    with pytest.raises(ConfigError) as error:
        load_config(write("api:\n  api_key: [SECRET"))
    assert "line 2" in str(error.value)
    assert "SECRET" not in str(error.value)


def test_a_file_that_is_not_there():
    with pytest.raises(ConfigError, match=r"Cannot read the configuration file nowhere.yaml: No such file"):
        load_config(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"cpu_infer": "0"}, "cpu_infer is 0, but the model needs at least one CPU thread. Leave it out to use every CPU."),
        ({"cpu_infer": "-1"}, "cpu_infer is -1"),
        ({"cpu_infer": "x"}, "--cpu_infer must be a whole number, not 'x'"),
        ({"cache_lens": "0"}, "cache_lens is 0, but the KV cache must hold the prompt and the reply"),
        ({"cache_lens": "1"}, "at least 2 tokens"),
        ({"cache_type": "q8"}, "--cache_type must be one of auto, f16, bf16, f32, not 'q8'"),
        ({"prefill_precision": "int4"}, "--prefill_precision must be one of auto, bf16, int8, not 'int4'"),
        ({"numa": "both"}, "--numa must be one of auto, shard, replicate, off, not 'both'"),
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda, not 'tpu'"),
        ({"prefill_chunk": "0"}, "prefill_chunk is 0"),
        ({"experts_per_token": "0"}, "experts_per_token is 0, but a token uses at least 1 routed expert. Leave it out"),
        ({"max_queue": "0"}, "max_queue is 0, but at least 1 request must be able to wait"),
        ({"max_new_tokens": "0"}, "max_new_tokens is 0"),
        ({"grace_s": "-1"}, "grace_s is -1.0"),
        ({"grace_s": "nan"}, "grace_s is nan"),
        ({"grace_s": "soon"}, "--grace_s must be a number, not 'soon'"),
        ({"keep_alive_s": "0"}, "keep_alive_s is 0.0"),
        ({"port": "70000"}, "port is 70000, but ports go from 1 to 65535"),
        ({"port": "-1"}, "port is -1"),
        ({"host": ""}, "--host must be some text"),
        ({"api_key": ""}, "--api_key must be some text"),
        ({"force_think": "maybe"}, "--force_think must be true or false, not 'maybe'"),
        ({"reasoning_format": "auto"}, "--reasoning_format must be one of deepseek, none"),
        ({"model": "smollm2", "gguf_path": "a.gguf"}, "model (smollm2) and gguf_path (a.gguf) both name a model: give one of them."),
        ({"api_key": "a,,b"}, "--api_key must be some text, not ''"),
        ({"cors_origins": "http://a/"}, "cors_origins has 'http://a/'; an origin is like https://chat.example.com"),
        ({"cors_origins": "http://a,localhost:3000"}, "cors_origins has 'localhost:3000'"),
        ({"allowed_hosts": "http://box"}, "allowed_hosts has 'http://box'; a host is a name or an address"),
        ({"allowed_hosts": "box:8080"}, "allowed_hosts has 'box:8080'"),
        ({"max_body_mb": "0"}, "max_body_mb is 0.0"),
        ({"read_timeout_s": "0"}, "read_timeout_s is 0.0"),
        ({"write_timeout_s": "-1"}, "write_timeout_s is -1.0"),
        ({"request_timeout_s": "0"}, "request_timeout_s is 0.0, but it counts seconds, more than 0. Leave it out"),
        ({"metrics_port": "70000"}, "metrics_port is 70000, but ports go from 1 to 65535"),
        ({"metrics_port": "10002"}, "metrics_port and port are both 10002"),
        ({"log_format": "xml"}, "--log_format must be one of text, json, not 'xml'"),
        ({"log_prompts": "some"}, "--log_prompts must be true or false"),
        ({"ssl_keyfile": "key.pem"}, "HTTPS needs both ssl_keyfile and ssl_certfile"),
        ({"ssl_certfile": "cert.pem"}, "HTTPS needs both ssl_keyfile and ssl_certfile"),
        ({"ssl_keyfile": "key.pem", "ssl_certfile": "cert.pem"}, "There is no file key.pem"),
    ],
)
def test_a_bad_value_meets_a_sentence(flags, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(flags=flags)
    assert sentence in str(error.value)


def test_a_secret_is_not_printed():
    assert "s3cret" not in repr(load_config(flags={"api_key": "s3cret"}))
