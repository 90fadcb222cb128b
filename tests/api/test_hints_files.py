"""Policy files, weight files and scorers of users: what is wrong with them is said before any call."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpass.kernels.rank.scorers.registry import _TABLE
from models import plain

import kvpass
from kvpass.api.cli import main
from kvpass.errors import PolicyError
from kvpass.policy.policy import Policy

MODEL = plain.make(plain.Decoder)


def bomb(levels: int, line: str) -> str:
    """Aliases of aliases: nine times as many values in each line."""
    below = (line.format(at, ",".join([f"*a{at - 1}"] * 9)) for at in range(1, levels))
    return "name: x\nextends: h2o\na0: &a0 {k: 1}\n" + "".join(below)


TEXTS: list[tuple[str | bytes, str, str]] = [
    (bomb(12, "a{0}: &a{0} [{1}]\n"), "at most 10000 values, not billions", "aliases"),
    (bomb(12, "a{0}: &a{0} {{<<: [{1}]}}\n"), "at most 10000 values, not billions", "aliases"),
    (bomb(5, "a{0}: &a{0} [{1}]\n"), "at most 10000 values, not 2", "aliases"),
    ("a: &a [*a]\n", "cannot hold itself", "& and *"),
    ("name: " + "[" * 30 + "]" * 30, "more than 20 mappings and lists", "docs/policy-files.md"),
    ("name: x\n" + "#" * 300_000, "at most 262144 bytes", "a few lines"),
    ("name: x\nprotect:\n\tsinks: 3\n", "not valid YAML", "indent with spaces"),
    ("name: caf\xe9\n".encode("latin-1"), "not UTF-8 text: byte 0xe9 at 9", "UTF-8"),
    ("name: x\n".encode("utf-16"), "not UTF-8 text", "UTF-8"),
    ("name: !!python/object/apply:os.system ['false']\n", "tag !!python/object/apply:os.system in line 1", "docs"),
    ("name: x\nextends: !mine h2o\n", "the tag !mine in line 2", "docs"),
    ("1: 2\nname: x\n", "unknown key '1'", "valid here"),
    ("name: a\0b\n", "not valid YAML", "docs"),
]


@pytest.mark.parametrize(("text", "what", "fix"), TEXTS, ids=lambda v: repr(v)[:30])
def test_files_that_are_no_policies(text: str | bytes, what: str, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.process_time()
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    assert time.process_time() - start < 5
    assert what in caught.value.what
    assert fix in caught.value.hint
    assert caught.value.where == str(path)


def test_dicts_are_counted_too() -> None:
    many: list[Any] = [1] * 9
    for _ in range(12):
        many = [many] * 9
    with pytest.raises(PolicyError, match="at most 10000 values"):
        Policy.load({"name": "x", "notes": many})
    with pytest.raises(PolicyError, match="at most 10000 values"):
        Policy.load(Policy("x", options={"many": many}))  # type: ignore[dict-item]  # what is tested


def test_aliases_and_marks_of_bytes_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("\ufeffname: x\nextends: h2o\nlayers: {0: &p {protect: {sinks: 1}}, -1: *p}\n".encode())
    assert set(Policy.load(path).layers) == {"0", "-1"}


class Code:
    """Unpickling it would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/kvpass_was_here",)


FILTERS = torch.zeros(2, 2, 8)
NAN = torch.full((2, 2, 8), torch.nan)
GATE = {"w1": torch.zeros(2, 5, 32), "b1": torch.zeros(2, 6), "w2": torch.zeros(2, 2, 5), "c": torch.zeros(2, 2)}
WEIGHTS: list[tuple[str, Any, str, str]] = [
    ("q_filters", {"filter": FILTERS}, "no tensor 'filters'", "filters [layers, Hkv, D]"),
    ("q_filters", {"filters": FILTERS[0]}, "'filters' is [2, 8]", "[layers, Hkv, D]"),
    ("q_filters", {"filters": NAN}, "32 of 32 numbers that are NaN", "finite"),
    ("q_filters", {"filters": FILTERS.long()}, "of dtype int64", "floats"),
    ("q_filters", {"filters": [0.0]}, "'filters' is list", "dense tensor"),
    ("q_filters", {"filters": FILTERS.to("meta")}, "a meta tensor", "dense tensor"),
    ("q_filters", [FILTERS], "holds a list, not a dict", "torch.save"),
    ("q_filters", b"junk" * 100, "no file of torch.save", "torch.save"),
    ("q_filters", b"", "it is empty", "torch.save"),
    ("q_filters", {"filters": Code()}, "more than tensors: posix.system, which kvpass never runs", "trust no file"),
    ("q_filters", pickle.dumps(Code()), "no file of torch.save", "torch.save"),
    ("q_filters", None, "it is a folder", "options.file"),
    ("trim_kv", GATE, "'b1' is [2, 6], so hidden is 6, but 5 in 'w1'", "[layers, hidden]"),
    ("duo_attention", {"heads": torch.tensor([[1, 0], [0, 0]])}, "'heads' of layer 1 is [0, 0]", "shares >= 0"),
    ("duo_attention", {"heads": torch.tensor([[1.0, -1.0]])}, "'heads' of layer 0 is [1.0, -1.0]", "shares >= 0"),
]


