"""What slots keep beside key, value and position: one float32 each, by name."""

from __future__ import annotations

from dataclasses import dataclass

from kvpass.kernels.rule import Record, Rule

_BROUGHT: set[str] = set()


def brought(name: str) -> str:
    """The name of a statistic that a token may bring when it comes, instead of 0: a feature says it once."""
    _BROUGHT.add(name)
    return name


@dataclass(frozen=True)
class Statistics(Record):
    """Names of the statistics that slots keep, in the order of the state's rows."""

    stats: tuple[str, ...] = ()

    @property
    def slot_bytes(self) -> int:
        return 4 * len(self.stats)

    @property
    def arrives(self) -> bool:
        return bool(_BROUGHT & set(self.stats))


def stat(rule: Rule, name: str) -> int:
    """Row of the state's statistics that holds the named one, -1 if it is not kept."""
    names = rule[Statistics].stats
    return names.index(name) if name in names else -1


def keeps(rule: Rule, name: str) -> bool:
    """Whether slots keep the named statistic."""
    return name in rule[Statistics].stats
