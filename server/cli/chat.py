"""`moespan chat`: a conversation in the terminal, through the same scheduler and text side as the server's.

A turn reads: the person's line, the prompt, the reply as it streams (thoughts dimmed), the speeds. Ctrl-C stops the reply and keeps what was
said; /new forgets the conversation; /exit or ctrl-D leaves. With --prompt_file there is one turn.
"""

from __future__ import annotations

import itertools
import logging
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from rich import progress
from rich.console import Console

from server.api.serving import Loaded
from server.cli.flags import config_of
from server.cli.load import load_chat, model_file
from server.config import Config
from server.errors import ConfigError, RequestError
from server.metrics import Metrics
from server.scheduler.reply import Finished, Part, Piece, Progress, ReplyText, SyncReply, TextRules
from server.text.template import force_think, opens_think
from server.types import GenerateRequest, SamplingParams, Timings

HELLO = "Say something. Ctrl-C stops a reply, /new forgets the conversation, /exit or ctrl-D leaves."


def run(arguments: Namespace) -> int:
    """Load, then talk until the person leaves."""
    config = config_of(arguments)
    sampling = _sampling(arguments)
    prompt = _read(arguments.prompt_file) if arguments.prompt_file else None
    if not arguments.verbose:
        logging.getLogger("server.scheduler").setLevel(logging.WARNING)  # each turn shows its speeds itself
    loaded = load_chat(config, model_file(config.model), Metrics())
    try:
        talk = Conversation(loaded, config, sampling, arguments.system)
        if prompt is not None:
            talk.turn(prompt)
        else:
            _interact(talk)
    finally:
        loaded.service.close()
    return 0


def _sampling(arguments: Namespace) -> SamplingParams:
    if not arguments.temperature >= 0:
        raise ConfigError(f"--temperature is {arguments.temperature}, but it must be 0 (greedy) or more.")
    if not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--top_p is {arguments.top_p}, but it must be above 0 and at most 1.")
    if arguments.seed is not None and not -(2**63) <= arguments.seed < 2**63:
        raise ConfigError(f"--seed is {arguments.seed}, but it must be a whole number of at most 63 bits.")
    return SamplingParams(temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed)


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read --prompt_file {file}: {getattr(error, 'strerror', None) or error}.") from error
    if not text.strip():
        raise ConfigError(f"--prompt_file {file} is empty. Write the prompt into it.")
    return text


def _interact(talk: Conversation) -> None:
    if sys.stdin.isatty():
        import readline

        readline.set_auto_history(True)  # with the module imported, input() has line editing as well
        print(HELLO, file=sys.stderr)
    while (line := _ask()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/new":
                talk.forget()
            case text:
                talk.say(text)


def _ask() -> str | None:
    """The next line; None at the end of the input. Ctrl-C here clears the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)


class Conversation:
    """What was said so far, and how the next reply is got."""

    def __init__(self, loaded: Loaded, config: Config, sampling: SamplingParams, system: str | None = None) -> None:
        self._service, self._tokenizer, self._template = loaded.service, loaded.tokenizer, loaded.template
        self._config, self._sampling = config, sampling
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)
        self._ids = (f"chat-{n}" for n in itertools.count(1))
        self._out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)  # the reply as it is
        self._err = Console(stderr=True, highlight=False, markup=False)

    def forget(self) -> None:
        """Back to the beginning."""
        self.messages = list(self._opening)

    def say(self, text: str) -> None:
        """A turn whose message, if it cannot be sent, does not end the conversation."""
        try:
            self.turn(text)
        except RequestError as error:
            self._err.print(f"{error} /new forgets the conversation.", style="red")

    def turn(self, text: str) -> None:
        """Send a message and show the reply. Raises RequestError for a message that cannot be sent, which is forgotten again."""
        self.messages.append({"role": "user", "content": text})
        try:
            self.messages.append({"role": "assistant", "content": self._reply()})
        except RequestError:
            self.messages.pop()
            raise

    def _reply(self) -> str:
        """Show the reply as it comes; returns its answer without the thoughts."""
        said: list[str] = []
        try:
            request, text = self._prepared()
            with closing(SyncReply(self._service, request, text)) as reply:
                self._show(reply, len(request.prompt_ids), said)
        except KeyboardInterrupt:
            self._err.print("\n[stopped]", style="dim")
        return "".join(said)

    def _prepared(self) -> tuple[GenerateRequest, ReplyText]:
        """The conversation as token ids, and what will make text of the reply's."""
        prompt = self._template.render(self.messages)
        if self._config.api.force_think:
            prompt = force_think(prompt)
        ids = tuple(self._tokenizer.encode_prompt(prompt))
        request = GenerateRequest(next(self._ids), ids, self._config.scheduler.max_new_tokens, self._sampling, self._tokenizer.stop_ids)
        rules = TextRules(reasoning="opened" if opens_think(prompt) else "closed")
        return request, ReplyText(self._tokenizer, rules, len(ids))

    def _show(self, reply: SyncReply, prompt_tokens: int, said: list[str]) -> None:
        """Print the parts as they come; the answer's text is also added to `said`, so that an interrupt loses none of it."""
        thinking = False
        for part in _after_prefill(reply, prompt_tokens):
            match part:
                case Piece("reasoning", text):
                    thinking = True
                    self._out.print(text, end="", style="dim")
                case Piece(_, text):
                    self._out.print(f"\n\n{text}" if thinking else text, end="")
                    thinking = False
                    said.append(text)
                case Finished():
                    self._out.print()
                    self._err.print(speeds(part.timings), style="dim")


def _after_prefill(reply: SyncReply, prompt_tokens: int) -> Iterator[Part]:
    """The reply's text and end. While its prompt is processed there is a bar, on a terminal."""
    columns = (progress.TextColumn("prefill"), progress.BarColumn(), progress.MofNCompleteColumn())
    parts = iter(reply)
    with progress.Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=prompt_tokens)
        for part in parts:
            if not isinstance(part, Progress):
                break
            bar.update(task, completed=part.prefilled)
    yield part
    yield from parts


def speeds(timings: Timings) -> str:
    """ "prefill 21 tokens, 512.3 tok/s; decode 40 tokens, 55.1 tok/s". The first token is drawn by prefill's last step."""
    decoded = max(timings.generated_tokens - 1, 0)
    parts = (("prefill", timings.prompt_tokens, timings.prefill_s), ("decode", decoded, timings.decode_s))
    return "; ".join(f"{name} {tokens} tokens, {tokens / seconds:.1f} tok/s" if seconds > 0 else f"{name} {tokens} tokens" for name, tokens, seconds in parts)
