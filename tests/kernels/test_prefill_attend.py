"""prefill_attend against full matrices in float64."""

import pytest
import torch
from kvpass.kernels import choose
from kvpass.kernels.attention.observation import Observation
from kvpass.kernels.prefill_attend import prefill_attend, reference
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.statistics import Statistics
from kvpass.kernels.testing import assert_close, causal_mask, qkv

INF = float("inf")


@pytest.fixture(autouse=True, params=["native", "reference"])
def implementation(request):
    """CPUs have two; the C++ leaves to the reference what it does not know."""
    with choose.use(request.param):
        yield request.param


SUM = Rule(stats=("sum",), queries=-1)
ALL = Rule(stats=("sum", "sumsq", "count"), queries=-1)
WINDOW = Rule(stats=("sum", "count"), queries=7)
NONE = Rule()


def lowest(mask):
    return max(torch.finfo(mask.dtype).min / 2, -1e8)


def visibility(q, k, pos, mask, causal):
    """Bool [B, Hq, S, L] and the bias [B, Hq, S, L], by plain loops over batch and heads."""
    batch, heads, queries, _ = q.shape
    group, keys = heads // k.shape[1], k.shape[2]
    shown = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    bias = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    columns = keys if pos is None else 1 + int(pos.max())
    wide = None if mask is None else mask.expand(batch, heads, queries, max(columns, mask.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            where = torch.arange(keys) if pos is None else pos[b, h // group].long()
            row = torch.ones(queries, keys, dtype=torch.bool) & (where >= 0)
            if causal:
                row &= where <= torch.arange(queries)[:, None]
            if wide is not None:
                here = wide[b, h][:, where.clamp(min=0)]
                row &= here if mask.dtype == torch.bool else here > lowest(mask)
                if mask.dtype != torch.bool:
                    bias[b, h] = here.double()
            shown[b, h] = row
    return shown, bias


def oracle(q, k, v, pos, mask, scale, causal, rule, sinks=None, softcap=0.0):
    """(out, stats, valid, rows that see something) in float64."""
    shown, bias = visibility(q, k, pos, mask, causal)
    group = q.shape[1] // k.shape[1]
    kk, vv = (x.double().repeat_interleave(group, 1) for x in (k, v))
    logits = q.double() @ kk.transpose(-1, -2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = torch.where(shown, logits + bias, -INF)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    probs = logits.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]]
    valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > lowest(mask)
        seen = seen.expand(q.shape[0], -1, -1, -1)
        start = 0 if pos is None else int(pos[0, 0, -q.shape[2]])
        for s in range(q.shape[2]):
            valid[:, s] = seen[..., 0 if seen.shape[-1] == 1 else start + s].flatten(1).any(1)
    stats = torch.zeros(len(rule[Statistics].stats), *k.shape[:3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for s in range(q.shape[2]):
            newer = int(valid[b, s + 1 :].sum())  # the window is of the row's last valid queries
            if not valid[b, s] or rule[Observation].queries == 0 or newer >= rule[Observation].queries > 0:
                continue
            for h in range(k.shape[1]):
                mine = slice(h * group, (h + 1) * group)
                row = probs[b, mine, s].mean(0) if rule[Observation].group == "mean" else probs[b, mine, s].amax(0)
                parts = {"sum": row, "sumsq": row**2, "count": shown[b, mine, s].any(0).double()}
                for i, name in enumerate(rule[Statistics].stats):
                    stats[i, b, h] += parts[name]
    return probs @ vv, stats, valid, shown.any(-1)


def check(q, k, v, pos=None, mask=None, causal=False, rule=ALL, scale=None, **extras):
    scale = scale or q.shape[-1] ** -0.5
    start, sees = 0 if pos is None else int(pos[0, 0, -q.shape[2]]), "causal corner" if causal else ""
    out, stats, valid = prefill_attend(q, k, v, pos, mask, scale, sees, rule.encode(), **extras, position=start)
    want_out, want_stats, want_valid, sees = oracle(q, k, v, pos, mask, scale, causal, rule, **extras)
    assert out.transpose(1, 2).is_contiguous()
    assert out.dtype == q.dtype
    assert stats.dtype == torch.float32
    assert not out.isnan().any()
    assert not stats.isnan().any()
    assert_close(out * sees[..., None], want_out * sees[..., None], q.dtype, what="out")
    assert_close(stats, want_stats, q.dtype, stats=True, what="stats")
    assert_close(valid, want_valid, what="valid")
    return out, stats, valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (64, 64), (80, 48), (24, 40), (256, 256)])
def test_head_sizes_and_dtypes(dtype, dim, value_dim):
    q, k, v = qkv(2, 4, 2, 37, dim, value_dim=value_dim, dtype=dtype)
    check(q, k, v, causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (9, 3), (16, 1), (32, 4)])
@pytest.mark.parametrize("group", ["mean", "max"])
def test_groups(heads, kv_heads, group):
    q, k, v = qkv(1, heads, kv_heads, 21, 16)
    check(q, k, v, causal=True, rule=Rule(stats=ALL[Statistics].stats, queries=-1, group=group))
    check(q, k, v, causal=True, rule=Rule(stats=("sum",), queries=-1, group=group))


@pytest.mark.parametrize("length", [1, 2, 31, 64, 65, 127, 129, 300, 515])
@pytest.mark.parametrize("rule", [SUM, ALL, WINDOW], ids=["sum", "all", "window"])
def test_lengths(length, rule):
    q, k, v = qkv(1, 3, 1, length, 16)
    check(q, k, v, causal=True, rule=rule)
    check(q, k, v, mask=causal_mask(length, length), rule=rule)
    check(q, k, v, rule=rule)


def masks(batch, heads, length):
    g = torch.Generator().manual_seed(1)
    causal = causal_mask(length, length)
    left = causal_mask(length, length, left=[0, length // 3, length - 1])
    right = causal_mask(length, length, right=[length // 2, 0, 3])
    noise = torch.rand(batch, heads, length, length, generator=g) > 0.3
    smallest = torch.finfo(torch.float32).min
    additive = torch.zeros(left.shape).masked_fill(~left, smallest)
    slopes = -torch.rand(heads, generator=g)[:, None, None]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return {
        "none": None,
        "causal": causal,
        "left": left,
        "right": right,
        "both": left & right,
        "window": causal & (distance < length // 4)[None, None],
        "almost causal": causal & ~((distance == 3) & (torch.arange(length) == 5))[None, None],
        "pad rows see all": left | ~left.any(-1, keepdim=True),
        "noise": noise,
        "noise of a head": noise[:1, :, :, :],
        "noise of a row": noise[:, :1],
        "one row": noise[:, :1, -1:],
        "one column": noise[:, :, :, :1] | (torch.arange(length)[:, None] == 0),
        "nothing": torch.zeros(1, 1, length, length, dtype=torch.bool),
        "additive": additive,
        "additive 1e9": torch.zeros(left.shape).masked_fill(~left, -1e9),
        "additive inf": torch.zeros(left.shape).masked_fill(~left, -INF),
        "alibi": (slopes * distance)[None].masked_fill(~causal, smallest),
        "wider": torch.nn.functional.pad(causal, (0, 5)),
    }


@pytest.mark.parametrize("name", list(masks(3, 4, 9)))
@pytest.mark.parametrize("rule", [ALL, SUM, WINDOW], ids=["all", "sum", "window"])
def test_masks(name, rule):
    q, k, v = qkv(3, 4, 2, 70, 16)
    check(q, k, v, mask=masks(3, 4, 70)[name], rule=rule)


@pytest.mark.parametrize("length", [300, 600])
@pytest.mark.parametrize("name", ["left", "right", "noise of a row", "alibi", "window"])
def test_masks_over_several_blocks(name, length):
    q, k, v = qkv(3, 2, 1, length, 16)
    check(q, k, v, mask=masks(3, 2, length)[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["left", "additive", "noise"])
def test_masks_in_half_precision(name, dtype):
    q, k, v = qkv(3, 4, 2, 70, 16, dtype=dtype)
    mask = masks(3, 4, 70)[name]
    check(q, k, v, mask=mask.clamp(min=torch.finfo(dtype).min).to(dtype) if mask.is_floating_point() else mask)


def past(batch, kv_heads, slots, queries, position, seed=0):
    """Positions [B, Hkv, slots + queries] of an extend call: empties, a ragged past in order, the call's own."""
    g = torch.Generator().manual_seed(seed)
    pos = torch.full((batch, kv_heads, slots + queries), -1, dtype=torch.int32)
    for b in range(batch):
        for h in range(kv_heads):
            n = int(torch.randint(0, slots, (), generator=g))
            kept = torch.randperm(position, generator=g)[:n].sort().values
            pos[b, h, slots - n : slots] = kept.int()
    pos[..., slots:] = torch.arange(position, position + queries)
    return pos


@pytest.mark.parametrize("kind", ["none", "causal mask", "left", "heads", "float", "is_causal", "one column"])
@pytest.mark.parametrize("rule", [ALL, SUM, WINDOW, NONE], ids=["all", "sum", "window", "none"])
def test_extend_looks_masks_up_by_position(kind, rule):
    batch, heads, kv_heads, slots, queries, position = 2, 4, 2, 19, 13, 40
    total = position + queries
    q, k, v = qkv(batch, heads, kv_heads, queries, 16, keys=slots + queries)
    pos = past(batch, kv_heads, slots, queries, position)
    k, v = (x.masked_fill((pos < 0)[..., None], 0.0) for x in (k, v))
    g = torch.Generator().manual_seed(2)
    mask = {
        "none": None,
        "is_causal": None,
        "causal mask": causal_mask(queries, total),
        "left": causal_mask(queries, total, left=[0, 44]),
        "heads": torch.rand(batch, heads, queries, total, generator=g) > 0.4,
        "float": torch.randn(1, heads, queries, total, generator=g),
        "one column": torch.ones(batch, 1, queries, 1, dtype=torch.bool),
    }[kind]
    check(q, k, v, pos, mask, causal=kind == "is_causal", rule=rule)


EXTRAS = {
    "sinks": {"sinks": torch.tensor([0.7, -1.5, 4.0, 9.0])},
    "softcap": {"softcap": 1.5},
    "both": {"sinks": torch.tensor([3.0, 0.0, -2.0, 0.5], dtype=torch.bfloat16), "softcap": 2.0},
}
"""Far from what they change: with scale 1 the logits of D = 16 reach about 15."""


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("rule", [ALL, SUM, WINDOW, NONE], ids=["all", "sum", "window", "none"])
@pytest.mark.parametrize("name", ["none", "left", "right", "noise", "nothing", "additive 1e9", "alibi", "window"])
def test_sinks_and_softcap(name, rule, extras):
    q, k, v = qkv(3, 4, 2, 70, 16, value_dim=24)
    check(q, k, v, mask=masks(3, 4, 70)[name], causal=name == "none", rule=rule, scale=1.0, **extras)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("kind", ["none", "left", "heads", "is_causal"])
def test_sinks_and_softcap_with_a_past(kind, extras):
    slots, queries, position = 19, 13, 40
    q, k, v = qkv(2, 4, 1, queries, 24, keys=slots + queries, value_dim=16)
    pos = past(2, 1, slots, queries, position)
    k, v = (x.masked_fill((pos < 0)[..., None], 0.0) for x in (k, v))
    noise = torch.rand(2, 4, queries, position + queries, generator=torch.Generator().manual_seed(2)) > 0.4
    mask = {"left": causal_mask(queries, position + queries, left=[0, 44]), "heads": noise}.get(kind)
    check(q, k, v, pos, mask, causal=kind == "is_causal", scale=1.0, **extras)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinks_and_softcap_in_half_precision(dtype, extras):
    q, k, v = qkv(2, 4, 2, 70, 32, dtype=dtype)
    check(q, k, v, causal=True, **extras)
    check(q, k, v, mask=causal_mask(70, 70, left=[0, 30]), **extras)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_sinks_and_softcap_over_several_tiles(extras):
    """Longer than a block of rows, and than a tile of the second pass."""
    q, k, v = qkv(1, 4, 2, 1100, 16)
    check(q, k, v, causal=True, rule=WINDOW, **extras)
    check(q, k, v, mask=causal_mask(1100, 1100, left=[300]), rule=SUM, **extras)


def test_sinks_keep_a_share_of_the_probability():
    """gpt-oss: equal logits and an equal sink halve the row of one key; a softcap does not touch the sink."""
    one = torch.ones(1, 1, 1, 16)
    for softcap, logit in ((0.0, 16.0), (4.0, 4.0 * torch.tanh(torch.tensor(4.0)).item())):
        sinks = torch.tensor([logit])
        out, stats, _ = prefill_attend(one, one, one, None, None, 1.0, "causal", SUM.encode(), sinks, softcap)
        assert_close(out, one / 2)
        assert_close(stats.flatten(), torch.tensor([0.5]), stats=True)


def test_extend_over_several_blocks():
    q, k, v = qkv(2, 2, 1, 530, 16, keys=40 + 530)
    pos = past(2, 1, 40, 530, 60)
    k, v = (x.masked_fill((pos < 0)[..., None], 0.0) for x in (k, v))
    check(q, k, v, pos, causal_mask(530, 590, left=[0, 7]))


def test_strided_inputs():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 6, 2, 90, 32))
    check(q, k, v, causal=True)
    check(q, k, v, mask=causal_mask(90, 90, left=[0, 11]))


def test_golden_probabilities():
    """policies.md 7.2: rows of causal probabilities and the sums that H2O and RoCo make of them."""
    rows = [[1.0], [0.85, 0.15], [0.5, 0.15, 0.35], [0.35, 0.15, 0.3, 0.2], [0.25, 0.15, 0.2, 0.2, 0.2]]
    logits = torch.full((5, 5), -50.0)
    for i, row in enumerate(rows):
        logits[i, : i + 1] = torch.tensor(row).log()
    q, k = logits[None, None], torch.eye(5)[None, None]
    _, stats, _ = prefill_attend(q, k, k, None, None, 1.0, "causal", ALL.encode())
    assert_close(stats[0, 0, 0], torch.tensor([2.95, 0.6, 0.85, 0.4, 0.2]), stats=True)
    assert stats[2, 0, 0].tolist() == [5, 4, 3, 2, 1]
    mean = stats[0] / stats[2]
    spread = (stats[1] / stats[2] - mean**2).clamp(min=0).sqrt()
    assert_close(mean[0, 0], torch.tensor([0.59, 0.15, 0.28333, 0.2, 0.2]), stats=True)
    torch.testing.assert_close(spread[0, 0], torch.tensor([0.2888, 0, 0.0624, 0, 0]), atol=3e-4, rtol=0)


def test_rules_without_observation_have_no_second_pass():
    q, k, v = qkv(1, 2, 1, 8, 16)
    _, stats, _ = prefill_attend(q, k, v, None, None, 0.25, "causal", NONE.encode())
    assert stats.shape == (0, 1, 1, 8)
    _, stats, _ = prefill_attend(q, k, v, None, None, 0.25, "causal", Rule(stats=("sum",), decode="add").encode())
    assert stats.shape == (1, 1, 1, 8)
    assert not stats.any()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"k": torch.zeros(1, 3, 8, 16)}, "fit"),
        ({"v": torch.zeros(1, 2, 9, 16)}, "fit"),
        ({"v": torch.zeros(1, 2, 8, 16, dtype=torch.float16)}, "dtype"),
        ({"k": torch.zeros(1, 2, 9, 16), "v": torch.zeros(1, 2, 9, 16)}, "keys"),
        ({"pos": torch.zeros(1, 2, 8)}, "pos"),
        ({"mask": torch.ones(8, 8, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(1, 3, 8, 8, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(1, 1, 8, 8, dtype=torch.int32)}, "mask"),
        ({"sinks": torch.ones(2)}, "sinks"),
        ({"sinks": torch.ones(4, dtype=torch.int32)}, "sinks"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_refuses(change, word):
    q, k, v = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)
    call = {"q": q, "k": k, "v": v, "pos": None, "mask": None}
    with pytest.raises(ValueError, match=word):
        prefill_attend(**(call | change), scale=1.0, sees="", rule="")


@pytest.mark.parametrize("name", ["none", "left", "right", "noise", "alibi", "nothing", "one column"])
@pytest.mark.usefixtures("in_torch")
def test_plain_attention_of_other_devices(name, monkeypatch):
    """The reference on devices without torch's CPU flash kernel, here run on CPU."""
    monkeypatch.setattr(reference, "_flash_attend", reference._plain_attend)
    q, k, v = qkv(3, 4, 2, 300, 16, value_dim=24)
    check(q, k, v, mask=masks(3, 4, 300)[name], causal=name == "none")
    check(q, k, v, mask=masks(3, 4, 300)[name], causal=name == "none", **EXTRAS["sinks"])


def test_operands_whose_last_axis_is_strided() -> None:
    """A convolution before the cache leaves K and V as [B, H, D, T] in memory."""
    q, k, v = (torch.randn(2, heads, 8, 40).mT for heads in (4, 2, 2))
    expected = prefill_attend(q.contiguous(), k.contiguous(), v.contiguous(), None, None, 0.25, "causal", "")
    found = prefill_attend(q, k, v, None, None, 0.25, "causal", "")
    torch.testing.assert_close(found[0], expected[0])


def test_a_row_that_a_float_mask_hides_from_all_gets_the_mean() -> None:
    """What softmax makes of equal logits; with a bool mask torch gives zeros."""
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    seen = torch.ones(5, 5, dtype=torch.bool).tril() & (torch.arange(5) >= 2)
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    out = prefill_attend(q, k, v, None, mask, 0.3, "", "")[0]
    expected = (q @ k.mT * 0.3 + mask).softmax(-1) @ v
    torch.testing.assert_close(out, expected)
    switched = prefill_attend(q, k, v, None, seen[None, None], 0.3, "", "")[0]
    assert torch.equal(switched[:, :, :2], torch.zeros(1, 2, 2, 8))
