"""A cache that grows, read by something that is no softmax(q k^T + mask) v."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus.case import case, grow, logits, wide
from models.attention import DIM, HEADS
from torch import nn

KIND = "UNSUPPORTED_ATTENTION"


def written_out(weigh):
    """A layer's forward around a function of (self, logits, wide values, x)."""

    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = grow(cache, k, v)
        wide_k, wide_v = wide(k, v)
        return self.finish(weigh(self, logits(q, wide_k), wide_v, x)), (k, v)

    forward.__name__, forward.__doc__ = weigh.__name__, weigh.__doc__
    return forward


@case(KIND)
@written_out
def softmax_over_queries(self, scores, v, x):
    """Normalised over the wrong axis."""
    return scores.softmax(-2) @ v


@case(KIND)
@written_out
def softmax_over_heads(self, scores, v, x):
    """Heads compete for a key."""
    return scores.softmax(1) @ v


@case(KIND)
@written_out
def sigmoid_weights(self, scores, v, x):
    """Each key by itself: an evicted one is missing, not made up for by the others."""
    return scores.sigmoid() @ v


@case(KIND)
@written_out
def relu_weights(self, scores, v, x):
    """Squared relu over the length: the sum depends on how many keys there are."""
    return scores.relu().square() / scores.shape[-1] @ v


@case(KIND)
@written_out
def no_softmax_at_all(self, scores, v, x):
    """Linear in the keys."""
    return scores @ v


@case(KIND)
@written_out
def softmin(self, scores, v, x):
    """The sign is the other way round."""
    return F.softmin(scores, -1) @ v


@case(KIND)
@written_out
def softmax_twice(self, scores, v, x):
    """A softmax of probabilities."""
    return scores.softmax(-1).softmax(-1) @ v


@case(KIND)
@written_out
def log_softmax(self, scores, v, x):
    """Logarithms as weights."""
    return F.log_softmax(scores, -1) @ v


@case(KIND)
@written_out
def softmax_plus_one(self, scores, v, x):
    """exp(x) / (1 + sum exp(x)), written out."""
    weights = scores.exp()
    return weights / (1 + weights.sum(-1, keepdim=True)) @ v


@case(KIND)
@written_out
def sharpened_and_normalised_again(self, scores, v, x):
    """Probabilities squared after the softmax."""
    weights = scores.softmax(-1).square()
    return weights / weights.sum(-1, keepdim=True) @ v


@case(KIND)
@written_out
def talking_heads(self, scores, v, x):
    """Probabilities are mixed over heads before they meet the values."""
    return torch.einsum("bhqk,hg->bgqk", scores.softmax(-1), self.q.weight[:HEADS, :HEADS]) @ v


@case(KIND)
@written_out
def talking_logits(self, scores, v, x):
    """Logits are mixed over heads."""
    return (scores.permute(0, 2, 3, 1) @ self.q.weight[:HEADS, :HEADS]).permute(0, 3, 1, 2).softmax(-1) @ v


@case(KIND)
@written_out
def smoothed_over_keys(self, scores, v, x):
    """Neighbouring keys share their probability: each weight depends on keys that may be gone."""
    weights = scores.softmax(-1)
    return F.avg_pool1d(weights.flatten(0, 1), 3, 1, 1).view_as(weights) @ v


@case("MASK_UNKNOWN")
@written_out
def top_k(self, scores, v, x):
    """Only the best three keys: which ones depends on all of them."""
    least = scores.topk(3, -1).values[..., -1:]
    return scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ v


@case(KIND)
@written_out
def small_weights_dropped(self, scores, v, x):
    """A threshold on probabilities."""
    weights = scores.softmax(-1)
    return torch.where(weights > 0.1, weights, 0.0) @ v


@case(KIND)
@written_out
def hard_maximum(self, scores, v, x):
    """Only the best key."""
    return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(v.dtype) @ v


