"""Rules of layers whose heads lie on several ranks: who must tell whom, and what is not built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from urllib.parse import quote

from torch import fx

from kvpass.errors import PolicyError
from kvpass.graph.collectives import exchanges
from kvpass.kernels.exits.refit import Refit
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.ranks import Ranks
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.ragged import Ragged
from kvpass.kernels.timing import Timing
from kvpass.policy.spec import Spec
from kvpass.runtime.sharded import Sharded
from kvpass.sites.site import Site


def on_ranks(policy: Spec, rule: Rule, site: Site, part: Sharded | None) -> Rule:
    """The rule of a site of a model of which this process has a part: as in one process, where a head keeps what it
    keeps whatever other heads do; else it says where those are.

    Raises:
        PolicyError: it cannot be told where, or what the policy asks of them is not built.
    """
    if part is None or not rule.evicts:
        return rule
    elsewhere = heads_elsewhere(site, part)
    where = f"{part}, {site.name}, {site.source}"
    if elsewhere is None:
        raise PolicyError(
            f"the layer has {site.dims['Hq']} query heads and {site.dims['Hkv']} KV heads on this rank: neither all of "
            f"them nor one part of {part.ranks} ({_known(part)})",
            where=where,
            hint="choose as many ranks as divide the KV heads: where ranks share a KV head, none sees all its queries",
        )
    if not elsewhere:
        return rule
    for broken, asked, fix in _unbuilt(rule):
        if broken:
            what = f"policy {policy.name!r} {asked}, which is not built where heads lie on several ranks"
            raise PolicyError(what, where=where, hint=fix)
    if _heads_share(rule):
        rule = rule.replace(share="heads")
    if not any(record.joins for record in rule):
        return rule
    return Rule(*rule, Ranks(part.ranks, part.rank, quote(part.group)))


def check_exchanges(gm: fx.GraphModule, policy: Spec, rules: Sequence[Rule], part: Sharded | None) -> None:
    """A graph whose ranks exchange something, of a model that nobody has seen.

    Raises:
        PolicyError: the policy looks at all heads of a layer, and some may be elsewhere.
    """
    asks = any(_heads_share(rule) or any(record.joins for record in rule) for rule in rules if rule.evicts)
    if part is None and asks and exchanges(gm.graph):
        raise PolicyError(
            f"policy {policy.name!r} looks at all heads of a layer, and this graph holds part of a model: which heads "
            "are elsewhere is not known",
            hint="kvpass.compile a model that transformers has loaded with tp_plan='auto', or choose a policy whose "
            "heads decide for themselves, e.g. h2o (docs/parallel.md)",
        )


def heads_elsewhere(site: Site, part: Sharded) -> bool | None:
    """Whether other ranks have heads of the site's layer; None if that is not to be told."""
    sizes = site.dims["Hq"], site.dims["Hkv"]
    return part.parts(*sizes) if all(isinstance(size, int) for size in sizes) else None


def _heads_share(rule: Rule) -> bool:
    """Whether the heads of a layer share its slots inside of a call. Ranks then hold different numbers of slots, which
    no graph knows before: they share when the call is over.
    """
    return rule[Ragged].ragged and not rule[ShareOut].share


def _unbuilt(rule: Rule) -> Iterator[tuple[bool, str, str]]:
    """Whether something is asked that ranks cannot do together, what, and the fix."""
    shares = _heads_share(rule)
    fix = "set allocate.heads: uniform, or leave evicted.refit out"
    yield shares and rule[Refit].refit_queries > 0, "fits slots whose number other heads decide", fix
    fix = "set every: 1, or allocate.heads: uniform"
    yield shares and rule[Timing].every > 1, "shares slots out between calls", fix
    fix = "choose a policy without observe.replay (`kvpass policies` lists them)"
    yield bool(rule[Replay].replay), "reads prompts again", fix


def _known(part: Sharded) -> str:
    said = ", ".join(f"{q} and {kv}" for q, kv in sorted(part.heads))
    return f"the config says {said}" if said else "the model has no config that says how many there are"
