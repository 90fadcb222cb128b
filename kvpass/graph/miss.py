"""A non-match is a value with a reason and a node, so that `explain` can show it."""

from __future__ import annotations

from torch import fx

from kvpass.errors import Reason


class Miss(Exception):
    """Raised deep inside a pattern to say why it does not fire.

    Attributes:
        reason: stable code.
        node: the blocking node.
        detail: one phrase for people.
        reads: keys or values that the refused attention reads; new tokens of a refused update.
        hint: what a user can do, where the reason's own hint does not say it.
        axis: along which a refused update writes them.
        pattern: name of the pattern that refused; "" for a rule of sites.
    """

    def __init__(
        self, reason: Reason, node: fx.Node, detail: str = "", reads: tuple[fx.Node, ...] = (), hint: str = ""
    ) -> None:
        super().__init__(f"{reason.value} at {node.name}: {detail}")
        self.reason, self.node, self.detail = reason, node, detail
        self.reads, self.hint = reads, hint
        self.axis: int | None = None
        self.pattern = ""

    def by(self, pattern: str) -> Miss:
        """The same, signed by the pattern that refused."""
        self.pattern = self.pattern or pattern
        return self
