"""One reply's text side, first pure, then read from a live service both ways."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing

import pytest

from server.config import SchedulerConfig
from server.errors import EngineFailure, SlowReader
from server.metrics import Metrics
from server.scheduler.reply import MOST_WAITING, AsyncReply, Finished, Mailbox, Part, Piece, Progress, ReplyText, SyncReply, TextRules, ToolCall
from server.scheduler.service import Service
from server.text.tokenizer import ByteTokenizer
from server.text.tools.calls import Tool
from server.text.tools.formats import HERMES, ToolRules
from server.types import FinishReason, GenerateRequest, SamplingParams, Timings, TokenEvent, TokenLogprob
from tests.fakes import STOP_ID, FakeEngine

TOKENIZER = ByteTokenizer(vocab_size=STOP_ID + 1, stop_ids=[STOP_ID])


def play(text: str | bytes, rules: TextRules, reason: FinishReason = FinishReason.STOP, logprobs: bool = False) -> tuple[ReplyText, list[Part]]:
    """A reply whose tokens are the text's bytes."""
    raw = text.encode() if isinstance(text, str) else text
    reply = ReplyText(TOKENIZER, rules, prompt_tokens=3)
    parts: list[Part] = []
    for byte in raw:
        parts += reply.push(TokenEvent("r", byte, TokenLogprob(byte, -1.0) if logprobs else None))
    parts += reply.push(TokenEvent("r", finish_reason=reason, timings=Timings(generated_tokens=len(raw) + 1)))
    return reply, parts


def shown(parts: Iterable[Part], kind: str = "content") -> str:
    return "".join(part.text for part in parts if isinstance(part, Piece) and part.kind == kind)


def end(parts: list[Part]) -> Finished:
    assert isinstance(parts[-1], Finished)
    return parts[-1]


def test_plain_text_comes_through_and_counts_are_kept() -> None:
    _, parts = play("hello", TextRules())
    assert shown(parts) == "hello"
    assert end(parts) == Finished(FinishReason.STOP, 3, 6, Timings(generated_tokens=6))


def test_characters_are_never_cut() -> None:
    text = "a🦙中é"
    _, parts = play(text, TextRules())
    assert [part.text for part in parts if isinstance(part, Piece)] == list(text)


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    _, parts = play("ab🦙".encode()[:-1], TextRules(), FinishReason.LENGTH)
    assert shown(parts) == "ab\ufffd"
    assert end(parts).reason is FinishReason.LENGTH


def test_a_stop_string_across_tokens_ends_the_reply_and_is_not_shown() -> None:
    reply, parts = play("one STOP two", TextRules(stops=["STOP"]), FinishReason.LENGTH)
    assert reply.stopped
    assert shown(parts) == "one "
    assert (end(parts).reason, end(parts).completion_tokens) == (FinishReason.STOP, 8)


def test_a_beginning_of_a_stop_string_is_shown_once_it_is_none() -> None:
    reply, parts = play("one STO", TextRules(stops=["STOP"]))
    assert not reply.stopped
    assert shown(parts) == "one STO"


def test_a_replacement_character_can_complete_a_stop_string_at_the_end() -> None:
    _, parts = play("ab🦙".encode()[:-1], TextRules(stops=["b\ufffd"]), FinishReason.LENGTH)
    assert shown(parts) == "a"
    assert end(parts).reason is FinishReason.STOP


@pytest.mark.parametrize("state", ["opened", "closed"])
def test_reasoning_is_told_apart(state: str) -> None:
    text = ("" if state == "opened" else "<think>\n") + "hm, so\n</think>\n\nyes"
    _, parts = play(text, TextRules(reasoning=state))  # type: ignore[arg-type]
    assert (shown(parts, "reasoning"), shown(parts)) == ("hm, so", "yes")


def test_without_reasoning_rules_the_text_is_raw_and_begins_with_the_prefix() -> None:
    _, parts = play("hm</think>yes", TextRules(prefix="<think>\n"))
    assert shown(parts) == "<think>\nhm</think>yes"


def test_the_prefix_comes_even_when_nothing_follows() -> None:
    _, parts = play("", TextRules(prefix="<think>\n"))
    assert shown(parts) == "<think>\n"


