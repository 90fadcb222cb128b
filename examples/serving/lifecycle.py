"""From SIGTERM to the end: no new request is taken, those that were are answered, then the port closes."""

from __future__ import annotations

import logging
import threading
from types import FrameType
from typing import Any

import uvicorn

from serving.engine import Engine

log = logging.getLogger("kvpass.serving")


def settings(api: Any, host: str, port: int, **more: Any) -> uvicorn.Config:
    """Connections are kept for longer than clients wait between two requests: one that the server closes just when a
    request is on its way is an error for the client. At the end nobody is waited for who reads too slowly.
    """
    return uvicorn.Config(api, host=host, port=port, timeout_keep_alive=75, timeout_graceful_shutdown=5, **more)


class Server(uvicorn.Server):
    """
    Args:
        seconds: after which requests that are still running are refused.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, seconds: float) -> None:
        super().__init__(config)
        self.engine, self.seconds = engine, seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains: until it is done the port answers, /health with 503, so that a load balancer sees
        it. A second one ends at once.
        """
        if self.engine.state != "running":
            super().handle_exit(sig, frame)
            return
        threading.Thread(target=self.drain, name="kvpass-drain", daemon=True).start()  # a handler must not wait

    def drain(self) -> None:
        """Returns when all is answered, or the time is over; the server ends then."""
        log.warning("draining: no new requests, %g s for those that were taken", self.seconds)
        done = threading.Event()
        self.engine.drain(done.set)
        if not done.wait(self.seconds):
            log.warning("requests are still running after %g s: refused", self.seconds)
        self.engine.close()
        self.should_exit = True
