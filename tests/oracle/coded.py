"""An evicting cache whose tokens are codes: the simulator, shown each token's key and value as its slot holds them.

A token is whole in the call that brings several tokens. From then on it is read as its codes say, but for the newest
`residual` tokens and the first `sinks` tokens of its row, which stay whole. Padding is no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle import fits
from oracle.codes import read_back
from oracle.simulator import Simulator
from torch import Tensor


@dataclass(frozen=True)
class Held:
    """How slots hold tokens."""

    k: str = "dense"
    v: str = "dense"
    rotate: bool = False
    group: int = 64
    residual: int = 0
    sinks: int = 0
    fit_k: str = "none"
    fit_v: str = "none"
    channels: float = 0.6

    @property
    def spec(self) -> dict[str, object]:
        """As a policy file says it."""
        turn = "hadamard" if self.rotate else "none"
        return {"k": self.k, "v": self.v, "rotate": turn, "group": self.group, "residual": self.residual,
                "sinks": self.sinks, "fit_k": self.fit_k, "fit_v": self.fit_v,
                "channels": self.channels}  # fmt: skip

    def whole(self, valid: list[bool], new: int) -> list[bool]:
        """Which columns of a row, the last `new` of which come now, are read whole in it. valid: without padding."""
        step = len(valid) > new == 1  # its own token is one of the newest; of several tokens all are whole
        before = valid if step else valid[: len(valid) - new]
        newest, out = sum(before) - self.residual, []
        for column, number in enumerate(sum(valid[:t]) for t in range(len(valid))):
            own = not step and column >= len(before)
            out.append(own or (valid[column] and (number >= newest or number < self.sinks)))
        return out


class CodedSimulator(Simulator):
    """`attend` as `Simulator` has it, with keys and values as the model made them: all tokens so far."""

    held = Held()

    def __init__(self, *args: Any, held: Held, **options: Any) -> None:
        super().__init__(*args, **options)
        self.held = held
        self.codes: dict[tuple[int, str], Tensor] = {}
        self.fits: dict[tuple[int, str], list[list[fits.Fit] | None]] = {}
        self.valid: list[list[bool]] = []
        self.judged: dict[int, Tensor] = {}
        self.values = torch.empty(0)

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        new, tokens = q.shape[2], k.shape[2]
        sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        own = sees.expand(len(q), -1, new, tokens)[..., tokens - new :].any(2).any(1)
        self.valid = self.valid or [[] for _ in q]
        for row, valid in zip(self.valid, own.tolist(), strict=True):
            row[tokens - new :] = valid
        self.fit(index, q, k, v)
        whole = self.whole(index, k.shape[1], new)[..., None]
        read = [torch.where(whole, x.double(), self.coded(index, half, x)) for half, x in (("k", k), ("v", v))]
        before = self.judged.get(index, k[:, :, :0].double())
        one = tokens > new == 1
        self.judged[index] = torch.cat([before, k[:, :, -1:].double()], 2) if one else read[0]
        self.values = v
        return super().attend(index, q.double(), *read, mask, scale).to(q.dtype)

    def whole(self, index: int, heads: int, new: int) -> Tensor:
        """Which columns are read whole in a call of `new` tokens: bool [B, 1 or heads, T]."""
        return torch.tensor([self.held.whole(row, new) for row in self.valid])[:, None]

    def look(self, index: int, b: int, h: int, *seen: Tensor) -> None:
        """A value's weight is given when it comes, by what the model made; a key is judged when it comes, and again in
        each call of several tokens, as it is held by then.
        """
        rows, z, visible, _, _ = seen
        super().look(index, b, h, rows, z, visible, self.judged[index][b, h], self.values[b])

    def pick(self, rows: Sequence[int]) -> None:
        super().pick(rows)
        self.valid = [list(self.valid[b]) for b in rows]
        self.fits = {at: [of[b] for b in rows] for at, of in self.fits.items()}
        for tensors in (self.codes, self.judged):
            for at, held in tensors.items():
                tensors[at] = held[list(rows)]

    def coded(self, index: int, half: str, x: Tensor) -> Tensor:
        """What the codes of all tokens so far say, each made once."""
        before = self.codes.get((index, half), x.double()[:, :, :0])
        name, new = getattr(self.held, half), x[:, :, before.shape[2] :]
        if getattr(self.held, f"fit_{half}") == "none":
            more = read_back(new, name, self.held.group, self.held.rotate)
        else:
            more = torch.stack([self.fitted(new[b], name, own) for b, own in enumerate(self.fits[index, half])])
        self.codes[index, half] = torch.cat([before, more], 2)
        return self.codes[index, half]

    def fit(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """A row's heads are fitted to its first tokens, if they come together."""
        for half, x in (("k", k), ("v", v)):
            kind = getattr(self.held, f"fit_{half}")
            if kind == "none":
                continue
            rows = self.fits.setdefault((index, half), [None] * len(q))
            for b, (valid, before) in enumerate(zip(self.valid, rows, strict=True)):
                new = [t for t in range(k.shape[2] - q.shape[2], k.shape[2]) if valid[t]]
                alone = k.shape[2] > q.shape[2] == 1
                if before is not None or not new:
                    continue
                asked = q[b].unflatten(0, (k.shape[1], -1))[:, :, [t - k.shape[2] for t in new]]
                given = zip(asked.float().tolist(), x[b, :, new].float().tolist(), strict=True)
                rows[b] = [
                    fits.Fit(x.shape[-1]) if alone else fits.fit_of(kind, *one, self.held.channels) for one in given
                ]

    def fitted(self, new: Tensor, name: str, own: list[fits.Fit] | None) -> Tensor:
        """float64 [Hkv, n, width] of new tokens of a row; nobody asks what padding is read as."""
        if own is None:
            return new.double()
        both = zip(new, own, strict=True)
        return torch.stack([fits.read_back(x, name, self.held.group, self.held.rotate, one) for x, one in both])
