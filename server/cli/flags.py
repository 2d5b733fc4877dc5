"""The command line: which command takes which flags, and what each one means.

A flag of the configuration has the key's own name (`--cpu_infer`), as KTransformers' users know it; `--cpu-infer` is the same flag.
Its text goes to server.config unread, so that a wrong value meets the same sentence from the command line and from the YAML file.
"""

from __future__ import annotations

import difflib
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_type_hints

from server.cli.embedded import EMBEDDED
from server.cli.machine import version
from server.config import KEYS, SECTIONS, Config, load_config
from server.engine.models.shapes import SHAPES
from server.errors import ConfigError

MODEL_FLAGS = ("model", "gguf_path", "model_path")
ENGINE_FLAGS = ("cpu_infer", "numa", "cache_lens", "cache_type", "prefill_chunk", "experts_per_token", "prefill_precision", "prefill", "device")
CONFIG_FLAGS: dict[str, tuple[str, ...]] = {  # command -> the configuration's keys that do something there
    "serve": tuple(KEYS),
    "chat": (*MODEL_FLAGS, *ENGINE_FLAGS, "max_new_tokens", "force_think"),
    "batch": (*MODEL_FLAGS, "model_name", *ENGINE_FLAGS, "max_new_tokens", "grace_s", "force_think", "reasoning_format"),
    "bench offline": ("model", "gguf_path", "cpu_infer", "numa", "cache_type", "prefill_chunk", "experts_per_token", "prefill_precision", "prefill", "device"),
    "bench experts": ("cpu_infer", "numa", "prefill_precision"),
    "eval questions": (*MODEL_FLAGS, *ENGINE_FLAGS, "max_new_tokens"),
    "eval text": (*MODEL_FLAGS, *(key for key in ENGINE_FLAGS if key != "cache_lens")),
    "eval compare": (),
    "inspect": ("model", "gguf_path"),
    "synth": ("cpu_infer",),
}

HELP: dict[str, tuple[str, str]] = {  # key -> (value's name, meaning)
    "model": ("NAME", f"an embedded model: {' or '.join(EMBEDDED)}"),
    "gguf_path": ("PATH", "a GGUF file, any file of a split one, or a directory that holds one model"),
    "model_path": ("DIR", "a local Hugging Face directory whose config, tokenizer and chat template replace the GGUF's"),
    "model_name": ("NAME", "what /v1/models calls the model (default: the file's name, or the embedded model's)"),
    "cpu_infer": ("N", "pinned CPU threads (default: every CPU that affinity and cgroup allow, one less with a GPU)"),
    "numa": ("shard|replicate|off|auto", "how experts lie in several nodes of memory: slices, copies, anyhow; auto: shard with two nodes or more"),
    "cache_lens": ("N", "tokens in the KV cache, prompt and reply together (default: the smaller of 8192 and the model's context)"),
    "cache_type": ("auto|f16|bf16|f32", "how the KV cache is stored (auto: bf16 on a GPU, f16 on the CPU)"),
    "prefill_chunk": ("N", "the most prompt tokens that one step takes (default: 512, or 2048 on a GPU)"),
    "experts_per_token": ("N", "routed experts that a token uses, fewer than the model's own: faster and less exact (default: the model's own)"),
    "prefill_precision": (
        "auto|bf16|int8",
        "what activations are rounded to when many tokens meet quantised weights (bf16: F16, BF16 ones too); auto: bf16 with AMX",
    ),
    "prefill": ("auto|cpu|stream|split", "with a GPU, where a prompt's routed experts run: CPU, streamed to the GPU, both; auto: the fastest, as measured"),
    "device": ("auto|cpu|cuda", "where all but the routed experts run (auto: the GPU, where there is one with room)"),
    "max_queue": ("N", "requests that may wait; more get 429"),
    "max_new_tokens": ("N", "the cap on one reply, where a request names none"),
    "grace_s": ("S", "seconds that the running request may go on after SIGTERM"),
    "host": ("ADDR", "the address to listen on"),
    "port": ("N", "the port to listen on; 0 takes any free one"),
    "api_key": ("KEY,...", "what clients must send as `Authorization: Bearer KEY`, one of them"),
    "api_key_file": ("FILE", "more keys, one a line; unlike --api_key it shows in no list of processes"),
    "allowed_hosts": ("NAME,...", "names by which clients reach this server (Host header) beside localhost; * for any"),
    "cors_origins": ("ORIGIN,...", "web pages that may call the API from a browser, such as http://localhost:3000; * for any"),
    "ssl_keyfile": ("FILE", "with --ssl_certfile: serve HTTPS"),
    "ssl_certfile": ("FILE", "with --ssl_keyfile: serve HTTPS"),
    "force_think": ("true|false", "chat replies begin with <think>"),
    "reasoning_format": ("deepseek|none", "deepseek: thoughts go to reasoning_content; none: the raw reply"),
    "keep_alive_s": ("S", "seconds between comments on a stream that waits or processes its prompt"),
    "max_body_mb": ("N", "the largest body that a request may have, in millions of bytes; more gets 413"),
    "read_timeout_s": ("S", "seconds in which a request's head, and then its body, must have arrived"),
    "write_timeout_s": ("S", "seconds after which a client that takes nothing of its reply is cut off"),
    "request_timeout_s": ("S", "seconds that a request may wait and run, all in all (default: as long as it takes)"),
    "metrics_port": ("N", "serve /metrics on this port, without a key, and no longer on the API's"),
    "metrics_host": ("ADDR", "the address of --metrics_port"),
    "log_format": ("text|json", "lines for people, or one JSON object a line"),
    "log_prompts": ("true|false", "write each prompt into the log, as the model gets it"),
}