@case(KIND)
@written_out
def temperature_from_the_input(self, scores, v, x):
    """The scale is data."""
    return (scores * x.mean((1, 2))[:, None, None, None]).softmax(-1) @ v


def per_head():
    return {"scales": nn.Parameter(torch.rand(1, HEADS, 1, 1)), "tau": nn.Parameter(torch.tensor(0.7))}


@case(KIND, parts=per_head)
@written_out
def learned_scale_of_each_head(self, scores, v, x):
    """No one number scales all logits."""
    return (scores * self.scales).softmax(-1) @ v


@case(KIND, parts=per_head)
@written_out
def learned_temperature(self, scores, v, x):
    """A weight may change between two calls of one compiled graph."""
    return (scores / self.tau).softmax(-1) @ v


@case(KIND)
@written_out
def quantised_logits(self, scores, v, x):
    """Rounded to integers on the way."""
    return (scores * 8).to(torch.int8).float().softmax(-1) @ v


@case(KIND)
@written_out
def clamped_logits(self, scores, v, x):
    """Logits of visible keys are cut."""
    return scores.clamp(-1, 1).softmax(-1) @ v


@case(KIND)
@written_out
def normalised_logits(self, scores, v, x):
    """Standardised over all keys: mean and deviation need the evicted ones."""
    return ((scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True)).softmax(-1) @ v


@case(KIND)
@written_out
def multiplied_by_a_mask(self, scores, v, x):
    """Zero is a logit like any other: these keys are not hidden."""
    return (scores * (torch.arange(scores.shape[-1]) > 1)).softmax(-1) @ v


@case("MASK_UNKNOWN")
@written_out
def hidden_by_a_small_number(self, scores, v, x):
    """-1 makes a key less likely; it does not hide it."""
    return scores.masked_fill(torch.arange(scores.shape[-1]) < 2, -1.0).softmax(-1) @ v


@case("MASK_UNKNOWN")
@written_out
def hidden_by_zero_probability_later(self, scores, v, x):
    """Hidden with a number that the softcap behind it makes visible again."""
    return (5 * torch.tanh(scores.masked_fill(torch.arange(scores.shape[-1]) < 2, -1e9) / 5)).softmax(-1) @ v


@case(KIND)
@written_out
def masked_after_the_softmax(self, scores, v, x):
    """Weights that no longer sum to one."""
    return scores.softmax(-1) * (torch.arange(scores.shape[-1]) > 1) @ v


@case("DROPOUT")
@written_out
def dropout(self, scores, v, x):
    """Random at every call."""
    return F.dropout(scores.softmax(-1), 0.3, True) @ v


@case(KIND)
@written_out
def difference_of_two_softmaxes(self, scores, v, x):
    """Differential attention in one product."""
    return (scores.softmax(-1) - 0.2 * (2 * scores).softmax(-1)) @ v


@case(KIND)
@written_out
def probabilities_used_twice(self, scores, v, x):
    """An entropy is taken of them."""
    weights = scores.softmax(-1)
    return weights @ v + (weights * weights.log()).sum()


@case(KIND)
def probabilities_returned(self, x, cache):
    """output_attentions=True."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    weights = logits(q, wide_k).softmax(-1)
    return self.finish(weights @ wide_v), (k, v), weights


@case(KIND)
def logits_returned(self, x, cache):
    """Another reader of q k^T."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    scores = logits(q, wide_k)
    return self.finish(scores.softmax(-1) @ wide_v), (k, v), scores


def relative():
    return {"far": nn.Parameter(torch.randn(HEADS, 64, DIM)), "u": nn.Parameter(torch.randn(HEADS, 1, DIM))}


@case(KIND, parts=relative)
def two_products(self, x, cache):
    """Transformer-XL: q k^T plus q r^T. Its second product is a bias, but nothing here says so."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    scores = logits(q, wide_k) + logits(q + self.u, self.far[:, : wide_k.shape[2]].expand(2, -1, -1, -1))
    return self.finish(scores.softmax(-1) @ wide_v), (k, v)
