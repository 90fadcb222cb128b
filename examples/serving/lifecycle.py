"""From SIGTERM to the end: no new request is taken, those that were are answered, then the port closes."""

from __future__ import annotations

import logging
import threading
from types import FrameType

import uvicorn

from serving.engine import Engine

log = logging.getLogger("kvpass.serving")


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
