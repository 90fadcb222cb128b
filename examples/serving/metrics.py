"""What /metrics tells, each name with its unit."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """A registry of its own: several servers may live in one process."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.budget = Gauge("kvpass_kv_budget_bytes", "Bytes that caches may hold together", registry=own)
        self.held = Gauge("kvpass_kv_held_bytes", "Bytes that caches hold: slots, positions, statistics", registry=own)
        self.peak = Gauge("kvpass_kv_peak_bytes", "The most they have held, copies in passing included", registry=own)
        self.above = Counter("kvpass_kv_above_budget", "Times that they held more than the budget", registry=own)
        self.running = Gauge("kvpass_requests_running", "Rows of the batch", registry=own)
        self.waiting = Gauge("kvpass_requests_waiting", "Requests in the queue", registry=own)
        self.graphs = Gauge("kvpass_graphs", "Graphs compiled so far; steady once the server listens", registry=own)
        self.finished = Counter("kvpass_requests_finished", "Requests, by how they ended", ["how"], registry=own)
        self.refused = Counter("kvpass_requests_refused", "Requests that were not taken", ["code"], registry=own)
        self.prompted = Counter("kvpass_prompt_tokens", "Tokens of prompts", registry=own)
        self.reused = Counter("kvpass_prefix_tokens", "Of those, forked from a prefix", registry=own)
        self.generated = Counter("kvpass_generated_tokens", "Tokens of answers", registry=own)
        self.steps = Counter("kvpass_steps", "Steps of the batch", registry=own)
        self.first = Histogram("kvpass_first_token_seconds", "From arrival to the first token", registry=own)
        self.whole = Histogram("kvpass_request_seconds", "From arrival to the last token", registry=own)

    def text(self) -> bytes:
        return generate_latest(self.registry)
