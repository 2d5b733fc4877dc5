"""The steps that the generating routes of every protocol share: read the body, submit, answer whole or as a stream."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from server.api.disconnect import check_connected, while_connected
from server.api.exchanges.base import Exchange
from server.api.problems import Json
from server.api.serving import Loaded, Serving
from server.api.stream import StreamResponse

log = logging.getLogger(__name__)

FIRST_TEXT_S = 1.0  # an error before the first text has its own HTTP status, if it comes this soon; then the stream begins
LONG = 1 << 18  # bytes of a body that take a tenth of a second and more

Made = TypeVar("Made")


async def understood(request: Request, serving: Serving, read: Callable[[bytes, Serving, Loaded], Made]) -> Made:
    """What `read` makes of the body. Off the event loop, since templates, tokenizer and grammars would hold up the other streams.

    Long bodies take turns, in order, and short ones pass them: while its tokens are made, a prompt takes some 200 times its own memory.
    """
    loaded, raw = serving.loaded(), await request.body()
    async with serving.long_reading if len(raw) > LONG else nullcontext():
        await check_connected(request)
        return await run_in_threadpool(read, raw, serving, loaded)


async def respond(request: Request, serving: Serving, read: Callable[[bytes, Serving, Loaded], Exchange | Json]) -> Response:
    """The answer in the way that the client asked for; Json where nothing has to be run for it.

    Once it is submitted, whatever goes wrong cancels the request.
    """
    serving.loaded().service.check_room()
    exchange = await understood(request, serving, read)
    if not isinstance(exchange, Exchange):
        return JSONResponse(exchange)
    await check_connected(request)
    loaded = serving.loaded()
    if serving.config.api.log_prompts:
        _log_prompts(exchange, loaded)
    answer = exchange.submit(loaded, serving.config.api.request_timeout_s)
    try:
        if not exchange.stream:
            return JSONResponse(await while_connected(request, answer.whole(exchange.shape)))
        keep_alive_s = serving.config.api.keep_alive_s
        await while_connected(request, answer.begin(min(keep_alive_s, FIRST_TEXT_S)))
    except BaseException:
        answer.close()
        raise
    return StreamResponse(answer, exchange.shape, keep_alive_s=keep_alive_s)


def _log_prompts(exchange: Exchange, loaded: Loaded) -> None:
    for each in exchange.prepared:
        log.info("The prompt of %s: %s", each.request.request_id, loaded.tokenizer.decode(list(each.request.prompt_ids), skip_special=False))