def weighted(policy: str, held: Any, folder: Path) -> Path:
    """A policy file, and beside it a weight file."""
    weights, path = folder / "w.pt", folder / "mine.yaml"
    if held is None:
        weights.mkdir()
    elif isinstance(held, bytes):
        weights.write_bytes(held)
    else:
        torch.save(held, weights)
    field = "allocate" if policy == "duo_attention" else "options"
    path.write_text(f"name: mine\nextends: {policy}\n{field}: {{file: w.pt}}\n")
    return path


@pytest.mark.parametrize(("policy", "held", "what", "fix"), WEIGHTS, ids=lambda v: str(v)[:25])
def test_weight_files(policy: str, held: Any, what: str, fix: str, tmp_path: Path, capsys: Any) -> None:
    path = weighted(policy, held, tmp_path)
    assert main(["policies", "check", str(path)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert out.startswith(f"{path}: PolicyError: policy 'mine': ")
    assert what in out
    assert "w.pt" in out
    assert fix in err
    with pytest.raises(PolicyError, match=r"w\.pt"):
        kvpass.compile(MODEL, path, 40, inner="eager")
    assert not Path("/tmp/kvpass_was_here").exists()


@pytest.mark.parametrize(
    ("policy", "held", "what"),
    [
        ("q_filters", {"filters": torch.zeros(3, 2, 8)}, "so layers is 3, but 2 in the model"),
        ("q_filters", {"filters": torch.zeros(2, 2, 16)}, "so D is 16, but 8 in the model"),
        ("duo_attention", {"heads": torch.ones(2, 4)}, "so Hkv is 4, but 2 in the model"),
    ],
)
def test_files_of_another_model(policy: str, held: Any, what: str, tmp_path: Path) -> None:
    """Said when the first graph is planned: nothing has run."""
    model = kvpass.compile(MODEL, weighted(policy, held, tmp_path), 40, inner="eager")
    with torch.no_grad(), pytest.raises(PolicyError, match=r"w\.pt") as caught:
        model(plain.tokens(1, 60), None)
    assert what in caught.value.what
    assert "made for this model" in caught.value.hint


def nothing(seen: kvpass.Seen) -> Any:
    return None


def one_number(seen: kvpass.Seen) -> Any:
    return 1.0


def last_dim_kept(seen: kvpass.Seen) -> Any:
    return seen.keys


def yes_or_no(seen: kvpass.Seen) -> Any:
    return seen.keys.norm(dim=-1) > 1


def not_a_number(seen: kvpass.Seen) -> Any:
    return seen.keys.sum(-1) * torch.nan


def misspelled(seen: kvpass.Seen) -> Any:
    return seen.key.norm(dim=-1)


def unsaid(seen: kvpass.Seen) -> Any:
    return seen.values.norm(dim=-1)


SCORERS = [
    (nothing, "gave None, not a float tensor [B, Hkv, L]", "for each of [B, Hkv, L]"),
    (one_number, "gave a float, not a float tensor [B, Hkv, L]", "for each of [B, Hkv, L]"),
    (last_dim_kept, "not a float tensor [B, Hkv, L] = [", "for each of [B, Hkv, L]"),
    (yes_or_no, "of bool, not a float tensor", "scores.float()"),
    (not_a_number, "scores that are no numbers: nan", "nan_to_num"),
    (misspelled, "raised AttributeError", "mend the function"),
    (unsaid, "it reads 'values' without saying so", "reads=('values', ...)"),
]


@pytest.mark.parametrize(("run", "what", "fix"), SCORERS, ids=lambda v: getattr(v, "__name__", ""))
def test_scorers_of_users(run: Any, what: str, fix: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delitem(_TABLE, "mine", raising=False)
    kvpass.scorer("mine", reads=("keys",))(run)
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nscore: mine\n")
    where = f"{__file__}:{run.__code__.co_firstlineno}"
    assert main(["policies", "check", str(path)]) == 1
    out, err = capsys.readouterr()
    assert f"scorer 'mine' ({where})" in out
    assert what in out
    assert fix in err
    if run in (nothing, not_a_number):
        model = kvpass.compile(MODEL, path, 40, inner="eager")
        with torch.no_grad(), pytest.raises(PolicyError) as caught:
            model(plain.tokens(1, 60), None)
        assert f"scorer 'mine' ({where})" in caught.value.what
        assert what in caught.value.what
    monkeypatch.delitem(_TABLE, "mine")


def test_scorers_that_fit_one_model_only(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    @kvpass.scorer("fits", reads=("keys",))
    def fits(seen: kvpass.Seen) -> torch.Tensor:
        return seen.keys @ torch.ones(8)

    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nscore: fits\n")
    assert main(["policies", "check", str(path)]) == 0
    assert "ok, policy 'mine'" in (out := capsys.readouterr().out)
    assert "scorer 'fits' was not tried: it raised RuntimeError on made-up keys" in out
    monkeypatch.delitem(_TABLE, "fits")


def test_registering_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"reads=\('keys',\)"):
        kvpass.scorer("mine", reads="keys")(nothing)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match="a scorer has a name"):
        kvpass.scorer(nothing)  # type: ignore[arg-type]


def test_the_command(capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"kvpass {kvpass.__version__}\n"
    for given in ([], ["polices"]):
        with pytest.raises(SystemExit):
            main(given)
        err = capsys.readouterr().err
        assert "policies" in err
        assert "scorers" in err
    main(["policies"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
