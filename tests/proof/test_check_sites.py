"""verify=True: good sites pass in every phase and form; a broken kernel is caught, with site, line and error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kvpass.kernels import choose
from torch import Tensor, nn

import kvpass
from kvpass.errors import VerificationError
from kvpass.proof import check_sites

pytestmark = pytest.mark.usefixtures("in_torch")


class Layer(nn.Module):
    """Attention with a cat cache; `form` picks the tensor layout and the spelling of the repeated KV heads."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor, past: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        rows, tokens = x.shape[:2]
        q = self.q(x).view(rows, tokens, 4, 8).transpose(1, 2)
        k, v = self.k(x).view(rows, tokens, 2, 8), self.v(x).view(rows, tokens, 2, 8)
        axis = 1
        if self.form != "BTHD":
            k, v, axis = k.transpose(1, 2), v.transpose(1, 2), 2
        if past is not None:
            k, v = torch.cat([past[0], k], axis), torch.cat([past[1], v], axis)
        out = F.scaled_dot_product_attention(
            q,
            *self.operands(k, v),
            attn_mask=mask,
            is_causal=mask is None and past is None,
            enable_gqa=self.form != "repeat",
        )
        return x + self.out(out.transpose(1, 2).reshape(rows, tokens, 32)), (k, v)

    def operands(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "BTHD":
            return k.transpose(1, 2), v.transpose(1, 2)
        if self.form == "repeat":
            b, h, t, d = k.shape
            return tuple(x[:, :, None].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d) for x in (k, v))  # type: ignore[return-value]
        return k, v


class Decoder(nn.Module):
    """Left padding counts as `pad` tokens of row 0; without it decode has no mask."""

    def __init__(self, form: str, additive: bool = False, pad: int = 0, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Layer(form) for _ in range(layers))
        self.additive, self.pad = additive, pad

    def forward(self, ids: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        axis = 1 if self.layers[0].form == "BTHD" else 2
        seen = 0 if past is None else past[0][0].shape[axis]
        mask = self.mask(ids, seen) if self.pad or (past is not None and ids.shape[1] > 1) else None
        x, caches = self.embed(ids), []
        for at, layer in enumerate(self.layers):
            x, cache = layer(x, None if past is None else past[at], mask)
            caches.append(cache)
        return x, tuple(caches)

    def mask(self, ids: Tensor, seen: int) -> Tensor:
        column = torch.arange(seen + ids.shape[1])
        row = torch.arange(ids.shape[1])[:, None] + seen
        first = torch.tensor([self.pad] + [0] * (ids.shape[0] - 1))[:, None, None, None]
        shown = (column <= row)[None, None] & (column >= first)
        return torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min) if self.additive else shown


def converse(model: Any) -> list[Tensor]:
    """Prefill, decode three times, extend, decode: every phase, also after evictions."""
    ids = torch.randint(0, 50, (2, 40))
    outs = []
    with torch.no_grad():
        out, past = model(ids)
        for start, end in ((0, 1), (1, 2), (2, 3), (3, 9), (4, 5)):
            outs.append(out)
            out, past = model(ids[:, start:end], past)
    return [*outs, out]


