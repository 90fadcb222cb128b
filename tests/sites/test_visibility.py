"""Masks as proofs: what is said of a mask agrees with the mask, element by element and for all sizes, or the mask stays
a tensor.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kvpass.kernels.attention.masks import visible
from kvpass.kernels.attention.visibility import Sees, Shown, as_mask
from kvpass.patterns import DEFAULT
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from kvpass.graph.extract import functions_of
from kvpass.sites.scan import scan
from kvpass.sites.site import Site

HEADS = 2
SIZES = [(7, 0), (12, 5), (9, 20), (1, 14), (1, 3)]
"""Queries and past tokens of a call."""

Make = Callable[[Tensor, int, int], Tensor]
"""From real tokens, int64 [B, T], and the numbers of queries and of past tokens to a mask."""


class Attention(nn.Module):
    """One attention with a cache that grows."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor, real: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        new = x.unflatten(-1, (HEADS, 8)).transpose(1, 2)
        past = 0 if k is None else k.shape[2]
        keys, values = new * 0.5, new * 2.0
        if k is not None and v is not None:
            keys, values = torch.cat([k, keys], 2), torch.cat([v, values], 2)
        return scaled_dot_product_attention(new, keys, values, self.make(real, x.shape[1], past)), keys, values


def p_and_k(real: Tensor, queries: int, past: int) -> tuple[Tensor, Tensor]:
    """Positions of queries, [S, 1], and of keys, [1, T]."""
    return past + torch.arange(queries)[:, None], torch.arange(real.shape[1])[None]


CAUSAL: dict[str, Make] = {
    "le": lambda real, s, past: p_and_k(real, s, past)[1] <= p_and_k(real, s, past)[0],
    "ge": lambda real, s, past: p_and_k(real, s, past)[0] >= p_and_k(real, s, past)[1],
    "not gt": lambda real, s, past: ~(p_and_k(real, s, past)[1] > p_and_k(real, s, past)[0]),
    "distance": lambda real, s, past: (p_and_k(real, s, past)[0] - p_and_k(real, s, past)[1]) >= 0,
    "lt": lambda real, s, past: p_and_k(real, s, past)[1] < p_and_k(real, s, past)[0] + 1,
    "tril": lambda real, s, past: torch.ones(s, real.shape[1], dtype=torch.bool).tril(past),
    "buffer": lambda real, s, past: torch.ones(64, 64, dtype=torch.bool).tril()[past : past + s, : real.shape[1]],
    "padded": lambda real, s, past: F.pad(CAUSAL["le"](real, s, past), (2, 0), value=True)[:, 2:],
    "joined": lambda real, s, past: torch.cat([torch.ones(s, 2, dtype=torch.bool), CAUSAL["le"](real, s, past)], 1)[
        :, 2:
    ],
}
WINDOW: dict[str, Make] = {
    "gt": lambda real, s, past: p_and_k(real, s, past)[1] > p_and_k(real, s, past)[0] - 6,
    "less": lambda real, s, past: p_and_k(real, s, past)[0] - p_and_k(real, s, past)[1] < 6,
    "at most": lambda real, s, past: p_and_k(real, s, past)[0] - p_and_k(real, s, past)[1] <= 5,
    "triu": lambda real, s, past: torch.ones(s, real.shape[1], dtype=torch.bool).triu(past - 5),
}
CHUNK: dict[str, Make] = {
    "floor": lambda real, s, past: p_and_k(real, s, past)[1] // 8 == p_and_k(real, s, past)[0] // 8,
}
TOKENS: dict[str, Make] = {
    "bool": lambda real, s, past: real.bool()[:, None, None],
    "ne": lambda real, s, past: real[:, None, None, :] != 0,
    "eq": lambda real, s, past: ~(real == 0)[:, None, None, :],
    "expanded": lambda real, s, past: real.bool()[:, None, None].expand(-1, 1, s, -1),
    "of other rows": lambda real, s, past: real.flip(0).bool()[:, None, None],
    "looked up": lambda real, s, past: real.bool()[torch.arange(len(real))[:, None, None], torch.arange(real.shape[1])][
        :, None
    ],
}
OTHERS: dict[str, Make] = {
    "tokens of the first row": lambda real, s, past: (real[0] != 0).expand(s, -1),
    "packed": lambda real, s, past: (
        real.cumsum(1)[:, None, past : past + s, None] // 5 == real.cumsum(1)[:, None, None] // 5
    ),
    "prefix": lambda real, s, past: (p_and_k(real, s, past)[1] < 4) | CAUSAL["le"](real, s, past),
    "stripes": lambda real, s, past: p_and_k(real, s, past)[1] % 2 == 0 * p_and_k(real, s, past)[0],
    "ahead": lambda real, s, past: p_and_k(real, s, past)[1] <= p_and_k(real, s, past)[0] + 1,
    "band": lambda real, s, past: (p_and_k(real, s, past)[0] - p_and_k(real, s, past)[1]).abs() < 4,
    "per head": lambda real, s, past: (
        p_and_k(real, s, past)[1] > p_and_k(real, s, past)[0] - torch.tensor([3, 9])[:, None, None]
    )[None],
    "both tokens": lambda real, s, past: real.bool()[:, None, None] & (real.flip(1) > 0)[:, None, None],
    "by query": lambda real, s, past: real.bool()[:, None, past : past + s, None] & CAUSAL["le"](real, s, past),
    "doubled": lambda real, s, past: real[:, None, None] * 2 > 1,
}
NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda seen: torch.where(seen, 0.0, torch.finfo(torch.float32).min),
    "masked_fill": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, float("-inf")),
    "inverted": lambda seen: (1.0 - seen.float()) * torch.finfo(torch.float32).min,
    "times": lambda seen: (~seen) * -1e9,
}
BIASES: dict[str, Make] = {
    "alibi": lambda real, s, past: (
        (p_and_k(real, s, past)[1] - p_and_k(real, s, past)[0]) * torch.tensor([0.5, 0.25])[:, None, None]
    ),
    "alibi by key": lambda real, s, past: torch.arange(real.shape[1]) * torch.tensor([0.5, 0.25])[:, None, None],
    "small": lambda real, s, past: CAUSAL["le"](real, s, past) * -0.5,
    "weak": lambda real, s, past: torch.where(CAUSAL["le"](real, s, past), 0.0, -1000.0),
}


