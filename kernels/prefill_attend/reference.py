"""Reference of prefill_attend in torch: the meaning, and the CPU path.

A call is cut into pieces (batch rows x query rows x key columns) that are either causal squares, full rectangles, or
rectangles with a bias. The flash kernel of torch attends piece by piece and gives the log-sum-exp, from which
`observe` computes the statistics in a second pass over the queries that the rule watches. A soft cap is beyond that
kernel: then blocks of rows are attended to plainly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from kvpass.kernels.attention.masks import (
    additive,
    at_positions,
    by_kv_head,
    simplified,
    visible,
)
from kvpass.kernels.attention.memory import joined
from kvpass.kernels.attention.observation import Observation, emitted
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Shown
from kvpass.kernels.prefill_attend.observe import NEVER, Piece, observe
from kvpass.kernels.rule import Rule
from torch import Tensor

BLOCK = 256
"""Query rows per piece with a bias: the bias of a piece stays small, hidden key columns are skipped per piece."""

INF = float("inf")

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def prefill_attend_reference(
    q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, shown: Shown, softmax: Softmax, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kvpass.kernels.prefill_attend.prefill_attend`."""
    batch = len(q)
    shown = shown if shown.mask is None else shown._replace(mask=simplified(shown.mask))
    pieces, valid = _cut(q, k, pos, shown), shown.arrived(batch, q.device)
    watched = watched_rows(valid, rule)
    stats = q.new_zeros(len(emitted(rule)), batch, *k.shape[1:3], dtype=torch.float32)
    out = None if len(pieces) == 1 else _unseen(q, v, softmax)
    for piece in pieces:
        bias = None
        if piece.kind == "bias":
            piece, bias = _trimmed(piece, _bias(piece, k, pos, shown))
        result, lse = _attend(piece, q, k, v, bias, softmax)
        if out is None and result.shape[:3] == q.shape[:3]:
            out = result.contiguous()
        else:
            out = _unseen(q, v, softmax) if out is None else out
            out[piece.batch, :, slice(*piece.rows)] = result
        if watched is not None:
            observe(piece, q, k, lse, bias, softmax, watched, rule, stats, shown.position)
    return out if out is not None else _unseen(q, v, softmax), stats, valid


