"""Heads that the ops take otherwise than the model: latents, mixed heads, tiled heads."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import example
from kvpass.graph.shapes import shape_of
from kvpass.lowering.emit_nodes import Writer
from kvpass.sites.site import Latent, Mixed, Reader, UpProjection


def to_slots(write: Writer, q: fx.Node, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Queries, new keys and new values as the ops take them.

    Args:
        q: [B, Hq, S, D]
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], as the model caches them.
    """
    latent, mixed = write.site.core.latent, write.site.mixed
    if latent is not None:
        q = _absorbed(write, q, latent)
        key = write.call(torch.cat, [key, value], -1)
        return q, key, write.method("narrow", key, -1, 0, 0)
    if mixed is not None:
        return _spread(write, q, mixed), _side_by_side(write, key), _side_by_side(write, value)
    return q, key, value


def from_slots(write: Writer, out: fx.Node) -> Iterator[fx.Node]:
    """What each of the site's cores reads of the ops' output: [B, Hq, S, Dv]."""
    latent, mixed = write.site.core.latent, write.site.mixed
    if latent is not None:
        rows = _rows(write, latent.values)
        yield write.call(torch.matmul, out, write.method("transpose", rows, 1, 2))
    elif mixed is not None:
        heads = write.method("unflatten", out, 3, (mixed.heads, mixed.widths[1]))
        for reader in mixed.readers:
            yield _picked(write, heads, reader)
    else:
        yield out


def regrouped(write: Writer, node: fx.Node, axis: int, to_model: bool) -> fx.Node:
    """Query heads of a core with tiled KV heads, from the model's order to that of the ops or back."""
    site = write.site
    if not site.core.tiled:
        return node
    sizes = (site.group, int(site.dims["Hkv"]))
    node = write.method("unflatten", node, axis, sizes[::-1] if to_model else sizes)
    return write.method("flatten", write.method("transpose", node, axis, axis + 1), axis, axis + 1)


def _absorbed(write: Writer, q: fx.Node, latent: Latent) -> fx.Node:
    """Queries of latents: [q_nope W_k, q_rot], so that their product with [latent, k_rot] is that of q and k."""
    sizes = latent.keys.size, int(example(q).shape[-1]) - latent.keys.size
    starts = (0, sizes[0]) if latent.nope_first else (sizes[1], 0)
    nope, turned = (write.method("narrow", q, -1, at, size) for at, size in zip(starts, sizes, strict=True))
    return write.call(torch.cat, [write.call(torch.matmul, nope, _rows(write, latent.keys)), turned], -1)


def _rows(write: Writer, up: UpProjection) -> fx.Node:
    """[heads, size, rank]"""
    weight = write.method("reshape", write.copy(up.weight), up.heads, up.width, -1)
    return write.method("narrow", weight, 1, up.start, up.size)


def _spread(write: Writer, q: fx.Node, mixed: Mixed) -> fx.Node:
    """[B, Hq, S, D] -> [B, Hq, S, heads * D]: each query in the place of the key head that it reads, else zeros."""
    one_hot = [[[float(at == head)] for at in range(mixed.heads)] for head in mixed.keys]
    places = write.constant(one_hot, example(q).dtype)
    places = write.call(operator.getitem, places, (slice(None), None))
    return write.method("flatten", write.call(operator.mul, write.method("unsqueeze", q, 3), places), 3)


def _side_by_side(write: Writer, new: fx.Node) -> fx.Node:
    """[B, H, S, D] -> [B, 1, S, H * D]"""
    tokens_first = write.method("transpose", new, 1, 2)
    return write.method("unsqueeze", write.method("flatten", tokens_first, 2), 1)


def _picked(write: Writer, heads: fx.Node, reader: Reader) -> fx.Node:
    """[B, Hq, S, heads, Dv] -> [B, Hq, S, blocks * Dv]: what each query head reads, block by block."""
    head = write.constant(list(map(list, zip(*reader.blocks, strict=True))), torch.int64)
    index = write.call(operator.getitem, head, (None, slice(None), None, slice(None), None))
    index = write.method("expand", index, *_sizes_of(write, heads))
    return write.method("flatten", write.method("gather", heads, 3, index), 3)


def _sizes_of(write: Writer, node: fx.Node) -> list[Any]:
    """Sizes of `node` for an expand, but for axis 3."""
    return [write.method("size", node, at) if at != 3 else -1 for at in range(len(shape_of(node)))]