def found(make: Make) -> list[tuple[Site, Tensor, Tensor, int, int]]:
    """What is said of a mask in graphs of all sizes, with the mask, the tokens and the sizes of each call."""
    said: list[tuple[Site, Tensor, Tensor, int, int]] = []

    def backend(gm: Any, inputs: Any) -> Any:
        table = scan(gm, DEFAULT)
        assert len(table.sites) == 1, str(table)

        def call(*args: Any) -> Any:
            [site] = table.sites
            tokens = site.seen.tokens
            value = real if tokens is None else functions_of(gm, [tokens])(args)[0]
            said.append((site, mask, value, count, past))
            return gm.forward(*args)

        return call

    torch._dynamo.reset()
    run = torch.compile(Attention(make), backend=backend, dynamic=True)
    g = torch.Generator().manual_seed(1)
    for count, past in SIZES:
        real = (torch.rand(3, past + count, generator=g) > 0.2).long()
        real[0] = 1
        mask = make(real, count, past)
        cache = [torch.randn(3, HEADS, past, 8, generator=g) if past else None for _ in range(2)]
        run(torch.randn(3, count, HEADS * 8, generator=g), real, *cache)
    assert len(said) == len(SIZES)
    return said


def check(make: Make) -> set[str]:
    """Whatever is said of the mask is so. Returns it, for people."""
    said = set()
    for site, mask, real, count, past in found(make):
        said.add(str(site.seen))
        if site.seen.read:
            continue
        tokens = real.bool() if site.seen.tokens is not None else None
        words = as_mask(Shown(Sees.parse(site.seen.words), count, past, tokens), past + count)
        seen = visible(mask) if mask.is_floating_point() else mask.bool()
        shape = torch.broadcast_shapes(seen.shape, words.shape, (3, HEADS, count, past + count))
        assert torch.equal(words.expand(shape), seen.expand(shape)), (str(site.seen), count, past)
        if mask.is_floating_point():
            assert bool(((mask == 0) | (mask < -1e8)).all())
            assert site.seen.mean
    return said


