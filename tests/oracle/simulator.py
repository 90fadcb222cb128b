"""A naive evicting cache: all tokens stay in memory, a set per (layer, row, KV head) says which ones count.

simulator = Simulator("h2o", 0.2)
out = simulator.attend(layer, q, k, v, mask, scale)  # k, v: ALL tokens so far; evicts afterwards
simulator.kept(layer)                                # [[positions] per head] per row
simulator.follow([positions of each layer])          # compare with a library's choice, adopt near-ties

A policy never sees padding: to it a row is its real tokens, numbered from 0. Positions, padding counted, are for masks
and for comparisons.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from oracle.base import ROUNDING, Budget, Memory, Policy, Row, Sight
from oracle.choice import Choice, objection
from oracle.flat import by_table, counts, extras, joint_objection
from oracle.policies import POLICIES
from oracle.spread import model, preference, threshold

Array = np.ndarray


class Head:
    """One KV head of one row: which tokens it holds (by position), and what it remembers of them (by number)."""

    def __init__(self) -> None:
        self.holds = np.zeros(0, dtype=bool)  # by position
        self.memory = Memory()
        self.choice: Choice | None = None  # the latest

    def grow(self, length: int, tokens: int) -> None:
        self.holds = np.concatenate([self.holds, np.zeros(length - len(self.holds), dtype=bool)])
        self.memory.grow(tokens)

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
        self.valid: list[list[int]] = [[] for _ in range(rows)]  # positions of real tokens, evicted ones too
        self.votes = 0
        self.rows: list[Row] = []  # of the call that is running
        self.extra = [[0] * heads for _ in range(rows)]  # slots beyond the even budget, where heads share one
        self.shares = False  # the latest call shared a layer's budget out
        self.waits = False  # the call that is running shares slots out when it has passed all layers
        self.waited = 0  # generated tokens since something went
        self.sights: dict[tuple[int, int], Sight] = {}  # of the latest call, by row and head

    def enter(self, b: int, start: int, valid: Array) -> Row:
        """Count the call's valid tokens of row b."""
        before = len(self.valid[b])
        self.valid[b] += (start + np.flatnonzero(valid)).tolist()
        return Row(start, valid, before, len(self.valid[b]))

    def numbers(self, b: int, positions: Array) -> Array:
        """Which of row b's real tokens stand there."""
        found = np.searchsorted(self.valid[b], positions)
        assert (np.array(self.valid[b])[found] == positions).all(), "padding is held"
        return found

    def positions(self, b: int, numbers: Array) -> Array:
        return np.array(self.valid[b], dtype=int)[numbers]