COMMANDS = {
    "serve": "answer OpenAI's API over HTTP",
    "chat": "talk to a model in the terminal",
    "batch": "answer a file of requests in OpenAI's batch format; the same command goes on after an interruption",
    "bench": "measure a model's speed, or that of one layer of experts",
    "eval": "measure how good a model's answers are, and compare two results",
    "inspect": "show what a GGUF file holds",
    "synth": "write a random model at the shape of a real one, to measure speed with",
}

BENCH_TASKS = {
    "offline": "prefill and decode speed of a model, without HTTP (what plain `moespan bench` means)",
    "experts": "one layer of experts in any format, beside what the machine can read and multiply at most",
}

EVAL_TASKS = {
    "questions": "ask held-out questions of several skills in English and Chinese, and count the right answers",
    "text": "measure perplexity over a text, and the KL divergence from a reference run",
    "compare": "show two results side by side, with their paired differences",
}

EXPERTS_Q = (1, 4, 16, 64, 128, 256, 512, 2048)  # tokens, from decode to a prompt's chunk
TASKS = {"bench": BENCH_TASKS, "eval": EVAL_TASKS}  # of the commands that have several


# What other programs call it: llama.cpp, vLLM, KTransformers.
ELSEWHERE = {
    "--gguf_path": ("-m",),
    "--model_name": ("-a", "--alias", "--served_model_name"),
    "--cache_lens": ("-c", "--ctx_size", "--max_model_len"),
    "--cache_type": ("-ctk", "-ctv", "--cache_type_k", "--cache_type_v", "--kv_cache_dtype"),
    "--cpu_infer": ("-t", "--threads"),
    "--max_new_tokens": ("-n", "--predict", "--n_predict"),
    "--prefill_chunk": ("-b", "-ub", "--batch_size", "--ubatch_size", "--chunk_size", "--max_num_batched_tokens"),
}
PLACING = (
    *("-ngl", "--gpu_layers", "--n_gpu_layers", "-ot", "--override_tensor", "-cmoe", "--cpu_moe", "-ncmoe", "--n_cpu_moe", "--cpu_offload_gb"),
    *("--optimize_config_path", "--optimize_rule_path"),
)
ALWAYS = ("-fa", "--flash_attn", "--jinja", "--mlock", "--no_mmap", "--trust_remote_code")
BATCHING = ("-np", "--parallel", "--max_batch_size", "--max_num_seqs")


class _Parser(ArgumentParser):
    """argparse, with its complaints turned into ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` lists what there is.")


def parse(argv: Sequence[str]) -> Namespace:
    """The command and its flags; only flags that were given are set. Raises ConfigError; `--help` and `--version` exit."""
    parser, commands = _build()
    arguments, unknown = parser.parse_known_args(_with_task([_underscored(word) for word in argv]) or ["--help"])
    if unknown:
        name = " ".join([arguments.command, *([arguments.task] if arguments.command in TASKS else [])])
        raise ConfigError(_unknown(name, unknown[0], commands[name]))
    return arguments


def config_of(arguments: Namespace) -> Config:
    """The configuration that the command line and its --config file describe."""
    given = vars(arguments)
    return load_config(given.get("config"), {key: given[key] for key in KEYS if key in given})


def _underscored(word: str) -> str:
    """--cpu-infer=4 -> --cpu_infer=4; a value keeps its hyphens."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def _with_task(words: list[str]) -> list[str]:
    """`moespan bench --gen 8` is `moespan bench offline --gen 8`."""
    plain = words[:1] == ["bench"] and (len(words) == 1 or words[1].startswith("-")) and words[1:2] not in (["-h"], ["--help"])
    return ["bench", "offline", *words[1:]] if plain else words


