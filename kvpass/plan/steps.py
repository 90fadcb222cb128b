"""What of `kvpass.runtime.steps` a graph's sites ask for: by their rules and phases."""

from __future__ import annotations

from collections.abc import Sequence

from kvpass.kernels.rule import Rule
from kvpass.policy.spec import Spec
from kvpass.runtime import steps
from kvpass.runtime.step import PlannedStep, SharedInput
from kvpass.sites.site import Site


def planned_steps(policy: Spec, sites: Sequence[tuple[Site, Rule]]) -> tuple[PlannedStep, ...]:
    """The steps around a graph's calls, in the order in which those of one moment run."""
    found = []
    for step in steps.STEPS:
        about = tuple(at for at, (site, rule) in enumerate(sites) if step.applies(rule, site.phase))
        if about:
            found.append(PlannedStep(step.under(policy), about))
    return tuple(found)


def planned_inputs(sites: Sequence[tuple[Site, Rule]]) -> tuple[SharedInput, ...]:
    """The inputs that a graph's sites share, in order."""
    return tuple(
        one for one in steps.INPUTS if any(one.applies(rule, site.phase, site.key.update.form) for site, rule in sites)
    )
