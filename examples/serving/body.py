"""Bodies up to a size: counted as they come, whatever their header says."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi.responses import JSONResponse

from serving.errors import Refused, too_large, too_slow

SECONDS = 30.0
"""Within which a whole body must have come."""


class SizeLimit:
    """ASGI middleware: reads the body of a request before anybody else does; one that is too large, or too slow, is
    refused.
    """

    def __init__(self, app: Any, limit: int, seconds: float = SECONDS) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                whole = await self._read(scope, receive)
        except TimeoutError:
            await _answer(too_slow(self.seconds), scope, receive, send)
        except Refused as error:
            await _answer(error, scope, receive, send)
        else:
            if whole is not None:
                await self.app(scope, _again(whole, receive), send)

    async def _read(self, scope: Any, receive: Any) -> bytes | None:
        """The body; None if the client left meanwhile."""
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self.limit:
            raise too_large(self.limit)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self.limit:
                raise too_large(self.limit)
            if not message.get("more_body"):
                return bytes(body)


def _again(body: bytes, receive: Any) -> Any:
    """Gives the body that was read, then what else comes."""
    given = False

    async def one() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return one


async def _answer(error: Refused, scope: Any, receive: Any, send: Any) -> None:
    headers = {**error.headers(), "Connection": "close"}  # what is left of the body is not read
    await JSONResponse(error.body(), error.status, headers)(scope, receive, send)