def test_log_probabilities_come_with_the_text_that_they_complete() -> None:
    _, parts = play("a🦙b", TextRules(), logprobs=True)
    assert [(part.text, len(part.logprobs)) for part in parts if isinstance(part, Piece)] == [("a", 1), ("🦙", 4), ("b", 1)]


@pytest.mark.parametrize(("text", "expected"), [("oneSTOP", "one"), ("SSTSTOP", "SST"), ("STO", "STO"), ("é🦙STOP", "é🦙")])
def test_log_probabilities_of_a_stop_string_are_dropped_and_no_others(text: str, expected: str) -> None:
    _, parts = play(text, TextRules(stops=["STOP"]), logprobs=True)
    entries = [entry.token_id for part in parts if isinstance(part, Piece) for entry in part.logprobs]
    assert bytes(entries).decode() == shown(parts) == expected


def test_log_probabilities_of_half_a_character_at_the_end_are_there() -> None:
    _, parts = play("a🦙".encode()[:-1], TextRules(), FinishReason.LENGTH, logprobs=True)
    assert len([entry for part in parts if isinstance(part, Piece) for entry in part.logprobs]) == 4


def test_an_error_is_raised() -> None:
    with pytest.raises(EngineFailure, match="broken"):
        ReplyText(TOKENIZER, TextRules(), 1).push(TokenEvent("r", error=EngineFailure("broken")))


TOOLS = ToolRules(HERMES, (Tool("clock"),))
CALL = HERMES.write([("clock", {"zone": "UTC"})])


def test_calls_of_tools_are_parts() -> None:
    _, parts = play(f"So: {CALL}", TextRules(tools=TOOLS))
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert (shown(parts), calls[0].name, "".join(call.arguments for call in calls)) == ("So:", "clock", '{"zone": "UTC"}')
    assert end(parts).reason is FinishReason.TOOL_CALLS


def test_only_a_reply_that_ended_by_itself_ends_with_calls() -> None:
    assert end(play(CALL, TextRules(tools=TOOLS), FinishReason.LENGTH)[1]).reason is FinishReason.LENGTH
    assert end(play(f"{CALL} STOP", TextRules(["STOP"], tools=TOOLS))[1]).reason is FinishReason.STOP
    assert end(play("none", TextRules(tools=TOOLS))[1]).reason is FinishReason.STOP


def test_the_engine_is_stopped_behind_the_one_call_that_is_wanted() -> None:
    reply, parts = play(CALL + "\n" + CALL, TextRules(tools=ToolRules(HERMES, (Tool("clock"),), parallel=False)), FinishReason.LENGTH)
    assert reply.stopped
    assert {part.index for part in parts if isinstance(part, ToolCall)} == {0}
    assert end(parts).reason is FinishReason.TOOL_CALLS
    assert end(parts).completion_tokens < len(CALL) * 2


def test_log_probabilities_of_calls_go_with_no_text() -> None:
    _, parts = play(f"So: {CALL}", TextRules(tools=TOOLS), logprobs=True)
    assert bytes(entry.token_id for part in parts if isinstance(part, Piece) for entry in part.logprobs) == b"So:"


@pytest.mark.parametrize(
    ("text", "state", "tokens"), [("hm</think>yes", "opened", 10), ("<think>hm</think>yes", "closed", 17), ("yes", "closed", 0), ("hm", "opened", 2)]
)
def test_the_tokens_of_the_reasoning_are_counted(text: str, state: str, tokens: int) -> None:
    assert end(play(text, TextRules(reasoning=state))[1]).reasoning_tokens == tokens  # type: ignore[arg-type]


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service(FakeEngine(step_s=0.0005), SchedulerConfig(), 512, Metrics())
    yield service
    service.close()


def request(text: bytes, name: str = "r") -> GenerateRequest:
    return GenerateRequest(name, tuple(text), 400, SamplingParams(), frozenset({STOP_ID}))


def text_side(*stops: str) -> ReplyText:
    return ReplyText(TOKENIZER, TextRules(stops=stops), 1)


def test_a_plain_loop_reads_a_reply(service: Service) -> None:
    with closing(SyncReply(service, request(b"hello, you"), text_side())) as reply:
        parts = list(reply)
    assert parts[0] == Progress(0)
    assert shown(parts) == "hello, you"
    assert end(parts).reason is FinishReason.STOP