class Simulator:
    def __init__(
        self, policy: str | Policy, budget: float | int = 1.0, floor: int = 64, rounding: float = ROUNDING
    ) -> None:
        self.policy: Policy = POLICIES[policy]() if isinstance(policy, str) else policy
        self.budget = Budget.of(budget, floor)
        self.policy.steady = self.budget.slots is not None
        self.rounding = rounding
        self.layers: dict[int, Layer] = {}
        self.depth = 0  # layers of the model, if the policy asks
        self.outward: dict[int, torch.Tensor] = {}  # [Hq,Dv,hidden] output projection of each layer, if it asks
        self.step = -1
        self.angles: torch.Tensor | None = None  # radians by which a pair of a key's entries turns per position
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
                keys = self.turned(index, b, h, k[b, h], S) if self.policy.reindexed else k[b, h]
                z = logits(q[b, group], keys, visible[b, group], extra, scale)
                rows = torch.softmax(z, dim=-1).nan_to_num_(nan=0.0)  # rows that see nothing are zero
                out[b, group] = rows @ v[b, h].double()
                self.observe(index, b, h, rows, visible[b, group])
                if self.policy.needs:
                    self.look(index, b, h, rows, z, visible[b, group], k[b, h], v[b])
        self.leave(index)
        return out.to(q.dtype)

    def turned(self, index: int, b: int, h: int, k: torch.Tensor, new: int) -> torch.Tensor:
        """Keys [T,D] as if the tokens that were evicted before this call of `new` tokens had never been."""
        assert self.angles is not None
        layer, start = self.layers[index], len(k) - new
        held = {int(p) for p in layer.heads[b][h].positions if p < start}
        out, half = k.double().clone(), k.shape[1] // 2
        for p in held:
            gone = sum(p < other < start and other not in held for other in layer.valid[b])
            turn = gone * self.angles
            first, second = k[p, :half].double(), k[p, half:].double()
            out[p, :half] = first * turn.cos() - second * turn.sin()
            out[p, half:] = second * turn.cos() + first * turn.sin()
        return out

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
                head.grow(T, row.seen)
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
        head, real = layer.heads[b][h], layer.valid[b]
        held = layer.numbers(b, head.positions)
        self.policy.observe(head.memory, a[:, real], visible.any(0).numpy()[:, real], layer.rows[b], held)

    def look(
        self,
        index: int,
        b: int,
        h: int,
        rows: torch.Tensor,
        z: torch.Tensor,
        visible: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        """What else a policy may ask for. Probabilities and logits [G,S,T], keys [T,D], values of all heads."""
        layer = self.layers[index]
        row, head, outward = layer.rows[b], layer.heads[b][h], self.outward.get(index)
        real = layer.valid[b]
        sight = Sight(
            rows=rows.numpy()[..., real],
            logits=z.numpy()[..., real],
            sees=visible.any(0).numpy()[:, real],
            keys=k.double().numpy()[real],
            values=v.double().numpy()[:, real],
            outward=None if outward is None else outward.numpy(),
            candidates=layer.numbers(b, head.positions),
            row=row,
            layer=index,
            head=h,
            n=self.even(index, row),
            rounding=self.rounding,
            due=len(row.valid) == 1 and layer.waited + 1 == self.policy.every > 1,
        )
        self.policy.look(head.memory, sight)
        layer.sights[b, h] = sight

    def even(self, index: int, row: Row) -> int:
        """Slots per head of a layer, on average over its heads."""
        return self.policy.budget(self.budget(row.seen), row.seen, index, self.depth)

    def leave(self, index: int) -> None:
        """End of the call for this layer: evict."""
        layer = self.layers[index]
        if self.policy.spread and len(layer.rows[0].valid) > 1:
            layer.waits = True
            return
        if self.due(layer):
            for b, row in enumerate(layer.rows):
                self.evict(layer, b, row, self.even(index, row))

    def due(self, layer: Layer) -> bool:
        """Does this call evict?"""
        row = layer.rows[0]
        if len(row.valid) > 1:
            layer.waited = 0
            return self.policy.when != "first" or row.start == 0
        layer.waited += 1
        if self.policy.when != "always" or layer.waited < self.policy.every:
            return False
        layer.waited = 0
        return True

    def evict(self, layer: Layer, b: int, row: Row, even: int) -> None:
        """Each head of row b drops to its budget; a single token drives out one at most."""
        heads, one = layer.heads[b], len(row.valid) == 1 and self.policy.every == 1
        if self.policy.rings:
            new = list(range(row.before, row.seen))
            for head in heads:
                old = layer.numbers(b, head.positions[head.positions < row.start])
                head.choice = None
                kept = self.policy.insert(head.memory, old, new, row.before, even)
                head.keep(layer.positions(b, np.array(kept, dtype=int)))
            return
        budgets = [even + (extra if one else 0) for extra in layer.extra[b]]
        choices = self.choices(layer, b, row, budgets)
        reached = threshold(choices, even, self.policy.cut)
        for head, choice, count in zip(heads, choices, reached, strict=True):
            most = len(choice.positions)
            choice.keep = count if self.policy.cut > -np.inf else choice.keep
            choice.keep = max(min(choice.keep, most), most - 1 if one else 0)
            head.choice = choice
        layer.shares = self.policy.safeguard is not None and not one and not self.policy.spread
        if layer.shares:
            assert self.policy.safeguard is not None
            shared_out = counts([head.choice for head in heads], even, self.policy.safeguard)
            layer.extra[b] = extras(shared_out, even)
            for head, count in zip(heads, shared_out, strict=True):
                head.choice.keep = count
        if self.policy.table is not None and not one:
            index = next(i for i, other in self.layers.items() if other is layer)
            shared_out = by_table([head.choice for head in heads], even, self.policy.table[index])
            layer.extra[b] = extras(shared_out, even)
            for head, count in zip(heads, shared_out, strict=True):
                head.choice.keep = count
        for head in heads:
            head.keep(layer.positions(b, head.choice.kept()))

    def share_out(self) -> None:
        """End of a call of several tokens for all layers that wait."""
        layers = [self.layers[i] for i in sorted(self.layers) if self.layers[i].waits]
        for b in range(len(layers[0].rows) if layers else 0):
            row = layers[0].rows[b]
            if self.stays(row):
                continue
            for layer in layers if self.policy.needs else []:
                heads = range(len(layer.heads[b]))
                self.policy.together([h.memory for h in layer.heads[b]], [layer.sights[b, h] for h in heads])
            even = self.even(0, row)
            choices = [self.choices(layer, b, row, [even] * len(layer.heads[b])) for layer in layers]
            for layer, made in zip(layers, choices, strict=True):
                for head, choice in zip(layer.heads[b], made, strict=True):
                    head.choice = choice
            none = [[0] * len(made) for made in choices]
            if self.policy.spread == "model":
                kept, extra = model(choices, even, self.policy.safeguard or Fraction(0))
            elif self.policy.spread == "preference":
                heads = range(len(layers[0].heads[b]))
                wanted = [self.policy.prefer([layer.sights[b, h] for h in heads]) for layer in layers]
                kept, extra = preference(choices, even, wanted, self.policy.window)
            else:
                kept, extra = [threshold(made, even, self.policy.cut) for made in choices], none
            for layer, counts_of, above in zip(layers, kept, extra, strict=True):
                layer.extra[b] = above
                for head, count in zip(layer.heads[b], counts_of, strict=True):
                    assert head.choice is not None
                    head.choice.keep = count
                    head.keep(layer.positions(b, head.choice.kept()))

    def stays(self, row: Row) -> bool:
        """Does nothing of this row go at the end of a call of several tokens?"""
        return bool(self.policy.when == "calls" and row.before and row.seen - row.before < self.policy.shortest)

    def choices(self, layer: Layer, b: int, row: Row, budgets: list[int]) -> list[Choice]:
        """What every head of row b may choose from, `keep` still without a bound."""
        heads = layer.heads[b]
        scores = [self.policy.score(head.memory) for head in heads]
        errors = [self.policy.error(head.memory, self.rounding) for head in heads]
        if self.policy.shared:
            scores = [np.mean(scores, axis=0)] * len(heads)
            errors = errors if errors[0] is None else [np.mean(errors, axis=0)] * len(heads)
        made = []
        for head, score, error, n in zip(heads, scores, errors, budgets, strict=True):
            p = layer.numbers(b, head.positions)
            key, power = self.policy.scope_key(head.memory)
            choice = Choice(
                positions=p,
                score=score[p],
                variance=key[p],
                power=power[p],
                protected=self.policy.protected(p, row, n),
                untouchable=self.policy.untouchable(n),
                keep=n,
                queries=layer.votes,
                error=None if error is None else error[p],
                blurred=head.memory.blurred[p] > 0,
            )
            made.append(choice)
        return made

    def pick(self, rows: Sequence[int]) -> None:
        """Row b becomes a copy of row rows[b], with all that its heads hold and remember."""
        for layer in self.layers.values():
            for name in ("heads", "valid", "extra"):
                old = getattr(layer, name)
                setattr(layer, name, [copy.deepcopy(old[b]) for b in rows])

    def kept(self, index: int) -> list[list[Array]]:
        """[row][head] -> positions held, ascending."""
        return [[head.positions for head in row] for row in self.layers[index].heads]

    def record(self) -> None:
        """End of a call: remember what every head holds."""
        self.share_out()
        self.step += 1
        self.history.append([self.kept(i) for i in sorted(self.layers)])

    def follow(self, theirs: list[torch.Tensor]) -> None:
        """Compare with positions [B,Hkv,C] (-1 = empty) of every layer that was simulated. What float32 rounding
        explains is adopted and counted, the rest fails."""
        self.record()
        assert len(theirs) == len(self.layers), f"{len(theirs)} layers reported, the model has {len(self.layers)}"
        if self.policy.spread == "model" and any(layer.waits for layer in self.layers.values()):
            self.follow_model(theirs)
        for index, tensor in zip(sorted(self.layers), theirs, strict=True):
            self.layers[index].waits = False
            shape = (len(self.layers[index].heads), len(self.layers[index].heads[0]))
            assert tensor.shape[:2] == shape, f"layer {index}: {tuple(tensor.shape[:2])} rows, heads; not {shape}"
            for b, heads in enumerate(self.layers[index].heads):
                held = [tensor[b, h].cpu().numpy() for h in range(len(heads))]
                held = [self.layers[index].numbers(b, np.sort(slots[slots >= 0])) for slots in held]
                self.follow_row(index, b, held)

    def follow_model(self, theirs: list[torch.Tensor]) -> None:
        """Where all layers share one budget, adopt the counts that float32 may have found."""
        layers = [self.layers[i] for i in sorted(self.layers)]
        for b in range(len(layers[0].heads)):
            if self.stays(layers[0].rows[b]):
                continue
            choices = [head.choice for layer in layers for head in layer.heads[b] if head.choice is not None]
            held = [layers[0].numbers(b, np.sort(h[h >= 0])) for tensor in theirs for h in tensor[b].cpu().numpy()]
            if all(np.array_equal(c.kept(), t) for c, t in zip(choices, held, strict=True)):
                continue
            even = self.even(0, layers[0].rows[b])
            why = joint_objection(choices, held, even, self.policy.safeguard or Fraction(0), self.rounding)
            if why:
                raise AssertionError(f"step {self.step}, all layers, row {b}: {why}")
            above = extras([len(t) for t in held], even)
            for layer in layers:
                layer.extra[b] = [above.pop(0) for _ in layer.heads[b]]
            for choice, t in zip(choices, held, strict=True):
                choice.keep = len(t)

    def follow_row(self, index: int, b: int, theirs: list[Array]) -> None:
        layer, where = self.layers[index], f"step {self.step}, layer {index}, row {b}"
        heads = layer.heads[b]
        ours = [layer.numbers(b, head.positions) for head in heads]
        if layer.shares and any(not np.array_equal(one, t) for one, t in zip(ours, theirs, strict=True)):
            even = self.even(index, layer.rows[b])
            why = joint_objection([h.choice for h in heads], theirs, even, self.policy.safeguard, self.rounding)
            if why:
                raise AssertionError(f"{where}: {why}")
            for head, t in zip(heads, theirs, strict=True):
                head.choice.keep = len(t)
            layer.extra[b] = extras([len(t) for t in theirs], even)
        for h, head in enumerate(heads):
            head.keep(layer.positions(b, self.followed_head(head, ours[h], theirs[h], f"{where}, head {h}")))

    def followed_head(self, head: Head, ours: Array, theirs: Array, where: str) -> Array:
        """Numbers of the tokens that the head holds from here on."""
        self.compared += 1
        if np.array_equal(ours, theirs):
            return ours
        only_theirs, only_ours = np.setdiff1d(theirs, ours), np.setdiff1d(ours, theirs)
        assert head.choice is not None
        why = objection(head.choice, theirs, self.rounding)
        if why:
            sets = f"Only the library keeps {only_theirs[:20]}, only the oracle {only_ours[:20]}"
            raise AssertionError(f"{where}: {why}. {sets}")
        self.near_ties += 1
        self.followed.append(f"{where}: {only_theirs} for {only_ours}")
        return theirs


def split_mask(mask: torch.Tensor | None, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(who may see whom, additive part or None), both of full shape."""
    assert mask is not None, "the oracle wants an explicit mask"
    if mask.dtype == torch.bool:
        return mask.expand(shape), None
    return (mask > torch.finfo(mask.dtype).min / 2).expand(shape), mask.double().expand(shape)


def logits(
    q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """float64 [G,S,T], -inf where a query may not look."""
    z = q.double() @ k.double().T * scale
    if bias is not None:
        z = z + bias
    return z.masked_fill_(~visible, -torch.inf)
