"""All styles, with a few words on where each keeps its cache: for the tests and the table of docs/support.md."""

from __future__ import annotations

from models.styles import (
    alibi,
    blended,
    einsum,
    from_scratch,
    gpt_fast,
    keyed,
    litgpt,
    llama_reference,
    multi_query,
    multihead,
    nanochat,
    nanogpt,
    nanovlm,
    one_tensor,
    packed_groups,
    rebinding,
    sinks,
    softcap,
    stacked,
    torchtune,
    x_transformers,
)
from models.styles.style import Style

WORDS: dict[type[Style], str] = {
    nanogpt.GPT: "nanoGPT with a cache: tuple of pairs, cat, `is_causal` at first",
    gpt_fast.Transformer: "gpt-fast: module buffers, `k[:, :, pos] = new`",
    gpt_fast.FusedTransformer: "the same, `enable_gqa`",
    gpt_fast.CopiedTransformer: "the same, `index_copy_`",
    gpt_fast.ScatteredTransformer: "the same, `scatter_`",
    llama_reference.Llama: "Llama's reference code: attributes [B, T, H, D], slices of `start_pos`",
    llama_reference.MovingLlama: "the same, moved by `.to(like)` in each call",
    rebinding.Rebinding: "attributes [B, T, H, D] rebound to a cat, empty at first",
    einsum.Einsum: "tuple of pairs [B, T, H, D], two einsums",
    einsum.GroupedEinsum: "the same, groups on an axis of their own",
    alibi.Alibi: "MPT: tuple of pairs, ALiBi added",
    alibi.Bloom: "Bloom: ALiBi by `baddbmm` over [B * H, ..]",
    sinks.Sinks: "gpt-oss: tuple of pairs, a learned sink in the softmax",
    multihead.Multihead: "weights of `nn.MultiheadAttention`, a dict of k and v",
    softcap.Softcap: "Gemma 2: tuple of pairs, softcap",
    packed_groups.Packed: "dicts of keys and values, groups in 5-d products",
    packed_groups.MultiQuery: "the same with one KV head",
    stacked.Stacked: "the caller's tensor [L, 2, B, H, T, D], `narrow().copy_()`",
    nanochat.Chat: "nanochat: an object with one tensor [L, 2, B, H, T, D], made in the first call, and a counter",
    x_transformers.Intermediate: "x-transformers: dataclasses of intermediates, kept as `k[..., 0:, :]`",
    from_scratch.Pointer: "LLMs from scratch, GPT: buffers that begin as None, a pointer on the module",
    from_scratch.Listed: "LLMs from scratch, Qwen: an object with a list of pairs, a counter on the model",
    torchtune.Tuned: "torchtune: module buffers, positions in a buffer that each call moves on",
    litgpt.Lit: "litgpt: `buffer[:b].index_copy_`, rows of a mask",
    litgpt.LitToTheEnd: "the same, read up to an int",
    nanovlm.Vision: "nanoVLM: list of dicts, `is_causal=(t == T and t > 1)`",
    keyed.Keyed: "a dict of layer to pair that is passed through",
    one_tensor.Fused: "one tensor [B, T, 2 H D], a slice of the fused projection",
    one_tensor.SideBySide: "one tensor [B, T, H, 2 D], key and value side by side",
    blended.Blended: "buffers passed through, `where` with a one-hot of the position",
    blended.Product: "the same as a product with it",
    multi_query.Headless: "multi-query: [B, T, D] without an axis of heads, einsums",
}
WAITING: tuple[type[Style], ...] = (
    nanochat.Chat,  # UNSUPPORTED_UPDATE: written into a part of a tensor that the first call makes
    from_scratch.Pointer,  # compressed, but report and inspect do not look into registered buffers
    from_scratch.Listed,  # CacheError: its counter is reset on the compiled model
)
"""Styles that kvpass does not take yet: in the table, not in the tests."""
KINDS = [kind for kind in WORDS if kind not in WAITING]
BUFFERED = [
    gpt_fast.Transformer,
    gpt_fast.FusedTransformer,
    gpt_fast.CopiedTransformer,
    gpt_fast.ScatteredTransformer,
    llama_reference.Llama,
    llama_reference.MovingLlama,
    stacked.Stacked,
    torchtune.Tuned,
    litgpt.Lit,
    litgpt.LitToTheEnd,
]
"""Those that allocate buffers before their first call, and keep them."""
TOP_LEFT = (nanogpt.GPT, multihead.Multihead, nanovlm.Vision)
"""is_causal counts from the top left, so they take one token at a time after the prompt."""
