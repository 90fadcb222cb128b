"""No KV cache in sight: softmaxes, products and cats of other trades."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus.case import UNTOUCHED, case, eager, logits, prompt, wide
from models.attention import DIM, HEADS, WIDTH, attend, hidden, past
from torch import nn


@case(UNTOUCHED, prompt)
def eager_encoder(self, x):
    """Attention without a cache."""
    return self.finish(eager(*self.project(x)))


@case(UNTOUCHED, prompt)
def heads_attend_to_heads(self, x):
    """Softmax over heads, token by token."""
    q, k, v = (t.transpose(1, 2) for t in self.project(x))
    return self.o((logits(q, k).softmax(-1) @ v).flatten(2))


@case(UNTOUCHED, prompt)
def rows_attend_to_rows(self, x):
    """Attention over the batch axis: no sequence grows."""
    q, k, v = (t.permute(2, 1, 0, 3) for t in self.project(x))
    return attend(q, k, v)


@case(UNTOUCHED, prompt)
def channels_attend_to_channels(self, x):
    """XCiT: a feature-by-feature matrix, which has the size of no sequence."""
    q, k, v = self.project(x)
    k, v = wide(k, v)
    return self.finish(((q.transpose(-1, -2) @ k).softmax(-1) @ v.transpose(-1, -2)).transpose(-1, -2))


@case(UNTOUCHED, prompt)
def linear_attention(self, x):
    """Softmax over features of q and over tokens of k; k^T v is a state, not a cache of tokens."""
    q, k, v = self.project(x)
    k, v = wide(k, v)
    return self.finish(q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v))


def experts():
    return {"router": nn.Linear(WIDTH, 4), "experts": nn.Parameter(torch.randn(4, WIDTH, WIDTH))}


@case(UNTOUCHED, prompt, experts)
def mixture_of_experts(self, x):
    """Router weights, softmax, product with experts: no keys."""
    gates = self.router(x).softmax(-1)
    return torch.einsum("bse,eio,bsi->bso", gates, self.experts, x), gates


@case(UNTOUCHED, prompt, experts)
def prototypes(self, x):
    """Softmax(x W) W: the keys and values are weights."""
    table = self.experts[0]
    return (x @ table.T).softmax(-1) @ table


@case(UNTOUCHED, lambda: (hidden(6), torch.randn(2, 10, WIDTH)))
def retrieval(self, x, memory):
    """A memory that is only read."""
    return (x @ memory.transpose(1, 2)).softmax(-1) @ memory, memory


@case(UNTOUCHED, lambda: (hidden(6), torch.randn(2, HEADS, 10, DIM)))
def hopfield(self, x, memory):
    """Keys are values, both an input that is handed back."""
    q, _, _ = self.project(x)
    return self.finish(logits(q, memory).softmax(-1) @ memory), memory


@case("UNSUPPORTED_UPDATE", lambda: (hidden(1), torch.randn(2, HEADS, 10, DIM)))
def memory_written_by_a_gate(self, x, memory):
    """A neural Turing machine: every place of the memory changes at every step."""
    q, _, _ = self.project(x)
    memory = memory * 0.9 + 0.1 * q
    return self.finish(logits(q, memory).softmax(-1) @ memory), memory


@case(UNTOUCHED, prompt)
def gated(self, x):
    """Sigmoid weights do not sum to one."""
    q, k, v = self.project(x)
    k, v = wide(k, v)
    return self.finish(logits(q, k).sigmoid() @ v)


@case(UNTOUCHED, prompt)
def sinkhorn(self, x):
    """Normalised over rows and over columns, in turn."""
    q, k, v = self.project(x)
    k, v = wide(k, v)
    return self.finish(logits(q, k).softmax(-1).softmax(-2) @ v)


@case(UNTOUCHED, lambda: (hidden(1), torch.randn(2, HEADS, DIM, DIM)))
def fast_weights(self, x, state):
    """The state of a linear attention: its size does not change."""
    q, k, v = self.project(x)
    k, v = wide(k, v)
    state = state + k.transpose(-1, -2) @ v
    return self.finish(q.softmax(-1) @ state), state


@case(UNTOUCHED, lambda: (hidden(1), torch.randn(2, WIDTH, 3)))
def convolution_window(self, x, state):
    """A rolling window of inputs for a causal convolution."""
    state = torch.cat([state[..., 1:], x.transpose(1, 2)], -1)
    return (state * self.q.weight[:, :3]).sum(-1), state


@case(UNTOUCHED, lambda: (hidden(6), hidden(6)))
def similarity_loss(self, x, other):
    """CLIP: a batch of logits, softmax of its rows and columns."""
    scores = x.mean(1) @ other.mean(1).T
    return scores.softmax(-1), scores.softmax(0)


@case(UNTOUCHED, lambda: (hidden(6), hidden(6)))
def soft_alignment(self, x, other):
    """ESIM: one matrix of logits, softmax both ways, each reads the other side."""
    scores = x @ other.transpose(1, 2)
    return scores.softmax(-1) @ other, scores.transpose(1, 2).softmax(-1) @ x


@case(UNTOUCHED, lambda: (torch.randn(2, WIDTH, 4, 4),))
def non_local_block(self, image):
    """Self-attention over pixels, the image cat'ed to what comes out."""
    flat = image.flatten(2)
    seen = (flat.transpose(1, 2) @ flat).softmax(-1) @ flat.transpose(1, 2)
    return torch.cat([image, seen.transpose(1, 2).view_as(image)], 1)


@case(UNTOUCHED, lambda: (hidden(6), past(5)))
def cross_attention_over_a_given_cache(self, x, cache):
    """The encoder's keys and values, handed through unchanged."""
    q, _, _ = self.project(x)
    return self.finish(eager(q, *cache)), cache


@case(UNTOUCHED, prompt)
def graph_attention(self, x):
    """Logits are sums of two vectors, not products of queries and keys."""
    q, k, v = self.project(x)
    k, v = wide(k, v)
    scores = F.leaky_relu(q.sum(-1)[..., None] + k.sum(-1)[..., None, :])
    return self.finish(scores.softmax(-1) @ v)


@case(UNTOUCHED, prompt)
def pooled_by_a_learned_query(self, x):
    """One query that is a weight."""
    _, k, v = self.project(x)
    return attend(self.q.weight[:1].view(1, 1, HEADS, DIM).transpose(1, 2).expand(2, -1, -1, -1), k, v)
