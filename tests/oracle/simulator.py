"""A naive evicting cache: all tokens stay in memory, a set per (layer, row, KV head) says which ones count.

simulator = Simulator("h2o", 0.2)
out = simulator.attend(layer, q, k, v, mask, scale)  # k, v: ALL tokens so far; evicts afterwards
simulator.kept(layer)                                # [[positions] per head] per row
simulator.follow([positions of each layer])          # compare with a library's choice, adopt near-ties
"""

from __future__ import annotations

import numpy as np
import torch
from oracle.choice import Choice, objection
from oracle.policies import POLICIES, Budget, Memory, Policy, Row

Array = np.ndarray

ROUNDING = 2.0**-14
"""How far float32 may move a score, relative to its size: 1024 units in the last place.

The relative error of a probability is the absolute error of its logit, a dot product of projections of
hidden states that carry the rounding of all layers before. `test_oracle_rounding` measures it on SmolLM2,
float32 against float64: at most 3.4e-5 for one query's probabilities, 1.8e-5 for sums over queries.
"""


class Head:
    """One KV head of one row: which tokens it holds, and what it remembers of them."""

    def __init__(self) -> None:
        self.holds = np.zeros(0, dtype=bool)  # by position
        self.memory = Memory()
        self.choice: Choice | None = None  # the latest

    def grow(self, length: int) -> None:
        self.holds = np.concatenate([self.holds, np.zeros(length - len(self.holds), dtype=bool)])
        self.memory.grow(length)

    @property
    def positions(self) -> Array:
        return np.flatnonzero(self.holds)

    def keep(self, positions: Array) -> None:
        self.holds[:] = False
        self.holds[positions] = True


class Layer:
    """All heads of one layer, and what was seen of each row."""

    def __init__(self, rows: int, heads: int) -> None:
        self.heads = [[Head() for _ in range(heads)] for _ in range(rows)]
        self.first = [-1] * rows
        self.end = [0] * rows
        self.seen = [0] * rows
        self.votes = 0
        self.rows: list[Row] = []  # of the call that is running

    def enter(self, b: int, start: int, valid: Array) -> Row:
        """Count the call's valid tokens of row b."""
        new = start + np.flatnonzero(valid)
        if len(new):
            self.first[b] = new[0] if self.first[b] < 0 else self.first[b]
            self.end[b] = new[-1] + 1
            self.seen[b] += len(new)
        return Row(start, valid, self.first[b], self.end[b], self.seen[b])


