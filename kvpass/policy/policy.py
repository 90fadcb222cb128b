"""Policy: a spec that was loaded and checked, and what callers ask of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpass.policy.spec import Spec


@dataclass(frozen=True, eq=False)
class Policy(Spec):
    """An eviction policy. Its fields are those of a policy file (docs/policy-files.md)."""

    @staticmethod
    def load(policy: str | Path | Spec | dict[str, Any]) -> Policy:
        """A built-in name, a path to a YAML file, a dict, or a Policy, checked.

        Raises:
            PolicyError: unknown name or key (with the nearest valid one), wrong type, impossible combination.
        """
        from kvpass.policy.load import load

        return Policy(**vars(load(policy)))

    def with_budget(self, budget: int | float | str | None) -> Policy:
        """The same policy with the caller's budget, checked; None keeps the policy's own. `"20% bytes"` is 0.2 of the
        bytes of an unmodified cache.

        Raises:
            PolicyError: no budget at all, or one that is impossible for this policy.
        """
        from kvpass.policy.check import check_budget
        from kvpass.policy.files import check_files
        from kvpass.policy.limits import plain_number
        from kvpass.policy.load import variants
        from kvpass.policy.shorthand import share

        amount, unit = share(budget) or (plain_number(budget), "")
        own = {**vars(self), "unit": unit or self.unit}
        chosen = self if budget is None else Policy(**{**own, "budget": amount})
        check_budget(chosen, given=budget is not None, own=self.budget)
        check_files(chosen)
        for key, variant in variants(chosen).items():
            other = replace(variant, name=f"{self.name}, layers.{key}")
            check_budget(other, given=False, own=other.budget)
            check_files(other)
        return chosen

    @property
    def marks(self) -> tuple[str, ...]:
        """Which marks of the caller (`kvpass.marked`) it reads, in any layer: of `keep`, `spans` and `drop`."""
        from kvpass.policy.load import variants

        all_of_them = [self, *variants(self).values()]
        marked = [one for one in all_of_them if one.protect.tokens or one.fair]
        asked = {
            "keep": bool(marked),
            "spans": any(one.fair for one in marked),
            "drop": any(not one.keeps_all for one in marked),
        }
        return tuple(word for word, read in asked.items() if read)
