"""Every error that kvpass raises, and the reason codes of sites that it declines.

KVPassError                  what, where (site and source line), what to do
├── PolicyError              a policy file, name or budget that makes no sense; raised before any compilation
├── ModelError               what was given is no model, or no program
├── DeclinedError            strict=True and a site cannot be rewritten
├── TrainingError            K or V requires grad, or the model is in train mode
├── RecompileError           the model was compiled again and again, or ran uncompiled
├── CacheError               a cache was used in a way that compressed state cannot follow
│   ├── ForeignCacheError    keys and values that kvpass did not make
│   ├── ShellDataError       the NaN stand-in of a compressed cache was read as data
│   └── StaleCacheError      a cache that another branch has advanced, or that was cropped
└── VerificationError        verify=True found a site whose rewrite disagrees with the model

NothingRewritten (a warning) said once for a model in which there is nothing to rewrite.
"""

from __future__ import annotations

from enum import StrEnum


class KVPassError(RuntimeError):
    """Base of all errors of kvpass: one line what, one line where, one line what to do.

    Attributes:
        what, where, hint: those lines; `where` is a site and a source line of the model, or a file; "" if unknown.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        lines = [what] + ([f"  where: {where}"] if where else []) + ([f"  what to do: {hint}"] if hint else [])
        super().__init__("\n".join(lines))


class PolicyError(KVPassError):
    pass


class ModelError(KVPassError):
    pass


class DeclinedError(KVPassError):
    pass


class TrainingError(KVPassError):
    pass


class RecompileError(KVPassError):
    pass


class CacheError(KVPassError):
    pass


class ForeignCacheError(CacheError):
    pass


class ShellDataError(CacheError):
    pass


class StaleCacheError(CacheError):
    pass


class VerificationError(KVPassError):
    pass


class NothingRewritten(UserWarning):
    """A compiled model has run, and there was no cache in it that kvpass rewrites."""


class Reason(StrEnum):
    """Stable codes for why a site stays dense; the value is the code."""

    UNSUPPORTED_ATTENTION = "UNSUPPORTED_ATTENTION"
    UNSUPPORTED_UPDATE = "UNSUPPORTED_UPDATE"
    NO_ATTENTION = "NO_ATTENTION"
    KEY_ESCAPES = "KEY_ESCAPES"
    VALUE_ESCAPES = "VALUE_ESCAPES"
    LAYOUT = "LAYOUT"
    GROUP_ORDER = "GROUP_ORDER"
    CAT_AXIS = "CAT_AXIS"
    NEW_FIRST = "NEW_FIRST"
    PAST_NOT_INPUT = "PAST_NOT_INPUT"
    DROPOUT = "DROPOUT"
    MASK_SHAPE = "MASK_SHAPE"
    MASK_UNKNOWN = "MASK_UNKNOWN"
    SLIDING_WINDOW = "SLIDING_WINDOW"
    CAUSAL_WITH_PAST = "CAUSAL_WITH_PAST"
    CROSS_ATTENTION = "CROSS_ATTENTION"
    QUERY_COUNT = "QUERY_COUNT"
    PACKED_CACHE = "PACKED_CACHE"
    PROJECTED_CACHE = "PROJECTED_CACHE"
    PAGED_CACHE = "PAGED_CACHE"
    FLEX_ATTENTION = "FLEX_ATTENTION"
    SHARED_CACHE = "SHARED_CACHE"
    KEY_VALUE_MISMATCH = "KEY_VALUE_MISMATCH"
    DTYPE = "DTYPE"
    INDEXER = "INDEXER"
    AUTOCAST = "AUTOCAST"

    @property
    def hint(self) -> str:
        """What a user can do."""
        return HINTS[self]

    @property
    def by_choice(self) -> bool:
        """True for caches that kvpass understands and leaves dense on purpose: no error under strict=True."""
        return self in (Reason.SLIDING_WINDOW, Reason.CROSS_ATTENTION, Reason.INDEXER)


HINTS = {
    Reason.UNSUPPORTED_ATTENTION: "attention must be F.scaled_dot_product_attention, or softmax(q k^T * scale + mask) "
    "between two products (docs/patterns.md lists the spellings)",
    Reason.UNSUPPORTED_UPDATE: "the cache must grow by torch.cat([past, new], dim), or be a buffer that each call's "
    "tokens are written into (docs/patterns.md lists the spellings)",
    Reason.NO_ATTENTION: "the cache is updated here but read in another graph; look for a graph break between the two "
    "(transformers makes one for output_attentions=True: call without it)",
    Reason.KEY_ESCAPES: "only the attention and the returned cache may read the cached keys",
    Reason.VALUE_ESCAPES: "only the attention and the returned cache may read the cached values",
    Reason.LAYOUT: "cache [B, Hkv, T, D] or [B, T, Hkv, D]; of others, views must keep tokens and sequences apart",
    Reason.GROUP_ORDER: "keys and values must repeat their heads in the same order (both repeat_interleave, or both "
    "repeat)",
    Reason.CAT_AXIS: "the cache must be concatenated along its token axis",
    Reason.NEW_FIRST: "the past must come first in torch.cat([past, new])",
    Reason.PAST_NOT_INPUT: "the past must be an input of the graph itself, not a value computed from one",
    Reason.DROPOUT: "call model.eval(), and let dropout be 0.0 then: attention dropout is not supported",
    Reason.MASK_SHAPE: "the mask must broadcast to [B, Hq, S, T]",
    Reason.MASK_UNKNOWN: "hide keys with torch.finfo(dtype).min or -inf: a small number only makes them less likely",
    Reason.SLIDING_WINDOW: "nothing to do: the model itself keeps only its window, and this cache stays as it is",
    Reason.CAUSAL_WITH_PAST: "is_causal=True with one query and a past hides all but the first key in torch; "
    "pass no mask instead",
    Reason.CROSS_ATTENTION: "nothing to do: keys and values come from another sequence, and stay dense",
    Reason.QUERY_COUNT: "attend with one query for each new token",
    Reason.PACKED_CACHE: "cache keys and values as two tensors",
    Reason.PROJECTED_CACHE: "project first, then cache the keys and values themselves",
    Reason.PAGED_CACHE: "give each batch a cache of its own (transformers: generate, not generate_batch)",
    Reason.FLEX_ATTENTION: "call F.scaled_dot_product_attention (transformers: attn_implementation='sdpa')",
    Reason.SHARED_CACHE: "attentions over one cache must have the same queries, keys, scale and mask",
    Reason.KEY_VALUE_MISMATCH: "keys and values must be cached in the same way",
    Reason.DTYPE: "keys, values and queries must share float32, bfloat16 or float16",
    Reason.INDEXER: "nothing to do: keys of a sparse indexer choose what another attention may see; they stay dense",
    Reason.AUTOCAST: "call the model outside of torch.autocast; to compute in half precision, load or convert it in "
    "that dtype before compiling: model.to(torch.bfloat16)",
}
