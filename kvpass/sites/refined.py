"""What keys and values of a core are beside a cache's own: projections of latents, or behind learned ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class UpProjection:
    """Rows of a weight `[heads * width, rank]` that make one part of each head: `size` of `width`, from `start` on."""

    weight: fx.Node
    heads: int
    width: int
    start: int
    size: int


@dataclass(frozen=True)
class Latent:
    """Keys and values are projections of a cached latent of `rank` entries; the rest of a key is cached as it is."""

    keys: UpProjection
    values: UpProjection
    nope_first: bool
    rank: int


@dataclass(frozen=True)
class Joined:
    """Keys, or values, that an attention reads behind learned ones.

    Attributes:
        node: the `cat` of both, along `axis`.
        memory: the learned ones, in the axes of `node`.
        cached: the others.
        views: from `node` down to the core, the highest first.
    """

    node: fx.Node
    axis: int
    memory: fx.Node
    cached: fx.Node
    views: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Memory:
    """`count` keys and values of no token in front of those of the cache, which are never cached themselves."""

    k: Joined
    v: Joined
    count: int