def _unknown(command: str, word: str, parser: ArgumentParser) -> str:
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"`moespan {command}` does not know what to do with '{word}'."
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"`moespan {command} --help` lists the flags."
    if name.lstrip("-") in KEYS:
        hint = f"It belongs to `moespan {next(c for c, keys in CONFIG_FLAGS.items() if name.lstrip('-') in keys)}`."
    return f"`moespan {command}` has no flag {name}. {_translated(name, known) or hint}"


def _translated(name: str, known: Sequence[str]) -> str | None:
    """What to do for a flag of another program."""
    if name in PLACING:
        return "Leave it out: routed experts stay in RAM, and with a GPU all else is there."
    if name in ALWAYS:
        return "Leave it out: there is nothing to switch."
    if name in BATCHING:
        return "Leave it out: one request runs at a time, and the others wait in order."
    ours = next((flag for flag, others in ELSEWHERE.items() if name in others and flag in known), None)
    return ours and f"It is {ours} here."


# --- Building the parsers ----------------------------------------------------


def _build() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parser = _Parser(prog="moespan", description="Serve GGUF models over OpenAI's API.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"moespan {version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    commands: dict[str, ArgumentParser] = {}
    for name, meaning in COMMANDS.items():
        command = subparsers.add_parser(name, help=meaning, description=f"moespan {name}: {meaning}.", allow_abbrev=False)
        if name in TASKS:
            commands |= _build_tasks(command, name)
            continue
        _add_common_flags(command, name)
        commands[name] = command
    _add_chat_flags(commands["chat"])
    _add_batch_flags(commands["batch"])
    _add_offline_flags(commands["bench offline"])
    _add_experts_flags(commands["bench experts"])
    _add_question_flags(commands["eval questions"])
    _add_text_flags(commands["eval text"])
    commands["eval compare"].add_argument("results", nargs=2, type=Path, metavar="RESULT", help="a file that --out wrote")
    _add_inspect_flags(commands["inspect"])
    _add_synth_flags(commands["synth"])
    return parser, commands


def _build_tasks(parser: ArgumentParser, command: str) -> dict[str, ArgumentParser]:
    subparsers = parser.add_subparsers(dest="task", required=True, metavar="TASK", parser_class=_Parser)
    tasks: dict[str, ArgumentParser] = {}
    for task, meaning in TASKS[command].items():
        name = f"{command} {task}"
        tasks[name] = subparsers.add_parser(task, help=meaning, description=f"moespan {name}: {meaning}.", allow_abbrev=False)
        _add_common_flags(tasks[name], name)
        tasks[name].add_argument("--json", action="store_true", help="print JSON instead of a table")
    return tasks


def _add_common_flags(parser: ArgumentParser, command: str) -> None:
    if CONFIG_FLAGS[command]:
        _add_config_flags(parser, command)
    parser.add_argument("-v", "--verbose", action="store_true", help="log more, and show a traceback with an error")


def _add_config_flags(parser: ArgumentParser, command: str) -> None:
    parser.add_argument("--config", type=Path, default=SUPPRESS, metavar="FILE", help="settings as in configs/server.yaml; flags win over it")
    for key in CONFIG_FLAGS[command]:
        metavar, meaning = HELP[key]
        default = _default(key)
        meaning += f" (default: {default})" if default is not None and "(default" not in meaning else ""
        if get_type_hints(SECTIONS[KEYS[key]])[key] is bool:
            parser.add_argument(f"--{key}", nargs="?", const="true", default=SUPPRESS, metavar=metavar, help=meaning)
            parser.add_argument(f"--no_{key}", dest=key, action="store_const", const="false", default=SUPPRESS, help=f"the same as --{key} false")
        else:
            parser.add_argument(f"--{key}", default=SUPPRESS, metavar=metavar, help=meaning)


def _default(key: str) -> object:
    value = getattr(SECTIONS[KEYS[key]](), key)
    if isinstance(value, tuple):
        return ",".join(value) or None
    return str(value).lower() if isinstance(value, bool) else value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError
    return int(text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(word) for word in text.split(","))


_count.__name__ = "count (1 or more)"  # argparse names the type in its complaint: "invalid count (1 or more) value: '0'"
_counts.__name__ = "list of counts (such as 1,16,512)"
_whole.__name__ = "whole number (0 or more)"


def _add_chat_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--prompt_file", type=Path, metavar="FILE", help="say what the file holds, print the answer and stop")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1.0)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that hold this much probability (default: 1.0)")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same reply")


def _add_batch_flags(parser: ArgumentParser) -> None:
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="the requests, one a line; - is the standard input")
    parser.add_argument("output", type=Path, metavar="OUT.jsonl", help="where the answers are added, one a line; - is the standard output")


