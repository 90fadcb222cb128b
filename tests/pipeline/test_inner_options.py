"""Options of the inner compiler: checked by name and type, part of a backend's value, and handed on."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from models import plain

import kvpass
from kvpass.errors import PolicyError
from kvpass.pipeline import inner as inner_compilers
from kvpass.pipeline.inner_options import Inner, checked_inner

BAD: list[tuple[Any, str, str]] = [
    ({"freezin": True}, "inductor has no option 'freezin'", "did you mean 'freezing'?"),
    ({"name": "inductor", "maxautotune": True}, "no option 'maxautotune'", "did you mean 'max_autotune'?"),
    ({"cpp.thread": 2}, "no option 'cpp.thread'", "did you mean 'cpp.threads'?"),
    ({3: True}, "no option 3", "list_options()"),
    ({"freezing": 1}, "bad value 1 (int) for inductor's option 'freezing'", "True or False; it is False by default"),
    ({"cpp.threads": True}, "bad value True (bool)", "give a int"),
    ({"cpp.threads": "2"}, "bad value '2' (str)", "by default"),
    ({"name": "Inductor"}, "no inner compiler 'Inductor'", "did you mean 'inductor'"),
    ({"name": "eager", "freezing": True}, "eager takes no options, but 'freezing' was given", "'name': 'inductor'"),
    ({"triton.cudagraphs": True}, "'triton.cudagraphs' does not work under kvpass", "mode='reduce-overhead'"),
    ({"freezing_discard_parameters": True}, "does not work under kvpass", "read its parameters"),
    (["inductor"], "no inner compiler", "one of inductor, aot_eager, eager"),
]


@pytest.mark.parametrize(("given", "what", "fix"), BAD, ids=[row[1] for row in BAD])
def test_bad_options_are_named_at_once(given: Any, what: str, fix: str) -> None:
    with pytest.raises(PolicyError) as caught:
        kvpass.compile(plain.one(plain.Decoder), "h2o", 0.5, inner=given)
    assert what in caught.value.what
    assert fix in caught.value.hint
    assert caught.value.where.startswith("inner=")


def test_types_are_those_of_the_compiler() -> None:
    good = {"freezing": True, "cpp.threads": 2, "max_autotune": False, "cpp.simdlen": None, "max-autotune-gemm": True}

    assert dict(checked_inner(good).options)["max_autotune_gemm"] is True


def test_options_are_part_of_a_backend() -> None:
    one = kvpass.backend("h2o", 0.2, inner={"freezing": True, "max_autotune": False})
    two = kvpass.backend("h2o", 0.2, inner={"max_autotune": False, "name": "inductor", "freezing": True})
    assert one == two
    assert hash(one) == hash(two)
    assert one != kvpass.backend("h2o", 0.2, inner={"freezing": True})
    assert one != kvpass.backend("h2o", 0.2, inner={"freezing": False, "max_autotune": False})
    assert kvpass.backend("h2o", 0.2) == kvpass.backend("h2o", 0.2, inner={"name": "inductor"})
    assert pickle.loads(pickle.dumps(one)) == one
    assert str(one.inner) == "inductor(freezing=True, max_autotune=False)"


def test_options_of_torch_compile() -> None:
    options = {"policy": "h2o", "budget": 0.2, "inner": {"freezin": True}}
    with pytest.raises(PolicyError, match="no option 'freezin'"), torch.no_grad():
        torch.compile(torch.nn.Linear(2, 2), backend="kvpass", options=options)(torch.ones(1, 2))


def test_options_reach_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Those of this model alone: Inductor's own settings are as before; the debug report and explain say them."""
    from torch._inductor import compile_fx, config

    seen: list[int] = []
    monkeypatch.setattr(
        compile_fx, "compile_fx", lambda gm, inputs, config_patches: seen.append(config_patches) or gm.forward
    )
    compiled = kvpass.compile(plain.one(plain.Decoder), "h2o", 0.5, inner={"cpp.threads": 3}, debug=str(tmp_path))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        compiled(ids)
    assert seen
    assert all(one == {"cpp.threads": 3} for one in seen)
    assert config.cpp.threads != 3
    assert "inductor(cpp.threads=3)" in (tmp_path / "index.html").read_text()
    assert str(kvpass.explain(compiled, ids)).endswith("inner compiler: inductor(cpp.threads=3)")


def test_without_options_nothing_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    seen: list[Any] = []
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, **more: seen.append(more) or gm.forward)
    gm = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    inner_compilers._whole(Inner(), gm, [torch.ones(1, 2)])
    assert seen == [{"config_patches": None}]
