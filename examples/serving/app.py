"""The routes, and the way between them and the engine's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from serving import errors
from serving.answers import LAST, Answer, sent
from serving.body import SizeLimit
from serving.engine import Engine
from serving.errors import Refused, wrong
from serving.request import Asked, Done, Event, Piece, Request
from serving.schema import Body, Chat, Completion, refusal
from serving.words import Words


def app(engine: Engine, tokenizer: Any, name: str) -> FastAPI:
    """
    Args:
        name: by which requests name the model: the only one.
    """
    api = FastAPI(title="kvpass", docs_url=None, redoc_url=None)
    api.add_middleware(SizeLimit, limit=engine.limits.body)
    vocabulary = engine.model.get_input_embeddings().weight.shape[0]
    started, fingerprint = int(time.time()), engine.model.kvpass.policy.fingerprint

    @api.post("/v1/completions")
    async def completions(body: Completion, http: Http) -> Any:
        prompt = body.prompt if isinstance(body.prompt, list) else tokenizer(body.prompt).input_ids
        return await answered(body, prompt, http, body.max_tokens or 16)

    @api.post("/v1/chat/completions")
    async def chat(body: Chat, http: Http) -> Any:
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise wrong("max_tokens", "max_tokens and max_completion_tokens say the same: give one", "invalid_value")
        prompt = chat_tokens(tokenizer, [message.plain() for message in body.messages], True)
        room = max(1, min(engine.limits.tokens, engine.limits.context - len(prompt)))
        return await answered(body, prompt, http, body.max_tokens or body.max_completion_tokens or room)

    @api.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": started, "owned_by": "kvpass"}]}

    @api.get("/health")
    async def health() -> Any:
        state = engine.state if engine.alive else "dead"
        return JSONResponse({"status": state}, 200 if state == "running" else 503)

    @api.get("/metrics")
    async def metrics() -> Any:
        return PlainTextResponse(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @api.exception_handler(Refused)
    async def refused(_: Http, error: Refused) -> JSONResponse:
        engine.metrics.refused.labels(error.code or str(error.status)).inc()
        return JSONResponse(error.body(), error.status, error.headers())

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Http, error: RequestValidationError) -> JSONResponse:
        return await refused(_, refusal(list(error.errors())))

    @api.exception_handler(HTTPException)
    async def other(_: Http, error: HTTPException) -> JSONResponse:
        return await refused(_, Refused(error.status_code, str(error.detail)))

    async def answered(body: Body, prompt: list[int], http: Http, tokens: int) -> Any:
        if body.model != name:
            raise errors.unknown_model(body.model, name)
        if body.stream_options is not None and not body.stream:
            raise wrong("stream_options", "stream_options is for streams", "invalid_value")
        asked = checked(body, prompt, tokens, engine.limits.tokens, vocabulary)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        prefix, limits = engine.prefixes.of(asked.prompt), engine.limits
        request = Request(asked, Words(tokenizer, asked.stop), tell, limits.seconds, prefix)
        try:
            engine.submit(request)
        except Refused as error:
            if error.code == "context_length_exceeded":
                error.param = "messages" if isinstance(body, Chat) else "prompt"
            raise
        ready = len(prefix.ids) if prefix is not None else 0
        answer = Answer(isinstance(body, Chat), name, fingerprint, len(prompt), ready)
        if body.stream:
            pieces = streamed(engine, request, events, answer, body.usage)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await whole(engine, request, events, answer, http)

    return api


def chat_tokens(tokenizer: Any, messages: list[dict[str, str]], ask: bool) -> list[int]:
    """Tokens of messages; with `ask`, up to where the answer begins."""
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False)
    except (TemplateError, ValueError) as error:
        raise wrong("messages", f"the model's chat template refuses them: {error}", "invalid_value") from error
    tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return tokens


def checked(body: Body, prompt: list[int], tokens: int, most: int, vocabulary: int) -> Asked:
    """The request in tokens.

    Raises:
        Refused: no prompt, no such tokens, or more than `most` of an answer.
    """
    if not prompt:
        raise wrong("prompt", "the prompt is empty", "invalid_value")
    if not all(0 <= token < vocabulary for token in prompt):
        raise wrong("prompt", f"tokens are from 0 to {vocabulary - 1}", "invalid_value")
    if tokens > most:
        raise wrong("max_tokens", f"an answer has at most {most} tokens here", "invalid_value")
    chosen = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
    }
    return Asked(tuple(prompt), tokens, **chosen, seed=body.seed, stop=body.stops)


async def streamed(
    engine: Engine, request: Request, events: asyncio.Queue[Event], answer: Answer, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events. The server cancels it when the client is gone."""
    try:
        if answer.chat:
            yield sent(answer.piece("", first=True))
        while True:
            event = await events.get()
            if isinstance(event, Piece):
                yield sent(answer.piece(event.text))
            elif isinstance(event, Refused):
                yield sent(event.body())
                return
            else:
                yield sent(answer.piece("", event.reason))
                if usage:
                    yield sent(answer.count(event.tokens))
                yield LAST
                return
    finally:
        engine.cancel(request)


async def whole(
    engine: Engine, request: Request, events: asyncio.Queue[Event], answer: Answer, http: Http
) -> JSONResponse:
    """The answer when it is whole; no more steps for a client that is gone."""
    left = asyncio.create_task(gone(http.receive))
    text: list[str] = []
    try:
        while True:
            event = asyncio.create_task(events.get())
            await asyncio.wait({event, left}, return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                event.cancel()
                return JSONResponse({}, 499)  # nobody reads it
            said = event.result()
            if isinstance(said, Refused):
                raise said
            if isinstance(said, Done):
                return JSONResponse(answer.whole("".join(text), said.reason, said.tokens))
            text.append(said.text)
    finally:
        left.cancel()
        engine.cancel(request)


async def gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