def _add_offline_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--prompt", type=_count, default=512, metavar="N", help="prompt tokens to prefill (default: 512)")
    parser.add_argument("--gen", type=_count, default=64, metavar="N", help="tokens to decode after the prompt (default: 64)")
    parser.add_argument("--repeat", type=_count, default=3, metavar="N", help="timed runs, after one that is not timed (default: 3)")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="with a GPU: draw what it and the CPUs do in a step of decode, as an SVG")


def _add_experts_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--shape", default="v3", metavar="NAME", help="whose experts: v3, v2-lite, qwen3-30b, ... (default: v3)")
    parser.add_argument("--experts", type=_count, default=64, metavar="N", help="experts in the layer (default: 64)")
    parser.add_argument("--format", type=_words, default=("q4_k",), metavar="TYPE,...", help="GGUF types of their weights (default: q4_k)")
    meaning = f"tokens at once (default: {','.join(map(str, EXPERTS_Q))})"
    parser.add_argument("--q", type=_counts, default=EXPERTS_Q, metavar="N,...", help=meaning)
    parser.add_argument("--repeat", type=_count, metavar="N", help="timed calls of each point (default: as many as fit into 2 s, and 5 at least)")
    parser.add_argument("--expect_gbs", type=float, metavar="X", help="call the run void where its memory sweep is more than 10 %% below this many GB/s")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the points into a roofline")


def _add_question_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--each", type=_count, default=50, metavar="N", help="questions of each skill and language, 16 times as many in all (default: 50)")
    parser.add_argument("--seed", type=_whole, default=0, metavar="N", help="which questions (default: 0)")
    choices = ("true", "false", "both")
    meaning = "replies begin with <think>; both: ask every question in both ways (default: false)"
    parser.add_argument("--force_think", dest="thinking", nargs="?", const="true", choices=choices, metavar="true|false|both", help=meaning)
    parser.add_argument("--no_force_think", dest="thinking", action="store_const", const="false", help="the same as --force_think false")
    _add_out_flag(parser)


def _add_text_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text file (default: the chats that ship, held-out questions with their thinking)")
    parser.add_argument("--window", type=_count, metavar="N", help="tokens of a window of the text, the second half of which is scored (default: 512)")
    parser.add_argument("--whole_chats", action="store_true", help="of the chats that ship, score the questions too (default: the replies)")
    parser.add_argument("--limit", type=_count, metavar="N", help="the first N windows only (default: all)")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--save_reference", type=Path, metavar="FILE", help="write what the model says, for other runs to be compared with")
    ways.add_argument("--reference", type=Path, metavar="FILE", help="compare with what another run wrote")
    _add_out_flag(parser)


def _add_out_flag(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the run in a file, from which the same command goes on after an interruption")


def _add_inspect_flags(parser: ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the same as --gguf_path")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_synth_flags(parser: ArgumentParser) -> None:
    parser.add_argument("shape", metavar="SHAPE", help=f"whose shape: {', '.join(SHAPES)}")
    parser.add_argument("out", type=Path, metavar="OUT.gguf", help="the file to write")
    parser.add_argument("--layers", type=_count, metavar="N", help="the first N layers only (default: all)")
    parser.add_argument("--quant", default="q4_k_m", metavar="MIX", help="llama.cpp's name of the types' mix: q4_k_m, q2_k, iq1_s, ... (default: q4_k_m)")
    parser.add_argument("--seed", type=_whole, default=0, metavar="N", help="the same seed writes the same file (default: 0)")
    parser.add_argument("--split", type=_count, default=1, metavar="N", help="write N files, as large models are published (default: 1)")
