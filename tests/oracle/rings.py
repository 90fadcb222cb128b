"""Cascading KV: the insertion of one token after the other, as policies.md spells it, for one KV head."""

from __future__ import annotations

import numpy as np
from oracle.base import Memory, Policy, Sight

Array = np.ndarray


class Cascading(Policy):
    """4 sinks and 4 rings; sums of the largest probability of the group."""

    needs = True
    rings = 4
    sinks = 4
    reindexed = True

    def look(self, memory: Memory, sight: Sight) -> None:
        memory.sum = memory.sum + sight.rows.max(0)[sight.row.valid].sum(0)

    def insert(self, memory: Memory, held: Array, new: list[int], seen: int, n: int) -> list[int]:
        """Positions kept after the tokens `new` came, one by one, to those `held`; `memory.held` is the ring, -1 for
        sinks. seen: tokens before them."""
        capacity = (n - self.sinks) // self.rings
        for x in new:
            seen += 1
            if seen <= self.sinks:
                memory.held[x], held = -1, np.append(held, x)
                continue
            for i in range(self.rings):
                ring = [p for p in held if memory.held[p] == i]
                accept = seen - 1 <= capacity * self.rings + self.sinks or (seen - 1 - self.sinks) % 2**i == 0
                if accept and len(ring) < capacity:
                    memory.held[x], held = i, np.append(held, x)
                    x = None
                elif accept:
                    oldest = min(ring)
                    memory.held[x], held = i, np.append(held[held != oldest], x)
                    x = oldest
                    continue
                elif not ring:
                    memory.held[x], held = i, np.append(held, x)
                    x = None
                else:
                    newest = max(ring)
                    if memory.sum[x] >= memory.sum[newest]:
                        memory.held[x], held = i, np.append(held[held != newest], x)
                    x = None
                break
        return sorted(int(p) for p in held)