def _unseen(q: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
    """What queries get that see no key: zeros, or all of what is beside the keys."""
    if softmax.beside is not None:
        return softmax.beside.value.to(q.dtype, copy=True)
    return q.new_zeros(*q.shape[:3], v.shape[3])


def watched_rows(valid: Tensor, plan: Rule) -> Tensor | None:
    """Query rows that the rule observes, the last valid ones, bool [B, S]; None if it observes nothing."""
    if not emitted(plan) or plan[Observation].queries == 0:
        return None
    if plan[Observation].queries < 0:
        return valid
    return valid & (valid.flip(-1).cumsum(-1).flip(-1) <= plan[Observation].queries)


def _cut(q: Tensor, k: Tensor, pos: Tensor | None, shown: Shown) -> list[Piece]:
    """Cut a call into pieces."""
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    if pos is None and shown.mask is None:
        return [piece for rows in _alike(shown, batch) for piece in _pieces(*rows, keys, shown)]
    return list(_blocks(slice(0, batch), (0, keys), queries))


def _alike(shown: Shown, batch: int) -> list[tuple[slice, tuple[int, int], bool]]:
    """Neighbouring sequences whose first and last token stand in the same columns: which, the span of these columns,
    and whether others stand between.
    """
    if shown.bounds is None:
        return [(slice(0, batch), (0, shown.queries), False)]
    found: list[tuple[slice, tuple[int, int], bool]] = []
    for b, (first, end, _, count) in enumerate(shown.bounds.tolist()):
        looks = (first, end), end - first != count
        if found and found[-1][1:] == looks and not looks[1]:
            found[-1] = (slice(found[-1][0].start, b + 1), *looks)
        else:
            found.append((slice(b, b + 1), *looks))
    return [(slice(0, batch), *found[0][1:])] if len(shown.bounds) == 1 else found


def _pieces(batch: slice, span: tuple[int, int], holes: bool, keys: int, shown: Shown) -> Iterator[Piece]:
    """Pieces of sequences whose tokens are in the columns of `span`."""
    queries, sees = shown.queries, shown.sees
    if holes or sees.window:
        yield from _blocks(batch, (0, keys), queries)
        return
    size = sees.chunk or max(queries, 1)
    for at in range(0, queries, size):
        top, bottom = at, min(at + size, queries)
        first, end = max(span[0], top if sees.chunk else 0), min(span[1], bottom if sees.chunk else keys)
        if first >= end:
            continue
        if not sees.causal:
            yield Piece(batch, (top, bottom), (first, end), "full")
            continue
        yield Piece(batch, (first, end), (first, end), "causal")
        if end < bottom:
            yield Piece(batch, (end, bottom), (first, end), "full")


def _blocks(batch: slice, cols: tuple[int, int], queries: int) -> Iterator[Piece]:
    for i in range(0, queries, BLOCK):
        yield Piece(batch, (i, min(i + BLOCK, queries)), cols, "bias")


def _bias(piece: Piece, k: Tensor, pos: Tensor | None, shown: Shown) -> Tensor:
    """What to add to the logits of a piece: float32 [1|B, 1|Hkv, 1|G, rows, cols], -inf = hidden."""
    shown = shown.of_rows(piece.batch)
    found = _masked(piece, k, pos, shown)
    return found if shown.bias is None else found + shown.bias[:, :, None, None]


def _masked(piece: Piece, k: Tensor, pos: Tensor | None, shown: Shown) -> Tensor:
    """The same without biases of slots; shown: to the sequences of the piece."""
    heads, (top, bottom) = k.shape[1], piece.rows
    where = torch.arange(k.shape[2], device=k.device)[None, None] if pos is None else pos[piece.batch]
    seen = shown.keys(where, top, bottom)[:, :, None]
    mask = shown.mask
    if mask is None:
        return additive(seen, torch.float32)
    rows = by_kv_head(mask if mask.shape[2] == 1 else mask[:, :, top:bottom], heads)
    here = at_positions(rows, where) if pos is not None else rows[..., : k.shape[2]]
    seen = seen & visible(here)
    return additive(seen, torch.float32) if mask.dtype == torch.bool else here.float().masked_fill(~seen, -INF)


def _trimmed(piece: Piece, bias: Tensor) -> tuple[Piece, Tensor]:
    """Cut off the columns at either end that no row of the piece may see."""
    shown = (bias.amax((0, 1, 2, 3)) > -INF).expand(piece.cols[1]).nonzero()
    if not len(shown):
        return piece, bias
    left, right = int(shown[0]), int(shown[-1]) + 1
    if bias.shape[4] > 1:
        bias = bias[..., left:right]
    return Piece(piece.batch, piece.rows, (left, right), piece.kind), bias


def _attend(
    piece: Piece, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softmax: Softmax
) -> tuple[Tensor, Tensor]:
    """Attention of one piece: (out [b, Hq, rows, Dv], log-sum-exp float32 [b, Hq, rows]).

    Rows that see no key give zeros, and a log-sum-exp so large that they observe nothing.
    """
    rows, cols = slice(*piece.rows), slice(*piece.cols)
    q, k, v = q[piece.batch, :, rows], k[piece.batch, :, cols], v[piece.batch, :, cols]
    run = _flash_attend if q.device.type == "cpu" and not softmax.softcap else _plain_attend
    result, lse = run(q, k, v, bias, softmax, piece.kind == "causal")
    if bias is not None:
        blind = bias.amax(-1) == -INF
        blind = blind.expand(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[2]).reshape(q.shape[:3])
        lse = lse.masked_fill(blind, NEVER)
    if softmax.beside is not None:
        return joined(result, lse, softmax.beside.of(piece.batch, rows))
    return (result, lse) if softmax.sinks is None else _with_sinks(result, lse, softmax.sinks)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one more logit per head in the denominator, which may come last: a piece holds whole rows of
    keys. Changes out; rows that see no key keep what they have.
    """
    column = sinks.float()[:, None]
    return out.mul_(torch.sigmoid(lse - column)[..., None]), torch.logaddexp(lse, column)


def _flash_attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softmax: Softmax, causal: bool
) -> tuple[Tensor, Tensor]:
    """torch's CPU kernel; it wants one head size for k and v, and a mask of the query's dtype per query head."""
    heads, kv_heads, wide = q.shape[1], k.shape[1], v.shape[3]
    dim = max(q.shape[3], wide)
    q, k, v = (x if x.shape[3] == dim else F.pad(x, (0, dim - x.shape[3])) for x in (q, k, v))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))  # the kernel assumes it, unchecked
    if bias is not None:
        full = bias.to(q.dtype)
        if full.shape[1] != 1 or full.shape[2] != 1:
            full = full.expand(-1, kv_heads, heads // kv_heads, -1, -1)
        bias = full.flatten(1, 2)
    out, lse = _flash(q, k, v, 0.0, causal, attn_mask=bias, scale=softmax.scale)
    return out[..., :wide], lse


def _plain_attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softmax: Softmax, causal: bool
) -> tuple[Tensor, Tensor]:
    """The same without the CPU kernel, for capped logits and other devices: block by block of query rows."""
    outs, sums = [], []
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    keys, values = k.float().mT, v.float()
    for top in range(0, q.shape[2], BLOCK):
        rows = (q[:, :, top : top + BLOCK].float() * softmax.factor).unflatten(1, (heads, group))
        count = rows.shape[3]
        end = top + count if causal else k.shape[2]
        logits = softmax.capped(rows.flatten(2, 3) @ keys[..., :end]).unflatten(2, (group, count))
        if causal:
            logits.masked_fill_(torch.ones(count, end, dtype=torch.bool, device=q.device).triu(top + 1), -INF)
        if bias is not None:
            logits += bias if bias.shape[3] == 1 else bias[:, :, :, top : top + BLOCK]
        lse = logits.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)
        probs = logits.sub_(lse).exp_()
        outs.append((probs.flatten(2, 3) @ values[:, :, :end]).view(*q.shape[:2], count, v.shape[3]))
        sums.append(lse.view(*q.shape[:2], count))
    return torch.cat(outs, 2).to(q.dtype), torch.cat(sums, 2)
