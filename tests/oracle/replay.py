"""KVzip's replay with masks on the unmodified model, in float64 and plain loops, one row at a time.

Written from arXiv 2505.23416 and shared/policies-2.md S1. All tokens stay in memory; for each layer and KV head a list
of booleans says which ones count. A softmax over fewer keys is the softmax over all of them, divided by their share.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from spelling import with_cache
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

READING: list[Reader] = []
"""Whose model runs."""

UNSCORED = float("inf")


def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
    return READING[-1].attend(module, q[0], k[0], v[0], scaling)[None].transpose(1, 2), None


AttentionInterface.register("reader", attention)
AttentionMaskInterface.register("reader", sdpa_mask)


class Reader:
    """A conversation of one row: each call returns the logits of its last token, and has evicted."""

    def __init__(
        self,
        model: Any,
        slots: int,
        share: str = "model",
        chunk: int = 2000,
        normed: bool = False,
        sinks: int = 4,
        summed: bool = False,
        recent: int = 0,
        shortest: int = 1,
        steps_evict: bool = True,
    ) -> None:
        self.model = copy.deepcopy(model).double()
        self.model.set_attn_implementation("reader")
        self.slots, self.share, self.chunk, self.normed, self.sinks = slots, share, chunk, normed, sinks
        self.summed, self.recent, self.shortest, self.steps_evict = summed, recent, shortest, steps_evict
        self.first: list[int] = []
        self.later: list[int] = []
        self.cache = DynamicCache(config=model.config)
        config = model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_key_value_heads
        self.group = config.num_attention_heads // self.heads
        self.holds = [[[] for _ in range(self.heads)] for _ in range(self.layers)]
        self.score = [[[] for _ in range(self.heads)] for _ in range(self.layers)]
        self.room = [[0] * self.heads for _ in range(self.layers)]
        self.probabilities: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        for block in self.model.model.layers:
            block.self_attn.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.inputs[module.layer_idx] = (args[0] if args else kwargs["hidden_states"])[0]

    def attend(self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        layer, new, length = module.layer_idx, q.shape[1], k.shape[1]
        out, rows = [], []
        for head in range(len(q)):
            own = head // self.group
            holds = self.holds[layer][own]
            sees = torch.tensor(
                [[(j >= len(holds) or holds[j]) and j <= length - new + i for j in range(length)] for i in range(new)]
            )
            p = (q[head] @ k[own].T * scale).masked_fill(~sees, float("-inf")).softmax(-1)
            rows.append(p)
            out.append(p @ v[own])
        self.probabilities[layer], self.values[layer] = torch.stack(rows), v
        return torch.stack(out)

    def run(self, ids: list[int], cache: Any) -> torch.Tensor:
        READING.append(self)
        try:
            with torch.no_grad():
                return self.model(torch.tensor([ids]), **with_cache(self.model, cache), use_cache=True).logits[0]
        finally:
            READING.pop()

    def __call__(self, ids: list[int]) -> torch.Tensor:
        out, before = self.run(ids, self.cache)[-1], len(self.holds[0][0])
        for layer in range(self.layers):
            for head in range(self.heads):
                self.holds[layer][head] += [True] * len(ids)
                self.score[layer][head] += [UNSCORED] * len(ids)
        if before and len(ids) < max(2, self.shortest) and not self.steps_evict:
            return out  # whatever is no prompt stays
        if len(ids) == 1:
            self.step()
            return out
        if not before or len(ids) >= self.shortest:
            self.replay(ids)
        self.evict()
        return out

    def step(self) -> None:
        """A generated token: the worst slot of each head that is above its room goes."""
        for layer in range(self.layers):
            for head in range(self.heads):
                holds, score = self.holds[layer][head], self.score[layer][head]
                while sum(holds) > self.room[layer][head]:
                    held = [j for j in range(self.sinks, len(holds) - self.recent) if holds[j]]
                    holds[min(held, key=lambda j, s=score: (s[j], j if s[j] == UNSCORED else -j))] = False

    def replay(self, ids: list[int]) -> None:
        end = len(self.holds[0][0])
        start = end - len(ids)
        for begin in range(0, len(ids), self.chunk):
            part = ids[begin : begin + self.chunk]
            head = [*self.later, *ids[max(0, begin - 8) : begin]] if begin else self.first
            self.run([*head, *part], copy.deepcopy(self.cache))
            span = range(start + begin, start + begin + len(part))
            for layer in range(self.layers):
                for own in range(self.heads):
                    for j in span:
                        heard = self.heard(layer, own, j, span, end)
                        best, most = max(map(max, heard)), max(map(sum, heard))
                        self.score[layer][own][j] = (best * most) ** 0.5 if self.summed else best

    def heard(self, layer: int, own: int, j: int, span: range, end: int) -> list[list[float]]:
        """What each head of the group, with each query of the probe, gives key j."""
        found = []
        holds = self.holds[layer][own]
        for head in range(own * self.group, (own + 1) * self.group):
            rows = self.probabilities[layer][head]
            read = [c for c in range(rows.shape[1]) if c >= end or c in span or (c < self.sinks and holds[c])]
            shares = rows[:, j] / rows[:, read].sum(-1)
            if self.normed:
                outward = self.model.model.layers[layer].self_attn.o_proj.weight
                wide = self.values[layer].shape[-1]
                carried = outward[:, head * wide : (head + 1) * wide] @ self.values[layer][own, j]
                shares = shares * carried.norm() / self.inputs[layer].norm(dim=-1)
            found.append(shares.tolist())
        return found

    def evict(self) -> None:
        """Slots are shared out: by the whole model, by the heads of a layer, or evenly."""
        everywhere = [(layer, head) for layer in range(self.layers) for head in range(self.heads)]
        groups = {
            "model": [everywhere],
            "heads": [[(layer, head) for head in range(self.heads)] for layer in range(self.layers)],
            "even": [[one] for one in everywhere],
        }[self.share]
        for group in groups:
            entries = []
            for at, (layer, head) in enumerate(group):
                holds, score = self.holds[layer][head], self.score[layer][head]
                for j, held in enumerate(holds):
                    if held:
                        free = self.sinks <= j < len(holds) - self.recent
                        entries.append((free, -score[j], -j if score[j] == UNSCORED else j, j, at))
            kept = {(j, at) for *_, j, at in sorted(entries)[: self.slots * len(group)]}
            for at, (layer, head) in enumerate(group):
                holds = self.holds[layer][head]
                for j in range(len(holds)):
                    holds[j] = holds[j] and (j, at) in kept
        most = max(sum(self.holds[layer][head]) for layer, head in everywhere)
        for layer, head in everywhere:
            held = sum(self.holds[layer][head])
            self.room[layer][head] = held if most > self.slots else self.slots

    def kept(self) -> list[list[list[int]]]:
        return [[[j for j, held in enumerate(holds) if held] for holds in layer] for layer in self.holds]