def compiled(policy: str = "h2o", budget: Any = 12, **options: Any) -> Any:
    shape = {key: options.pop(key) for key in ("form", "additive", "pad", "layers") if key in options}
    model = Decoder(**{"form": "gqa", **shape}).eval()
    return kvpass.compile(model, policy, budget, inner="eager", verify=True, **options)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Phases of the sites that were checked."""
    phases: list[str] = []
    run = check_sites._Check.run

    def counted(self: Any, call: Any, values: Any) -> None:
        run(self, call, values)
        phases.append(self.site.phase.value)

    monkeypatch.setattr(check_sites._Check, "run", counted)
    return phases


@pytest.mark.parametrize("form", ["gqa", "repeat", "BTHD"])
def test_good_sites_pass_in_every_phase(form: str, checked: list[str]) -> None:
    model = compiled(form=form, layers=2)
    converse(model)
    assert set(checked) == {"prefill", "decode", "extend"}
    assert len(checked) == 2 * len(model.kvpass.graphs), "each site of each graph once, on its first call only"


@pytest.mark.parametrize("policy", ["full", "streaming_llm", "tova", "snapkv", "roco"])
def test_good_sites_pass_with_every_policy(policy: str, checked: list[str]) -> None:
    converse(compiled(policy, None if policy == "full" else 0.5))
    assert set(checked) == {"prefill", "decode", "extend"}


@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_compared_only_where_somebody_looks(additive: bool, checked: list[str]) -> None:
    converse(compiled(pad=5, additive=additive))
    assert set(checked) == {"prefill", "decode", "extend"}


def test_the_check_changes_nothing() -> None:
    torch.manual_seed(1)
    plain = kvpass.compile(Decoder("gqa").eval(), "h2o", 12, inner="eager")
    torch.manual_seed(1)
    watched = compiled()
    torch.manual_seed(2)
    expected = converse(plain)
    torch.manual_seed(2)
    for ours, theirs in zip(converse(watched), expected, strict=True):
        assert torch.equal(ours, theirs)


def breaking(monkeypatch: pytest.MonkeyPatch, op: str, wrong: Callable[..., Any]) -> None:
    """Replace the implementation that runs an op on the CPU by `wrong(right, *args)`."""
    right = choose.kernel(op, torch.device("cpu"))
    broken = (lambda *args: wrong(right, *args), choose._anything)
    monkeypatch.setitem(choose._loaded, (op, "reference"), broken)


@pytest.mark.parametrize(
    ("op", "wrong", "phase", "message"),
    [
        ("prefill_attend", lambda right, *a: (right(*a)[0] * 1.001, *right(*a)[1:]), "prefill", "differs by"),
        (
            "prefill_attend",
            lambda right, *a: right(*a[:5], a[5]._replace(scale=a[5].scale * 1.05), a[6]),
            "prefill",
            "differs by",
        ),
        ("decode_attend", lambda right, *a: right(*a) + 1e-3, "decode", "differs by"),
        (
            "decode_attend",
            lambda right, *a: right(*a[:2], a[2]._replace(position=a[2].position + 1)),
            "decode",
            "refused by its own ops",
        ),
        ("compact_slots", lambda right, *a: (right(*a), a[3].k.mul_(1.01))[0], "prefill", "keeps wrong keys"),
        ("select_slots", lambda right, *a: right(*a).clamp(max=7), "prefill", "keeps the wrong positions"),
    ],
    ids=["output", "scale", "decode output", "decode position", "keys moved", "selection"],
)
def test_a_broken_kernel_is_caught(
    monkeypatch: pytest.MonkeyPatch, op: str, wrong: Callable[..., Any], phase: str, message: str
) -> None:
    breaking(monkeypatch, op, wrong)
    with pytest.raises(VerificationError, match=message) as caught:
        converse(compiled())
    text = str(caught.value)
    assert phase in text
    assert "layers.0" in text, "the site"
    assert "test_check_sites.py:" in text, "the source line"
    assert "what to do:" in text


def test_a_broken_kernel_passes_without_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, "decode_attend", lambda right, *a: right(*a) + 1e-3)
    converse(kvpass.compile(Decoder("gqa").eval(), "h2o", 12, inner="eager"))


def test_half_precision_has_its_own_tolerance(checked: list[str]) -> None:
    model = kvpass.compile(Decoder("gqa").eval().bfloat16(), "h2o", 12, inner="eager", verify=True)
    converse(model)
    assert set(checked) == {"prefill", "decode", "extend"}


def test_a_failed_check_is_repeated_on_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, "prefill_attend", lambda right, *a: (right(*a)[0] + 1, *right(*a)[1:]))
    model = compiled()
    for _ in range(2):
        with pytest.raises(VerificationError), torch.no_grad():
            model(torch.randint(0, 50, (2, 40)))
