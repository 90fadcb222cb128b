"""How a request is refused: OpenAI's error format, a status, and who may try again when."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """What a client is told in the place of an answer.

    Attributes:
        status: of HTTP.
        kind, param, code: OpenAI's `type`, the field of the body that is meant, and a word for programs.
        retry_after: seconds after which it may work, None if it will not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def wrong(param: str | None, message: str, code: str | None = None) -> Refused:
    """A field of the body says what it may not say."""
    return Refused(400, message, param=param, code=code)


def unknown_model(given: str, served: str) -> Refused:
    return Refused(404, f"there is no model {given!r} here, only {served!r}", param="model", code="model_not_found")


def too_long(message: str) -> Refused:
    """It can never be served here, however long it waits."""
    return Refused(400, message, code="context_length_exceeded")


def too_large(limit: int) -> Refused:
    return Refused(413, f"the body is larger than {limit:,} bytes", code="request_too_large")


def too_slow(seconds: float) -> Refused:
    return Refused(408, f"the body did not come within {seconds:g} s", code="timeout")


def too_many(retry_after: int) -> Refused:
    message = "too many requests are waiting"
    return Refused(429, message, "rate_limit_error", code="queue_full", retry_after=retry_after)


def draining() -> Refused:
    message = "the server is shutting down"
    return Refused(503, message, "server_error", code="draining", retry_after=5)


def timed_out(seconds: float) -> Refused:
    return Refused(504, f"there was no whole answer within {seconds:g} s", "server_error", code="timeout")


def failed() -> Refused:
    """An error of the server's own: its log says more than a client may know."""
    return Refused(500, "the server failed at this request", "server_error", code="internal_error")
