"""Files that a policy reads, weights of a scorer and shares of the heads: what must be in them, and for which model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from kvpass.errors import PolicyError
from kvpass.kernels.errors import TableError
from kvpass.kernels.rank.scorers.registry import decode_options, find_scorer
from kvpass.kernels.rank.tables import HEADS, check_table
from kvpass.policy.spec import Spec

if TYPE_CHECKING:
    from kvpass.kernels.rule import Rule

Wanted = tuple[str, str, Mapping[str, str], str]
"""A field, the path in it, the tensors of the file, and what it is in words."""


def check_files(p: Spec) -> None:
    """Everything about a policy's files that no model is needed for.

    Raises:
        PolicyError: none is given, it is not there, cannot be read, or holds something else.
    """
    for field, path, tensors, about in () if p.keeps_all else _wanted(p):
        if not path or not Path(path).is_file():
            kind = ": it is a folder" if path and Path(path).is_dir() else ""
            what = f"no weight file {path!r}{kind}" if path else "no weight file"
            hint = f"give {field}, a path (a relative one starts at the policy's folder): {about}"
            raise PolicyError(f"policy {p.name!r}: {what}", where=field, hint=hint)
        if tensors:
            try:
                check_table(path, tensors)
            except TableError as error:
                raise PolicyError(f"policy {p.name!r}: {error}", where=field, hint=error.hint) from None


def _wanted(p: Spec) -> Iterator[Wanted]:
    from kvpass.kernels.rank.scorers.registry import scorers

    chosen = scorers().get(p.score)
    if chosen is not None and "file" in chosen.options:
        yield "options.file", str(p.options.get("file", "")), chosen.tensors, chosen.about
    if p.allocate.heads == "table":
        yield "allocate.file", p.allocate.file, HEADS, "torch.save of {'heads': shares [layers, Hkv]}"


def check_fit(name: str, rule: Rule, sizes: Mapping[str, int], where: str) -> None:
    """Whether the files of a policy are for the model whose sizes are given by letter, `layers` the rewritten ones.

    Raises:
        PolicyError: they are not.
    """
    from kvpass.kernels.rank.allocate import Heads
    from kvpass.kernels.rank.scored import Scoring

    files = [(unquote(rule[Heads].table), HEADS)] if rule[Heads].table else []
    if rule[Scoring].scorer and find_scorer(rule[Scoring].scorer).tensors:
        files.append(
            (str(decode_options(rule[Scoring].options).get("file", "")), find_scorer(rule[Scoring].scorer).tensors)
        )
    for path, tensors in files:
        try:
            check_table(path, tensors, sizes)
        except TableError as error:
            raise PolicyError(f"policy {name!r}: {error}", where=where, hint=error.hint) from None
