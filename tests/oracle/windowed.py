"""Policies whose scores are given by the probabilities of the last queries of a call, and held."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from oracle.base import Row, Sight
from oracle.held import Held, clear, uniform
from oracle.smooth import granules, pooled, top_half
from oracle.weights import vo_l1_share

Array = np.ndarray


class Window(Held):
    """Sum over the last 32 queries of the group's mean probability."""

    window = 32

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return positions >= row.end - self.window

    def sums(self, sight: Sight) -> Array:
        return sight.rows.mean(0)[sight.voters(self.window)].sum(0)[sight.candidates]

    def relative(self, score: Array, sight: Sight) -> tuple[Array, Array, Array]:
        return clear(score, sight.rounding * score)


class NACL(Window):
    """The best ones surely, others by chance: 35 % of the budget is drawn with probability softmax(score)."""

    sinks = 4
    percent = 35
    LUCK = 18.0

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return (positions < row.first + self.sinks) | super().protected(positions, row, n)

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        sums, c = self.sums(sight), sight.candidates
        protected = self.protected(c, sight.row, sight.n)
        sure = max(sight.n - sight.n * self.percent // 100 - int(protected.sum()), 0)
        order = sorted(np.flatnonzero(~protected), key=lambda i: (-sums[i], c[i]))
        noise = -np.log(-np.log(uniform(sight, salt=7)))
        score, error = sums + noise, sight.rounding * sums + 2.0**-20 * (1 + np.abs(noise))
        chosen = order[:sure]
        lift = sums[order].max() - sums[order].min() + self.LUCK if order else 0.0
        score[chosen] = sums[chosen] + lift
        error[chosen] = sight.rounding * sums[chosen] + 2.0**-18  # some of float32's last places there
        blurred = np.zeros(len(c))
        if 0 < sure < len(order):
            edge = np.array([sums[i] for i in order[sure - 1 : sure + 1]])
            for i in order:
                other = edge[1] if i in chosen else edge[0]
                if abs(sums[i] - other) <= sight.rounding * (sums[i] + other):
                    error[i], blurred[i] = 2 * lift, 1
        return score, error, blurred


class ChunkKV(Window):
    """Average-pooled over 5, mean of chunks of 20, one choice for all heads."""

    shared = True

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        outside = sight.outside(self.window)
        score = pooled(self.sums(sight), outside, "avg", 5)
        score = granules(score, sight.candidates, outside, sight.row.first, 20, lambda v: float(np.mean(v)))
        return self.relative(score, sight)


class WindowKV(Window):
    """Mean of the better half of windows of 8, one choice for all heads."""

    shared = True

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        outside = sight.outside(self.window)
        score = granules(self.sums(sight), sight.candidates, outside, sight.row.first, 8, top_half)
        return self.relative(score, sight)


class Finch(Window):
    """Probabilities count more where a query sees more keys. Kept keys move together."""

    reindexed = True

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        voters = sight.voters(self.window)
        visible = sight.sees[voters].sum(-1, keepdims=True)
        return self.relative((sight.rows.mean(0)[voters] * visible).mean(0)[sight.candidates], sight)


class CAKE(Window):
    """Mean and variance over the window's queries, average-pooled over 5, mean over the group. Layers share by their
    attention's entropy and variance."""

    gamma = 200
    spread = "preference"

    def prefer(self, sights: list[Sight]) -> float:
        entropy = variance = 0.0
        for sight in sights:
            for head in sight.rows:
                before = sight.candidates[sight.outside(self.window)]
                rows = head[sight.voters(self.window)][:, before]
                entropy -= float((rows * np.log(rows + 1e-10)).sum())
                variance += float(rows.var(0, ddof=1).sum())
        return entropy * variance

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        outside = sight.outside(self.window)
        scores, errors = [], []
        for head in sight.rows:
            rows = head[sight.voters(self.window)][:, sight.candidates]
            mean = rows.mean(0)
            scores.append(pooled(mean + self.gamma * rows.var(0, ddof=1), outside, "avg", 5))
            moved = 2 * (np.abs(rows - mean) * rows).sum(0) / (len(rows) - 1)
            errors.append(pooled(mean + self.gamma * moved, outside, "avg", 5))
        return clear(np.mean(scores, axis=0), sight.rounding * np.mean(errors, axis=0))


class DefensiveKV(Window):
    """The worst case over queries and heads, never below its mean, times the value's share; the nucleus stays before
    all others, by the value's share."""

    nucleus = 0.9
    safeguard = Fraction(0)
    LIFT = 1e5

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        c, outside = sight.candidates, sight.outside(self.window)
        rows = sight.rows[:, sight.voters(self.window)][:, :, c]
        before = rows[:, :, outside]
        smooth = np.zeros_like(before)
        for g in range(before.shape[0]):
            for i in range(before.shape[1]):
                smooth[g, i] = pooled(before[g, i], np.ones(before.shape[2], dtype=bool), "avg", 5)
                smooth[g, i] *= before[g, i].sum() / max(smooth[g, i].sum(), 1e-300)
        worst = smooth.max((0, 1))
        own = rows[:, :, ~outside].sum(-1).mean()
        chosen, doubtful = self.nuclear(before.mean((0, 1)), self.nucleus - own, sight)
        score, error, blurred = np.zeros(len(c)), np.zeros(len(c)), np.zeros(len(c))
        index = np.flatnonzero(outside)
        score[index] = np.maximum(worst, worst.mean())
        score[index[chosen]] = self.LIFT
        score *= vo_l1_share(sight)[c]
        error = 4 * sight.rounding * score
        error[index[doubtful]], blurred[index[doubtful]] = 2 * self.LIFT, 1
        return score, error, blurred

    def nuclear(self, mean: Array, limit: float, sight: Sight) -> tuple[Array, Array]:
        """Indices of the nucleus, and of those that float32 may see on the other side of its edge."""
        order = np.array(sorted(range(len(mean)), key=lambda i: (-mean[i], i)), dtype=int)
        share = mean[order] / mean.sum()
        reached = np.cumsum(share)
        most = max(sight.n - self.window, 0)
        count = min(int((reached < limit).sum()), most)
        chosen = order[:count]
        slack, doubtful = 2 * sight.rounding, []
        for place, i in enumerate(order):
            # the edge runs between the last chosen and the first that is not
            edge = order[count - 1 if place >= count else min(count, len(order) - 1)]
            near = 0 < count < len(order) and abs(mean[i] - mean[edge]) <= slack * (mean[i] + mean[edge])
            if near or (place < most and abs(reached[place] - limit) <= 2 * slack):
                doubtful.append(i)
        return chosen, np.array(doubtful, dtype=int)


class LayerDefensiveKV(DefensiveKV):
    """The best of the whole model."""

    spread = "model"


class Keyformer(Held):
    """Softmax of the last 32 queries' logits with Gumbel noise, summed; half of the budget is recent."""

    voting = 32

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        voters, c = sight.voters(self.voting), sight.candidates
        total = np.zeros(len(c))
        for g, logits in enumerate(sight.logits):
            for i, row in enumerate(logits[voters][:, c]):
                noisy = row + gumbel(sight, len(sight.logits) * sight.head + g, len(voters) - 1 - i)
                shares = np.exp(noisy - noisy.max())
                total += shares / shares.sum() / len(sight.logits)
        return clear(total, 2 * sight.rounding * total)

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return positions >= row.end - n // 2


def gumbel(sight: Sight, head: int, query: int) -> Array:
    """The numbers of kvpass.kernels.rank.scorers.chance for a query head and the query-th last query."""
    more = 0x9E3779B1 * (head + 1) + 0x27D4EB2F * query
    return -np.log(-np.log(uniform(sight, salt=13, head=0, more=more)))


class Fair(Window):
    """SnapKV's pooled votes, ranked inside of spans: the best n of all are the best n_X / n of each span X."""

    spans: Array

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        c, outside = sight.candidates, sight.outside(self.window)
        votes, error = pooled(self.sums(sight), outside, "max", 7), np.zeros(len(c))
        score = votes.copy()
        span = np.array([self.spans[p] if p < len(self.spans) else 0 for p in c])
        for number in set(span[outside]):
            inside = np.flatnonzero(outside & (span == number))
            order = sorted(inside, key=lambda i: (-votes[i], c[i]))
            for rank, i in enumerate(order):
                score[i] = -(rank + 0.5) / len(inside)
                near = np.abs(votes[inside] - votes[i]) <= sight.rounding * (votes[inside] + votes[i])
                close = near & (votes[inside] != votes[i])
                error[i] = close.sum() / len(inside)
        return score, error + 2.0**-22, (error > 0).astype(float)
