"""What a policy promises of every head, read from its own words: nothing that is protected goes, and no more is held
than the budget allows.
"""

from __future__ import annotations

from typing import Any

from reliability.plain import Plain, Row

from kvpass.policy.policy import Policy

Heads = list[list[list[int]]]
"""[layer][head]: numbers of the row's tokens that it holds, ascending."""


def unheard(policy: Policy, row: Row) -> int:
    """Tokens of a row since its last call that was read again."""
    since = 0
    for at, call in enumerate(row.calls):
        since = 0 if at == 0 or len(call) >= policy.shortest else since + len(call)
    return since


def check_promises(policy: Policy, budget: Any, held: Heads, plain: Plain, row: Row) -> None:
    seen = len(row.columns)
    if policy.keeps_all or policy.evicted.to:  # also where what would go is held as codes alone
        assert all(head == list(range(seen)) for heads in held for head in heads), "a token is gone"
        return
    size = budget if isinstance(budget, int) else max(policy.min_slots, int(budget * seen))
    waits = policy.every - 1 if policy.when == "always" else unheard(policy, row) if policy.replays else plain.steps
    counts = [[len(head) for head in heads] for heads in held]
    if policy.allocate.layers == "uniform" and policy.allocate.heads in ("uniform", "threshold"):
        assert max(map(max, counts)) <= size + waits, f"{counts} slots, budget {size}"
    most = sum(map(len, counts)) * (size + waits)
    assert sum(map(sum, counts)) <= most, f"{counts} slots, budget {size} on average"
    fewest = min(seen, size)
    protected = set(range(min(policy.protect.sinks, seen)))
    recent = policy.protect.recent
    if isinstance(recent, float):
        recent = int(recent * size)
    protected |= set(range(max(seen - recent, 0), seen))
    if len(protected) > fewest or policy.allocate.rings:
        return
    for heads in held:
        for head in heads:
            assert protected <= set(head), f"protected {sorted(protected - set(head))} are gone: {head}"
