"""Policies whose slots lie and hold as differently as can be: what each operation on a cache is tested over."""

from __future__ import annotations

from typing import Any

KINDS: dict[str, tuple[Any, Any]] = {
    "even": ("h2o", 24),
    "a share": ({"name": "mine", "extends": "h2o", "min_slots": 16}, 0.3),
    "ragged": ("ada_snapkv", 40),
    "layers": ("layer_defensivekv", 48),
    "codes": ({"name": "mine", "extends": "ada_snapkv", "store": "int4"}, 40),
    "tiers": ({"name": "mine", "extends": "h2o", "evicted": {"to": "int2"}}, 24),
    "fits": ("kivi", None),
}
"""A policy and its budget: even heads, under slots and a share; heads with budgets of their own; layers that share out;
ragged heads of codes; whole copies by score; codes that a fit made.
"""
