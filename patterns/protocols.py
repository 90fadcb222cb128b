"""What a recogniser looks like from outside."""

from __future__ import annotations

from typing import Protocol

from torch import fx

from kvpass.graph.dataflow import Flow
from kvpass.sites.site import Core, Update


class CorePattern(Protocol):
    """Recognises a spelling of attention at one of its nodes.

    Attributes:
        name: shown in tables and reports.

    Optional: `refuses_all`, True for one that only names what is not supported. For near misses in `kvpass.explain`:
    `anchors`, a frozenset of canonical call names that `match` looks for, and `why_not(node) -> str`, one phrase on why
    `match` gave None at such a call.
    """

    @property
    def name(self) -> str: ...

    def match(self, node: fx.Node) -> Core | None:
        """The core whose last node, or whose softmax, is `node`; None: not mine.

        Raises:
            Miss: mine, but not supported. `reads` says which keys and values it reads: it is reported if they are a
            cache.
        """


class UpdatePattern(Protocol):
    """Recognises a spelling of a cache update.

    Attributes:
        name: shown in tables and reports.
    """

    @property
    def name(self) -> str: ...

    def match(self, node: fx.Node, flow: Flow) -> Update | None:
        """The update at `node`; None: not mine.

        Raises:
            Miss: mine, but not supported.
        """


class RefusedPattern(Protocol):
    """Recognises a cache that must stay dense. Tried on values that a core reads and that no update explains.

    Attributes:
        name: shown in tables and reports.
    """

    @property
    def name(self) -> str: ...

    def match(self, base: fx.Node, flow: Flow) -> None:
        """Look at a value that a core reads.

        Raises:
            Miss: it is such a cache.
        """


class Expansion(Protocol):
    """Turns a core over values made from a cache into one over the cache itself.

    Attributes:
        name: shown in tables and reports.
    """

    @property
    def name(self) -> str: ...

    def match(self, core: Core) -> Core | None:
        """The same attention over what is cached; None: not mine."""
