"""Policies whose layers differ: which layers an entry of `layers` means, and what it makes of them."""

from __future__ import annotations

from dataclasses import replace

from kvpass.errors import PolicyError
from kvpass.policy.layer_keys import numbers_of
from kvpass.policy.load import variants
from kvpass.policy.spec import Spec


def of_layer(policy: Spec, layer: int, layers: int) -> Spec:
    """What decides in one layer of a model (or a graph) that has so many.

    Raises:
        PolicyError: an entry of `layers` means no layer, or two that differ mean this one.
    """
    if not policy.layers:
        return policy
    if layers < 2:
        hint = "avoid graph breaks between layers, or leave 'layers' out"
        raise PolicyError(f"policy {policy.name!r} tells layers apart, but this graph holds one", hint=hint)
    found = [key for key in policy.layers if layer in _meant(key, layers, policy.name)]
    if len({repr(policy.layers[key]) for key in found}) > 1:
        what = f"layer {layer} of {layers} is in two entries, {found[0]!r} and {found[1]!r}"
        raise PolicyError(f"policy {policy.name!r}: {what}", where="layers", hint="let each layer be in one at most")
    return variants(policy)[found[0]] if found else replace(policy, layers={})


def _meant(key: str, layers: int, name: str) -> range:
    first, last = numbers_of(key, name)
    if not -layers <= first <= last < layers:
        hint = f"name layers 0 to {layers - 1}; those that kvpass rewrites count, in the order of the graph"
        raise PolicyError(f"policy {name!r}: {key!r} in 'layers', of {layers} layers", where="layers", hint=hint)
    return range(first % layers, last % layers + 1)
