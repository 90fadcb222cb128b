"""Reading an attention mask: who sees whom, at which position. Pure torch, any device.

A mask is bool (True = attend) or additive float, 4-d, broadcastable to [B, Hq, S, T], and its columns are positions.
"""

from __future__ import annotations

import torch
from kvpass.kernels.errors import MaskError
from torch import Tensor


def threshold(mask: Tensor) -> float:
    """An additive mask hides a key when it is not above this: -1e8, or half of float16's smallest number.

    Hand-made masks hide with finfo.min, -inf or -1e9; no bias of a visible key (ALiBi's, say) comes near -1e8.
    """
    return max(torch.finfo(mask.dtype).min / 2, -1e8)


def visible(mask: Tensor) -> Tensor:
    """The mask as bool, True = may be seen; same shape."""
    return mask if mask.dtype == torch.bool else mask > threshold(mask)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as a bias to add to logits: 0 or -inf for a bool mask, the values themselves for a float one."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.where(mask, 0.0, float("-inf")).to(dtype)


def simplified(mask: Tensor) -> Tensor:
    """A float mask that only says 0 or hidden, as the bool mask it stands for; any other mask as it is."""
    if mask.dtype == torch.bool or not _is_switch(mask[..., -1:, :]):
        return mask
    return mask == 0 if _is_switch(mask) else mask


def _is_switch(mask: Tensor) -> bool:
    """Whether every value is 0 or hidden; by blocks of rows, which stay in cache."""
    low = threshold(mask)
    return all(_is(((part == 0) | (part <= low)).view(torch.uint8), 1) for part in mask.split(128, 2))


def by_kv_head(mask: Tensor, kv_heads: int) -> Tensor:
    """[b, 1 or Hq, S, T] -> [b, 1 or Hkv, 1 or G, S, T], a view."""
    heads = mask.shape[1]
    if heads == 1:
        return mask.unsqueeze(1)
    grouped: Tensor = mask.unflatten(1, (kv_heads, heads // kv_heads))
    return grouped


def at_positions(mask: Tensor, pos: Tensor) -> Tensor:
    """Look a mask up at the position of each key.

    mask [b, 1 or Hkv, 1 or G, s, T] (from `by_kv_head`), pos int [B, Hkv, L], -1 = empty (looked up anywhere: the
    caller hides empties). Returns [B, Hkv, 1 or G, s, L], or the mask itself if it is one column wide.
    """
    if mask.shape[-1] == 1:
        return mask
    batch, heads, length = pos.shape
    index = pos.clamp(min=0).long().view(batch, heads, 1, 1, length)
    wide = mask.expand(batch, heads, *mask.shape[2:])
    return wide.gather(-1, index.expand(batch, heads, *mask.shape[2:4], length))


def causal_span(mask: Tensor) -> tuple[int, int] | None:
    """(first, end) if the bool mask [S, S] is exactly "row i sees columns first .. min(i, end - 1)", else None.

    A causal mask with first tokens of padding on the left and S - end on the right. Reads the mask once, as bytes:
    torch's byte minima are a hundred times faster than its bool comparisons.
    """
    bytes_ = mask.view(torch.uint8)
    seen = bytes_[-1].nonzero()
    if not len(seen):
        return None
    first, end = int(seen[0]), int(seen[-1]) + 1
    hidden = (bytes_[:first], bytes_[:, :first], bytes_[:, end:])
    if not all(_is(part, 0) for part in hidden) or not _is(bytes_[end:, first:end], 1):
        return None
    return (first, end) if _is_triangle(bytes_[first:end, first:end]) else None


def _is_triangle(bytes_: Tensor, block: int = 256) -> bool:
    """Whether the square is 1 on and below its diagonal and 0 above."""
    corner = torch.ones(block, block, dtype=torch.uint8, device=bytes_.device).tril_()
    for a in range(0, len(bytes_), block):
        b = min(a + block, len(bytes_))
        if not _is(bytes_[a:b, :a], 1) or not _is(bytes_[a:b, b:], 0):
            return False
        if not torch.equal(bytes_[a:b, a:b], corner[: b - a, : b - a]):
            return False
    return True


def _is(part: Tensor, value: int) -> bool:
    """Whether every byte of a 0/1 tensor is `value`."""
    return part.numel() == 0 or int(part.amin() if value else part.amax()) == value


def written(mask: Tensor, end: int, at: Tensor | None = None, check: bool = True) -> Tensor:
    """The part of a mask that covers the written part of a buffer: `mask[..., :end]`, a copy. With `at`, int32 [1], the
    position of the only query, all of the mask: nobody looks behind the token.

    check: False if causality hides what is beyond already.

    Raises MaskError if the mask shows a query what is beyond: the attention would read what nobody wrote. On a GPU the
    check is an assertion of the device.
    """
    if not check:
        return (mask if at is not None else mask[..., :end]).clone()
    if at is None:
        beyond, kept = ~visible(mask[..., end:]).any(), mask[..., :end]
    else:
        behind = torch.arange(mask.shape[-1], device=mask.device) > at
        beyond, kept, end = ~(visible(mask) & behind).any(), mask, 0 if mask.device.type != "cpu" else int(at) + 1
    if mask.device.type == "cpu":
        if not bool(beyond):
            raise MaskError(
                f"the mask shows keys of a preallocated cache beyond the {end} tokens that are written",
                "write each token behind the one before it and show queries only what is written; "
                "rings, pages and other orders are not supported",
            )
    else:
        torch._assert_async(beyond, "the mask shows keys of a preallocated cache beyond what is written")
    return kept.clone()


def count_shown(mask: Tensor, position: int) -> Tensor:
    """How many of the columns before `position` a mask shows to some query, int64 [1 or B]."""
    wide = mask.shape[-1] > 1
    count = visible(mask[..., :position] if wide else mask).count_nonzero(-1).flatten(1).amax(1)
    return count if wide else count * position


def check_shown(shown: Tensor | int, seen: Tensor) -> None:
    """Refuse to show tokens which were taken for padding when they came, and so never got a slot.

    shown: int [1 or B], how many tokens before this call some query of it may see. seen [B]: valid tokens before this
    call. Only those may be shown, evicted ones included, so a query that is shown more than `seen` is shown padding. A
    mask that shows as many, but others, is not found out. Raises MaskError; on a GPU the check is an assertion of the
    device.
    """
    good = (seen >= shown).all()
    if good.device.type != "cpu":
        torch._assert_async(good, "the mask shows tokens that were taken for padding")
    elif not bool(good):
        raise shows_padding()


def shows_padding() -> MaskError:
    """The error of `check_shown`."""
    return MaskError(
        "the mask shows earlier tokens that were taken for padding: no query of their own call could see them",
        "let each token see itself in the call in which it comes, or hide it in all later calls too",
    )
