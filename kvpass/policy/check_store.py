"""What makes it impossible to hold slots as a policy says: codecs, and fits of heads."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from kvpass.kernels.codecs.fits import NONE
from kvpass.kernels.codecs.registry import CODECS, DENSE
from kvpass.policy.evicted import To
from kvpass.policy.spec import Spec, Store

SORTED = "mixed_2_1"
"""The codec whose bits hang on the order of channels."""
SPARSE = ("csr8", "csr4")
"""Those that read a dictionary."""
MOST_ATOMS = 16_384
"""The paper's largest; places of atoms, and of unit vectors behind them, are int16."""


def named(halves: Store | To, field: str) -> Iterator[tuple[bool, str, str]]:
    """Whether keys and values name a codec, in `field`."""
    known = [DENSE, *CODECS]
    for half, said in (("k", halves.k), ("v", halves.v)):
        near = difflib.get_close_matches(said, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        yield said not in known, f"{field}.{half}", f"{hint}known: {', '.join(known)}"


def fits(p: Spec) -> Iterator[tuple[bool, str, str]]:
    """Whether a rule is broken, the field, and the fix."""
    held, to = p.store, p.evicted.to
    codecs = {"k": held.k, "v": held.v} if to is None else {"k": to.k, "v": to.v}
    yield not 0 < held.channels <= 1, "store.channels", "give a share above 0, at most 1, e.g. 0.6"
    yield not 1 <= held.atoms <= MOST_ATOMS, "store.atoms", f"give a number from 1 to {MOST_ATOMS}, e.g. 256"
    if {*codecs.values()} == {DENSE}:  # a layer that is taken out by `store: dense`: nothing is fitted
        return
    for half in ("k", "v"):
        fitted, coded = getattr(held, f"fit_{half}") != NONE, codecs[half] != DENSE
        fix = f"only codes are fitted: set store.{half}, e.g. to int4, or leave it out"
        yield fitted and not coded, f"store.fit_{half}", fix
    for half in ("k", "v"):
        sparse, fitted = codecs[half] in SPARSE, getattr(held, f"fit_{half}") == "atoms"
        fix = f"sparse codes are of atoms: set store.fit_{half}: atoms"
        yield sparse and not fitted, f"store.fit_{half}", fix
        fix = f"only sparse codes are of atoms: set store.{half}: csr8, or leave it out"
        yield fitted and not sparse, f"store.fit_{half}", fix
        fix = "atoms are vectors as the model has them: set store.rotate: none"
        yield sparse and held.rotate != "none", "store.rotate", fix
    spread = held.fit_k == "spread"
    fix = f"{SORTED} is for channels that were sorted: set store.fit_k: spread, or another codec, e.g. int2"
    yield codecs["k"] == SORTED and not spread, "store.k", fix
    yield codecs["v"] == SORTED, "store.v", f"values are not sorted, which {SORTED} is for: e.g. ternary"
    fix = f"only {SORTED} tells sorted channels apart: set store.k: {SORTED}, or store.fit_k: range"
    yield spread and codecs["k"] != SORTED, "store.fit_k", fix
    fix = "a rotation would mix the channels that were sorted: set store.rotate: none"
    yield spread and held.rotate != "none", "store.rotate", fix
    picked = held.fit_k == "channels" and held.rotate != "none"
    yield picked, "store.rotate", "a rotation would mix the channels that were picked: set store.rotate: none"
