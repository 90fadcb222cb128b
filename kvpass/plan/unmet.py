"""What a policy asks of a site that the site cannot give."""

from __future__ import annotations

from collections.abc import Iterator

from kvpass.errors import PolicyError
from kvpass.kernels.after_call.reindex import Reindex
from kvpass.kernels.codecs.storage import coded
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.rank.layer import Layer
from kvpass.kernels.rank.pyramid import Pyramid
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rank.scored import Scoring
from kvpass.kernels.rank.scorers.seen import NOT_FROM_GRAPH
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.weights import Weight
from kvpass.kernels.slots.ragged import Ragged
from kvpass.plan.site_plan import SitePlan
from kvpass.policy.spec import Spec
from kvpass.terms import Phase


def check_met(policy: Spec, planned: SitePlan) -> None:
    """What a policy asks of a site and the site cannot give.

    Raises:
        PolicyError: naming the site.
    """
    for broken, asked, fix in _unmet(planned):
        if broken:
            where = f"{planned.site.name}, {planned.site.source}"
            raise PolicyError(f"policy {policy.name!r} {asked}", where=where, hint=fix)


def _unmet(planned: SitePlan) -> Iterator[tuple[bool, str, str]]:
    """Whether something is missing, what was asked, and the fix."""
    site, rule = planned.site, planned.rule
    reads = [word for word in rule[Scoring].reads if word not in NOT_FROM_GRAPH]
    reads += ["weight"] if rule[Weight].weight != "none" else []
    shared = site.core.latent is not None or site.mixed is not None
    what = "keeps latents instead of keys and values" if site.core.latent else "keeps all heads side by side"
    asked = "turns keys to new positions" if rule[Reindex].reindex else "gives heads budgets of their own"
    asked = f"reads {' and '.join(reads)}" if reads else asked
    fix = "choose a policy of attention's statistics, e.g. h2o or snapkv"
    kept_apart = bool(reads) or rule[Ragged].ragged or rule[Reindex].reindex
    yield shared and kept_apart, f"{asked}, but this attention {what}", fix
    fix = "set evicted: drop for these layers"
    yield shared and bool(rule[Merge].merge_into), f"merges what it evicts, but this attention {what}", fix
    yield shared and planned.refits, f"fits slots to what it evicts, but this attention {what}", fix
    fix = "leave `store` and `evicted` out for these layers, or use store: dense and evicted: drop"
    yield site.core.latent is not None and bool(coded(rule)), "stores codes, but this attention keeps latents", fix
    asked = "weighs values by the output projection, which was not found behind the attention"
    fix = "set weight.by: l1, which needs no projection; gates and norms in between cannot be read through"
    asked = "divides by norms of hidden states" if rule[Replay].normed else asked
    fix = "set options.normed: false" if rule[Replay].normed else fix
    yield planned.projected and planned.projection is None, asked, fix
    asked = "reads the block's hidden states, which were not found above its values"
    fix = "choose a policy that reads keys or attention; projections of several tensors cannot be read"
    needed = "hidden" in rule[Scoring].reads or rule[Replay].normed
    yield needed and planned.hidden is None, asked, fix
    asked = "reads queries before their rotation, and none of the usual form was found (RoPE over whole heads, entry i "
    fix = "choose a policy that reads keys or attention, e.g. keydiff or snapkv"
    yield "queries" in rule[Scoring].reads and planned.rotation is None, f"{asked}with entry i + D / 2)", fix
    unfound = rule[Reindex].reindex and site.phase is not Phase.DECODE and planned.key_rotation is None
    asked = "turns keys to new positions, and none of the usual rotation was found (float32, RoPE over whole heads, "
    fix = "choose a policy with positions: kept, e.g. streaming_llm"
    yield unfound, f"{asked}entry i with entry i + D / 2)", fix
    changing = rule[Reindex].reindex and site.phase is not Phase.DECODE and planned.key_positions is None
    yield changing, "turns keys to new positions, but this model changes its rotary frequencies with the length", fix
    asked, fix = "shares the budget out over layers, but this graph holds one", "set allocate.layers: uniform"
    over_layers = bool(rule[Pyramid].beta) or rule[ShareOut].share == "preference"
    yield over_layers and rule[Layer].layers < 2, asked, f"avoid graph breaks between layers, or {fix}"
