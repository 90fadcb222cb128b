"""Sparse codes: each atom is the nearest to what is left, and attention reads what atoms add up to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpass.kernels.codecs.fitting import fitted
from kvpass.kernels.codecs.sparse import Book, Sparse
from kvpass.kernels.codecs.storage import WHOLE_AT
from kvpass.kernels.slots.moves import even
from kvpass.kernels.testing import assert_close
from oracle.ops import Site
from torch import Tensor

from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy

DIM = 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dictionary(atoms: Tensor) -> Tensor:
    """float64: the atoms of a head, [A, width], and the unit vectors."""
    return torch.cat([atoms.double(), torch.eye(atoms.shape[-1], dtype=torch.float64)])


def read(codes: Tensor, scale: Tensor, atoms: Tensor) -> Tensor:
    """float64 [n, width], atom by atom."""
    found = dictionary(atoms)
    rows = zip(codes.tolist(), scale.double().tolist(), strict=True)
    return torch.stack([sum(s * found[at] for at, s in zip(*row, strict=True)) for row in rows])


@pytest.mark.parametrize("terms", [4, 8])
def test_matching_pursuit(terms: int) -> None:
    """In float64, following the codes: none of the atoms was further than another from what was left by more than
    rounding, and each number is the float16 next to the product.
    """
    atoms = torch.nn.functional.normalize(random(2, 3, 20, DIM), dim=-1).half()
    x = random(2, 3, 9, DIM, seed=1) * torch.tensor([1.0, 100, 1e-2])[:, None, None]
    codes, scale = Sparse("csr", terms, Book(atoms)).encode(x, 64)
    assert (codes.dtype, scale.dtype) == (torch.int16, torch.float16)
    for b in range(2):
        for h in range(3):
            found = dictionary(atoms[b, h])
            for n in range(9):
                rest = x[b, h, n].double()
                slack = 1e-5 * float(rest.norm())
                for at, number in zip(codes[b, h, n].tolist(), scale[b, h, n].double().tolist(), strict=True):
                    near = found @ rest
                    assert float(near.abs().max() - near[at].abs()) <= slack
                    assert abs(number - float(near[at])) <= slack + 2.0**-11 * abs(number) + 2.0**-25
                    rest = rest - number * found[at]
                assert float(rest.norm()) < float(x[b, h, n].double().norm())


def test_products_and_mixtures_are_those_of_what_is_decoded() -> None:
    book = Book(torch.nn.functional.normalize(random(2, 3, 20, DIM), dim=-1).half())
    codec = Sparse("csr", 5, book)
    parts = codec.encode(random(2, 3, 9, DIM, seed=1), 64)
    decoded = codec.decode(parts, DIM, 64)
    for b in range(2):
        for h in range(3):
            want = read(parts[0][b, h], parts[1][b, h], book.atoms[b, h])
            assert_close(decoded[b, h], want.float())
    q, weights = random(2, 3, 2, DIM, seed=2), random(2, 3, 2, 9, seed=3)
    assert_close(codec.products(q, parts, 64), q @ decoded.mT)
    assert_close(codec.mixed(weights, parts, DIM, 64), weights @ decoded)


def test_atoms_are_tokens_of_the_row() -> None:
    """Evenly out of those that are no padding, of length 1; of fewer tokens than atoms each stands there repeatedly."""
    x = random(2, 2, 30, DIM)
    valid = torch.arange(30) >= torch.tensor([[0], [26]])
    made = fitted("atoms", x, x, valid, DIM, 10)["atoms"]
    for b, tokens in enumerate(([*range(0, 30, 3)], [26, 26, 26, 27, 27, 28, 28, 28, 29, 29])):
        want = torch.nn.functional.normalize(x[b, :, tokens], dim=-1).half()
        torch.testing.assert_close(made[b], want, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("policy", ["full", "h2o", "ada_snapkv"])
def test_a_step_reads_atoms(policy: str) -> None:
    """Two padded rows, a second turn: each step is attention in float64 over what the slots hold, atom by atom."""
    store = {"k": "csr8", "v": "csr4", "fit_k": "atoms", "fit_v": "atoms", "atoms": 12, "rotate": "none",
             "residual": 5, "sinks": 2}  # fmt: skip
    planned = Policy.load({"name": "mine", "extends": policy, "store": store, "min_slots": 16})
    rule = rule_of(planned.with_budget(None if policy == "full" else 40), 0, 1)
    site, valid = Site(rule, random(24, 4 * DIM)), torch.empty(2, 0, dtype=torch.bool)
    first = torch.arange(50) >= torch.tensor([[0], [12]])
    for seed, new in enumerate([first, *[torch.ones(2, n, dtype=torch.bool) for n in (1, 1, 1, 6, 1, 1, 1)]]):
        start, count = valid.shape[1], new.shape[1]
        valid = torch.cat([valid, new], 1)
        sees = torch.ones(count, start + count, dtype=torch.bool).tril(start) & valid[:, None, None]
        sees = sees & new[:, None, :, None]
        q, k, v = random(2, 4, count, DIM, seed=seed), *(random(2, 2, count, DIM, seed=9 + seed + at) for at in (0, 50))
        if count > 1:
            site.many(q, k, v, sees, start)
            continue
        before: Any = even(site.state).clone()
        out = site.one(q, k, v, sees, start)
        for b in range(2):
            for h in range(2):
                keys, values = (held(before, half, b, h, x) for half, x in (("k", k), ("v", v)))
                probs = torch.softmax(q[b, 2 * h : 2 * h + 2, 0].double() @ keys.mT * DIM**-0.5, -1)
                assert_close(out[b, 2 * h : 2 * h + 2, 0], (probs @ values).float(), what=f"call {seed}")


def held(state: Any, half: str, b: int, h: int, new: Tensor) -> Tensor:
    """float64 [n, width]: what a step reads of a head's used slots and of its own token, which is whole. The step's own
    copy takes the place of the oldest of the newest five.
    """
    pos = state.pos[b, h]
    used = (pos >= 0).nonzero().flatten()
    rows = read(state[f"{half}_codes"][b, h, used], state[f"{half}_scale"][b, h, used], state[f"{half}_atoms"][b, h])
    copies = state[WHOLE_AT][b, h].tolist()
    gone = min(at for at in copies[2:] if at >= 0)
    for at, position in enumerate(pos[used].tolist()):
        if position in copies and position != gone:
            rows[at] = state[half][b, h, copies.index(position)].double()
    return torch.cat([rows, new[b, h].double()])