def test_leaving_a_plain_loop_cancels(service: Service) -> None:
    with closing(SyncReply(service, request(b"x" * 300), text_side())) as reply:
        next(part for part in reply if isinstance(part, Piece))
    assert service.drain(grace_s=0.1), "it was not cancelled"


def test_a_stop_string_stops_the_engine_with_its_own_reason(service: Service) -> None:
    with closing(SyncReply(service, request(b"abSTOP" + b"x" * 300), text_side("STOP"))) as reply:
        parts = list(reply)
    assert shown(parts) == "ab"
    assert end(parts).reason is FinishReason.STOP
    assert end(parts).completion_tokens == 6
    assert end(parts).timings.generated_tokens < 20
    assert service._metrics.registry.get_sample_value("moespan_request_success_total", {"finished_reason": "stop"}) == 1


def test_an_event_loop_reads_a_reply(service: Service) -> None:
    async def read() -> list[Part]:
        reply = AsyncReply(service, request(b"hello, you"), text_side())
        await reply.begin(5)
        return [part async for parts in reply.batches() for part in parts]

    parts = asyncio.run(read())
    assert shown(parts) == "hello, you"
    assert end(parts).reason is FinishReason.STOP


def test_an_early_failure_is_raised_by_begin_and_a_late_one_after_the_text() -> None:
    async def read(service: Service) -> list[Part]:
        reply = AsyncReply(service, request(b"hello"), text_side())
        await reply.begin(5)
        parts: list[Part] = []
        try:
            async for batch in reply.batches():
                parts += batch
        except EngineFailure:
            return parts
        pytest.fail("the failure was not raised")

    service = Service(FakeEngine(fail_at=0), SchedulerConfig(), 512, Metrics())
    with pytest.raises(EngineFailure):
        asyncio.run(read(service))
    service.close()
    service = Service(FakeEngine(fail_at=3), SchedulerConfig(), 512, Metrics())
    assert shown(asyncio.run(read(service))) == "hel"
    service.close()


def test_begin_gives_up_waiting_and_loses_nothing(service: Service) -> None:
    async def read() -> list[Part]:
        first = AsyncReply(service, request(b"x" * 100, "first"), text_side())
        reply = AsyncReply(service, request(b"hello", "second"), text_side())
        await reply.begin(0.001)
        parts = [part async for parts in reply.batches() for part in parts]
        first.close()
        return parts

    assert shown(asyncio.run(read())) == "hello"


def test_a_mailbox_loses_nothing_between_two_threads() -> None:
    async def read(count: int) -> list[int | None]:
        mailbox = Mailbox(asyncio.get_running_loop(), on_full=lambda _: None)
        threading.Thread(target=lambda: deque(map(mailbox.put, [TokenEvent("r", number) for number in range(count)]), maxlen=0)).start()
        seen: list[int | None] = []
        while len(seen) < count:
            seen += [event.token_id for event in await asyncio.wait_for(mailbox.take(), 10)]
        return seen

    assert asyncio.run(read(MOST_WAITING)) == list(range(MOST_WAITING))


def test_a_full_mailbox_ends_its_request_and_keeps_what_it_has() -> None:
    async def read() -> list[TokenEvent]:
        mailbox = Mailbox(asyncio.get_running_loop(), on_full=lambda _: ended.append(True))
        for number in range(MOST_WAITING + 100):
            mailbox.put(TokenEvent("r", number))
        mailbox.put(TokenEvent("r", finish_reason=FinishReason.CANCELLED))
        return await mailbox.take()

    ended: list[bool] = []
    *events, last = asyncio.run(read())
    assert [event.token_id for event in events] == list(range(MOST_WAITING))
    assert isinstance(last.error, SlowReader)
    assert f"{MOST_WAITING} tokens of it were not read" in str(last.error)
    assert ended == [True]


def test_the_last_event_fits_into_a_full_mailbox() -> None:
    async def read() -> list[TokenEvent]:
        mailbox = Mailbox(asyncio.get_running_loop(), on_full=lambda _: pytest.fail("ended"))
        for number in range(MOST_WAITING):
            mailbox.put(TokenEvent("r", number))
        mailbox.put(TokenEvent("r", finish_reason=FinishReason.STOP))
        return await mailbox.take()

    assert asyncio.run(read())[-1].finish_reason is FinishReason.STOP
