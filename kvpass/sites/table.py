"""What a scan found in one graph: its sites, and what was declined and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvpass.errors import Reason
from kvpass.sites.site import Site


@dataclass(frozen=True)
class Decline:
    """A site that stays dense, and why.

    Attributes:
        pattern: name of the pattern that refused; "" if a rule of sites did, or no pattern took the attention.
        near: for an attention that no pattern took, how far each core pattern got.
        own_hint: what a user can do; "" if the reason says it.
    """

    site: str
    reason: Reason
    node: str
    source: str
    detail: str
    pattern: str = ""
    near: tuple[str, ...] = ()
    own_hint: str = ""

    @property
    def hint(self) -> str:
        return self.own_hint or self.reason.hint

    def to_dict(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "reason": self.reason.value,
            "node": self.node,
            "source": self.source,
            "detail": self.detail,
            "pattern": self.pattern,
            "near": list(self.near),
            "hint": self.hint,
        }

    def __str__(self) -> str:
        what = f"{self.site}: {self.reason.value} at {self.node}: {self.detail}"
        by = f"\n    refused by pattern {self.pattern}" if self.pattern else ""
        near = "".join(f"\n    near miss: {line}" for line in self.near)
        return f"{what}\n    {self.source}{by}{near}\n    hint: {self.hint}"


@dataclass(frozen=True)
class SiteTable:
    """What a scan found in one graph."""

    sites: tuple[Site, ...] = ()
    declined: tuple[Decline, ...] = field(default=())

    @property
    def failed(self) -> tuple[Decline, ...]:
        """Declined sites that a user would want rewritten: not those left dense by choice."""
        return tuple(d for d in self.declined if not d.reason.by_choice)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __bool__(self) -> bool:
        return bool(self.sites or self.declined)

    def to_dict(self) -> dict[str, Any]:
        return {"sites": [s.to_dict() for s in self.sites], "declined": [d.to_dict() for d in self.declined]}

    def __str__(self) -> str:
        lines = [f"{len(self.sites)} site(s) matched, {len(self.declined)} declined"]
        for s in self.sites:
            row = s.to_dict()
            dims = " ".join(f"{letter}={size}" for letter, size in row["dims"].items())
            kind = f"{row['phase']:8s} {row['update']:20s} {row['layout']} {dims} {row['dtype']}"
            lines.append(
                f"  {s.layer:3d} {s.name:36s} {kind} mask={row['mask']} ({row['sees']}) scale={s.core.scale:.4g}"
            )
            lines.append(f"      {s.source}")
        lines += ["  declined " + str(d) for d in self.declined]
        return "\n".join(lines)