@pytest.mark.parametrize("spelling", list(CAUSAL))
def test_causal(spelling: str) -> None:
    assert check(CAUSAL[spelling]) == {"causal"}


@pytest.mark.parametrize("spelling", list(WINDOW))
def test_windows(spelling: str) -> None:
    assert check(lambda *call: WINDOW[spelling](*call) & CAUSAL["le"](*call)) == {"causal window=6"}


def test_chunks() -> None:
    assert check(lambda *call: CHUNK["floor"](*call) & CAUSAL["ge"](*call)) == {"causal chunk=8"}


@pytest.mark.parametrize("spelling", list(TOKENS))
def test_tokens(spelling: str) -> None:
    assert check(lambda *call: TOKENS[spelling](*call) & CAUSAL["le"](*call)) == {"causal tokens"}
    assert check(TOKENS[spelling]) == {"tokens"}


@pytest.mark.parametrize("form", list(NUMBERS))
def test_numbers_that_hide(form: str) -> None:
    assert check(lambda *call: NUMBERS[form](TOKENS["ne"](*call) & CAUSAL["le"](*call))) == {"causal mean tokens"}


def test_masks_that_are_added_up() -> None:
    def make(*call: Any) -> Tensor:
        return NUMBERS["where"](CAUSAL["le"](*call)) + NUMBERS["inverted"](TOKENS["bool"](*call))

    assert check(make) == {"causal mean tokens"}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_what_is_not_known_stays_a_tensor(kind: str) -> None:
    for site, *_ in found(OTHERS[kind]):
        assert site.seen.read == (0,), str(site.seen)
    check(lambda *call: OTHERS[kind](*call) & CAUSAL["le"](*call))


@pytest.mark.parametrize("kind", list(BIASES))
def test_biases_stay_tensors(kind: str) -> None:
    for site, *_ in found(BIASES[kind]):
        assert site.seen.read == (0,), str(site.seen)
    for site, *_ in found(lambda *call: BIASES[kind](*call) + NUMBERS["where"](CAUSAL["le"](*call))):
        assert site.seen.read == (0,), str(site.seen)


@pytest.mark.parametrize("write", ["a part", "through a view", "through a cast", "the mask"])
def test_what_is_changed_in_place(write: str) -> None:
    def make(real: Tensor, s: int, past: int) -> Tensor:
        tokens = real.bool()
        mask = tokens[:, None, None] & CAUSAL["le"](real, s, past)
        if write == "a part":
            tokens[:, 0] = True
        elif write == "through a view":
            tokens.view(-1)[:1].fill_(True)
        elif write == "through a cast":
            tokens.to(torch.bool).logical_not_()
        else:
            mask.contiguous()[..., 0].fill_(True)
        return mask & tokens[:, None, None]

    for site, *_ in found(make):
        assert site.seen.read == (0,)


@pytest.mark.some(10)
@pytest.mark.parametrize("seed", range(24))
def test_fuzz(seed: int) -> None:
    """Parts in any spelling, in any order, joined in any way."""
    choice = random.Random(seed)
    groups = [CAUSAL, WINDOW, CHUNK, TOKENS, OTHERS]
    chosen = [choice.choice(list(group.values())) for group in groups if choice.random() < 0.5]
    chosen = chosen or [CAUSAL["le"]]
    choice.shuffle(chosen)
    joined = choice.choice(["and", "nested", "product", "where"])
    form = choice.choice([None, *NUMBERS])

    def make(*call: Any) -> Tensor:
        parts = [one(*call) for one in chosen]
        mask = parts[0]
        for part in parts[1:]:
            if joined == "nested":
                mask = ~(~mask | ~part)
            elif joined == "product":
                mask = mask * part
            elif joined == "where":
                mask = torch.where(mask, part, torch.zeros((), dtype=torch.bool))
            else:
                mask = torch.logical_and(mask, part)
        return mask if form is None else NUMBERS[form](mask)

    check(make)


def test_some_of_the_fuzz_is_proved_and_some_is_not() -> None:
    """Neither is the rule, or the fuzz would be no test."""
    parts = list(itertools.product(["le", "tril"], ["gt", "triu"]))
    for causal, window in parts:
        said = check(lambda *call, a=causal, b=window: CAUSAL[a](*call) * WINDOW[b](*call))
        assert said == {"causal window=6"}