class Simulator:
    def __init__(self, policy: str, budget: float | int = 1.0, floor: int = 64, rounding: float = ROUNDING) -> None:
        self.policy: Policy = POLICIES[policy]()
        self.budget = Budget.of(budget, floor)
        self.rounding = rounding
        self.layers: dict[int, Layer] = {}
        self.step = -1
        self.history: list[list[list[list[Array]]]] = []  # [step][layer][row][head] -> positions
        self.compared = 0
        self.near_ties = 0
        self.followed: list[str] = []

    def attend(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q [B,Hq,S,D]; k, v [B,Hkv,T,*] of all tokens so far; mask broadcastable to [B,Hq,S,T], bool or
        additive. Evicts at the end."""
        (B, Hq, S, _), (Hkv, T) = q.shape, k.shape[1:3]
        sees, bias = split_mask(mask, (B, Hq, S, T))
        visible = self.enter(index, sees, Hkv)
        out = torch.empty(B, Hq, S, v.shape[-1], dtype=torch.float64)
        for b in range(B):
            for h in range(Hkv):
                group = slice(h * Hq // Hkv, (h + 1) * Hq // Hkv)
                extra = bias[b, group] if bias is not None else None
                rows = probabilities(q[b, group], k[b, h], visible[b, group], extra, scale)
                out[b, group] = rows @ v[b, h].double()
                self.observe(index, b, h, rows, visible[b, group])
        self.leave(index)
        return out.to(q.dtype)

    def enter(self, index: int, sees: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """A call reaches a layer: `sees` [B,Hq,S,T] says whom its queries may see, the call's tokens are the last S.
        Returns what is visible of it. Then `observe` for every row and KV head, and `leave`."""
        B, _, S, T = sees.shape
        layer = self.layers.setdefault(index, Layer(B, kv_heads))
        own = sees[..., T - S :].any(2).any(1).numpy()
        layer.rows = [layer.enter(b, T - S, own[b]) for b in range(B)]
        layer.votes += S
        for row, heads in zip(layer.rows, layer.heads, strict=True):
            for head in heads:
                head.grow(T)
                head.holds[T - S :] = row.valid
        return self.visible(index, sees)

    def visible(self, index: int, sees: torch.Tensor) -> torch.Tensor:
        """`sees` without the tokens that were evicted."""
        holds = np.array([[head.holds for head in row] for row in self.layers[index].heads])
        group = sees.shape[1] // holds.shape[1]
        return sees & torch.from_numpy(holds).repeat_interleave(group, 1)[:, :, None]

    def observe(self, index: int, b: int, h: int, rows: torch.Tensor, visible: torch.Tensor) -> None:
        """Probabilities and visibility [G,S,T] of the query heads that share KV head h of row b."""
        layer, a = self.layers[index], rows.mean(0).numpy()
        head = layer.heads[b][h]
        self.policy.observe(head.memory, a, visible.any(0).numpy(), layer.rows[b], head.positions)

    def leave(self, index: int) -> None:
        """End of the call for this layer: evict."""
        for b, row in enumerate(self.layers[index].rows):
            self.evict(self.layers[index], b, row)

    def evict(self, layer: Layer, b: int, row: Row) -> None:
        """Each head of row b drops to its budget."""
        heads, n = layer.heads[b], self.budget(row.seen)
        scores = [self.policy.score(head.memory) for head in heads]
        if self.policy.shared:
            scores = [np.mean(scores, axis=0)] * len(heads)
        for head, score in zip(heads, scores, strict=True):
            p, m = head.positions, head.memory
            power = m.sumsq / np.maximum(m.count, 1)
            keep, scope = min(n, len(p)), self.policy.untouchable(n)
            protected = self.policy.protected(p, row, n)
            head.choice = Choice(p, score[p], m.variance()[p], power[p], protected, scope, keep, layer.votes)
            head.keep(head.choice.kept())

    def kept(self, index: int) -> list[list[Array]]:
        """[row][head] -> positions held, ascending."""
        return [[head.positions for head in row] for row in self.layers[index].heads]

    def record(self) -> None:
        """End of a call: remember what every head holds."""
        self.step += 1
        self.history.append([self.kept(i) for i in sorted(self.layers)])

    def follow(self, theirs: list[torch.Tensor]) -> None:
        """Compare with positions [B,Hkv,C] (-1 = empty) of every layer that was simulated. What float32 rounding
        explains is adopted and counted, the rest fails."""
        self.record()
        assert len(theirs) == len(self.layers), f"{len(theirs)} layers reported, the model has {len(self.layers)}"
        for index, tensor in zip(sorted(self.layers), theirs, strict=True):
            shape = (len(self.layers[index].heads), len(self.layers[index].heads[0]))
            assert tensor.shape[:2] == shape, f"layer {index}: {tuple(tensor.shape[:2])} rows, heads; not {shape}"
            for b, row in enumerate(self.layers[index].heads):
                for h, head in enumerate(row):
                    held = tensor[b, h].cpu().numpy()
                    where = f"step {self.step}, layer {index}, row {b}, head {h}"
                    self.follow_head(head, np.sort(held[held >= 0]), where)

    def follow_head(self, head: Head, theirs: Array, where: str) -> None:
        self.compared += 1
        if np.array_equal(head.positions, theirs):
            return
        only_theirs, only_ours = np.setdiff1d(theirs, head.positions), np.setdiff1d(head.positions, theirs)
        assert head.choice is not None
        why = objection(head.choice, theirs, self.rounding)
        if why:
            sets = f"Only the library keeps {only_theirs[:20]}, only the oracle {only_ours[:20]}"
            raise AssertionError(f"{where}: {why}. {sets}")
        self.near_ties += 1
        self.followed.append(f"{where}: {only_theirs} for {only_ours}")
        head.keep(theirs)


def split_mask(mask: torch.Tensor | None, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(who may see whom, additive part or None), both of full shape."""
    assert mask is not None, "the oracle wants an explicit mask"
    if mask.dtype == torch.bool:
        return mask.expand(shape), None
    return (mask > torch.finfo(mask.dtype).min / 2).expand(shape), mask.double().expand(shape)


def probabilities(
    q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """softmax over the visible keys, float64 [G,S,T]; rows that see nothing are zero."""
    logits = q.double() @ k.double().T * scale
    if bias is not None:
        logits = logits + bias
    logits.masked_fill_(~visible, -torch.inf)
    return torch.softmax(logits, dim=-1).nan_to_num_(nan=0.0)
