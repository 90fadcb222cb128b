"""Graphs that are not rewritten: what is raised in their place, and when they stay as the model wrote them instead."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from kvpass.errors import DeclinedError, KVPassError, Reason, TrainingError, VerificationError
from kvpass.graph.calls import example

if TYPE_CHECKING:
    from kvpass.sites.table import SiteTable


class Refusal:
    """Stands in for a compiled graph and raises the reason: Dynamo would wrap an exception of a backend."""

    def __init__(self, error: KVPassError) -> None:
        self.error = error

    def __call__(self, *args: Any) -> Any:
        raise self.error


class StageError(DeclinedError):
    """A stage of kvpass failed in a way that it has no words for."""


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Around a stage that is kvpass' own: whatever it cannot do gets a name.

    Raises:
        StageError: in the place of any error that is no `KVPassError`, and no want of memory: later there may be some.
    """
    try:
        yield
    except (KVPassError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise StageError(
            f"kvpass failed at this graph in its stage {name!r}: {type(error).__name__}: {said}",
            where=f"{frame.filename}:{frame.lineno} in {frame.name}",
            hint="this is a fault of kvpass: please report it, with the folder that debug=True writes; "
            "strict=False leaves such a graph as the model wrote it",
        ) from error


Compiled = Callable[..., Any]


def or_as_it_is(rewrite: Callable[[], Compiled], dense: Callable[[], Compiled]) -> Compiled:
    """Under `strict=False`: a graph rewritten, or as the model wrote it where a stage failed, with a warning."""
    try:
        return rewrite()
    except (StageError, VerificationError) as error:
        warnings.warn(f"a graph stays as the model wrote it: {error}", UserWarning, stacklevel=2)
        return dense()


def strict_error(table: SiteTable, broken: str) -> DeclinedError:
    """broken: where Dynamo broke the graph, if it did: what is not attended to here may be behind that."""
    first = table.failed[0]
    behind = f"; {broken}" if broken and any(d.reason is Reason.NO_ATTENTION for d in table.failed) else ""
    listed = "\n".join(f"  {d}" for d in table.failed[:8])
    more = f"\n  ... and {len(table.failed) - 8} more" if len(table.failed) > 8 else ""
    return DeclinedError(
        f"{len(table.failed)} attention site(s) with a KV cache cannot be rewritten:\n{listed}{more}",
        where=f"{first.site}, {first.source}{behind}",
        hint=f"{first.hint}; or pass strict=False to leave such sites dense",
    )


def refuse_training(table: SiteTable) -> None:
    for site in table:
        halves = (site.key.update.new, site.value.update.new)
        if torch.is_grad_enabled() and any(example(node).requires_grad for node in halves):
            raise TrainingError(
                "K and V require grad: an evicting cache has no gradients",
                where=f"{site.name}, {site.source}",
                hint="call the model under torch.no_grad() or torch.inference_mode(), as generate() does",
            )


def kept(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a captured graph that can be read later: Dynamo empties what hangs on the nodes of its own."""
    graph = fx.Graph()
    copy: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copy))
    for node, ours in copy.items():
        ours.meta = dict(node.meta)
    result = fx.GraphModule(gm, graph)
    result.meta.update(gm.meta)
    return result
