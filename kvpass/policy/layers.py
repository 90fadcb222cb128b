"""Policies whose layers differ: which layers an entry of `layers` means, and what it makes of them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from kvpass.errors import PolicyError
from kvpass.policy.spec import Policy

_NUMBERS = re.compile(r"(-?\d+)|(\d+)-(\d+)")


def of_layer(policy: Policy, layer: int, layers: int) -> Policy:
    """What decides in one layer of a model (or a graph) that has so many.

    Raises:
        PolicyError: an entry of `layers` means no layer, or two mean this one.
    """
    if not policy.layers:
        return policy
    if layers < 2:
        hint = "avoid graph breaks between layers, or leave 'layers' out"
        raise PolicyError(f"policy {policy.name!r} tells layers apart, but this graph holds one", hint=hint)
    found = [key for key in policy.layers if layer in _meant(key, layers, policy.name)]
    if len(found) > 1:
        what = f"layer {layer} of {layers} is in two entries, {found[0]!r} and {found[1]!r}"
        raise PolicyError(f"policy {policy.name!r}: {what}", where="layers", hint="let each layer be in one at most")
    return variants(policy)[found[0]] if found else replace(policy, layers={})


@lru_cache(maxsize=64)
def variants(policy: Policy, where: str = "") -> dict[str, Policy]:
    """The policy of each entry of `layers`, checked.

    Raises:
        PolicyError: a key is no layer, or what it says is no policy.
    """
    from kvpass.policy.load import overridden

    out = {}
    for key, own in policy.layers.items():
        _numbers(key, policy.name)
        out[key] = overridden(policy, own, f"{where or f'policy {policy.name!r}'}, layers.{key}")
        if out[key].allocate.layers != policy.allocate.layers:
            hint = "layers share the budget in one way, or in none: say allocate.layers outside"
            what = f"policy {policy.name!r}: bad value in layers.{key}.allocate.layers"
            raise PolicyError(what, where=where, hint=hint)
        if policy.allocate.layers in ("flat", "preference") and not out[key].keeps_all:
            hint = (
                f"layers that share by data ({policy.allocate.layers!r}) have one list: budget: 1.0 takes a layer out"
            )
            raise PolicyError(f"policy {policy.name!r}: bad value in layers.{key}", where=where, hint=hint)
    return out


def _numbers(key: str, name: str) -> tuple[int, int]:
    """First and last layer of a key; below 0 counted from the end."""
    match = _NUMBERS.fullmatch(key)
    first, last = (int(n) for n in (match[1] or match[2], match[1] or match[3])) if match else (1, 0)
    if last < first:
        hint = "give a number, -1 for the last layer, or a range, e.g. 0-3"
        raise PolicyError(f"policy {name!r}: {key!r} in 'layers' names no layer", where="layers", hint=hint)
    return first, last


def _meant(key: str, layers: int, name: str) -> range:
    first, last = _numbers(key, name)
    if not -layers <= first <= last < layers:
        hint = f"name layers 0 to {layers - 1}; those that kvpass rewrites count, in the order of the graph"
        raise PolicyError(f"policy {name!r}: {key!r} in 'layers', of {layers} layers", where="layers", hint=hint)
    return range(first % layers, last % layers + 1)
