"""Preallocated buffers that are no cache of the sequence so far, or not read as one."""

from __future__ import annotations

import torch
from corpus.case import case, eager
from models.attention import DIM, KV_HEADS, attend, hidden, past
from torch import Tensor, nn

UPDATE = "UNSUPPORTED_UPDATE"
ROOM = 16


def buffers(room: int = ROOM, dtype: torch.dtype = torch.float32):
    shape = (2, KV_HEADS, room, DIM)
    return {"keys": nn.Buffer(torch.zeros(shape, dtype=dtype)), "values": nn.Buffer(torch.zeros(shape, dtype=dtype))}


def place() -> tuple[Tensor, Tensor]:
    """One token at position 5."""
    return hidden(), torch.tensor([5])


def up_to(at: Tensor, room: int = ROOM) -> Tensor:
    """[S, room] bool: query at position p sees columns 0 .. p."""
    return torch.arange(room) <= at[:, None]


def written(outcome, args=place, parts=buffers):
    """Register a function of (self, q, k, v, at) that writes and attends."""

    def register(attention):
        def forward(self, x, at):
            return self.finish(attention(self, *self.project(x), at))

        forward.__name__, forward.__doc__ = attention.__name__, attention.__doc__
        return case(outcome, args, parts)(forward)

    return register


def write(self, k, v, at):
    self.keys[:, :, at] = k
    self.values[:, :, at] = v


@written(UPDATE)
def read_before_it_is_written(self, q, k, v, at):
    """The new token does not see itself."""
    y = attend(q, self.keys.clone(), self.values.clone(), attn_mask=up_to(at - 1))
    write(self, k, v, at)
    return y


@written(UPDATE)
def written_after_the_attention(self, q, k, v, at):
    """The same without a copy: the buffer is read as it was."""
    y = attend(q, self.keys, self.values, attn_mask=up_to(at - 1))
    write(self, k, v, at)
    return y


@written("MASK_UNKNOWN")
def nothing_is_masked(self, q, k, v, at):
    """Places that were never written take part with logit 0."""
    write(self, k, v, at)
    return attend(q, self.keys, self.values)


@written("KEY_VALUE_MISMATCH")
def values_one_place_later(self, q, k, v, at):
    """Keys and values of a token lie at different places."""
    self.keys[:, :, at] = k
    self.values[:, :, at + 1] = v
    return attend(q, self.keys, self.values, attn_mask=up_to(at))


@written(UPDATE)
def rows_at_their_own_places(self, q, k, v, at):
    """scatter_ with another position in each row."""
    index = (at + torch.arange(2)[:, None])[:, None, :, None].expand_as(k)
    self.keys.scatter_(2, index, k)
    self.values.scatter_(2, index, v)
    return attend(q, self.keys, self.values, attn_mask=up_to(at))


@written(UPDATE)
def added_up(self, q, k, v, at):
    """Places are added to, not written."""
    self.keys.index_add_(2, at, k)
    self.values.index_add_(2, at, v)
    return attend(q, self.keys, self.values, attn_mask=up_to(at))


@written("KEY_ESCAPES")
def old_and_new_blended(self, q, k, v, at):
    """What was there before goes into what is written."""
    write(self, self.keys[:, :, at] * 0.5 + k, self.values[:, :, at] * 0.5 + v, at)
    return attend(q, self.keys, self.values, attn_mask=up_to(at))


@written(UPDATE)
def written_twice(self, q, k, v, at):
    """A token and its shadow."""
    write(self, k, v, at)
    write(self, -k, v, at + 1)
    return attend(q, self.keys, self.values, attn_mask=up_to(at + 1))


@written("KEY_ESCAPES")
def cleared_first(self, q, k, v, at):
    """Nothing is kept from call to call."""
    self.keys.zero_()
    self.values.zero_()
    write(self, k, v, at)
    return attend(q, self.keys, self.values, attn_mask=up_to(at))


@written("KEY_ESCAPES")
def moved_along(self, q, k, v, at):
    """A window that is shifted by hand."""
    self.keys.copy_(self.keys.roll(-1, 2))
    self.values.copy_(self.values.roll(-1, 2))
    write(self, k, v, torch.tensor([ROOM - 1]))
    return attend(q, self.keys, self.values, attn_mask=up_to(at).flip(1))


@written(UPDATE)
def one_row_written(self, q, k, v, at):
    """The other row keeps what it had."""
    self.keys[:1, :, at] = k[:1]
    self.values[:1, :, at] = v[:1]
    return attend(q, self.keys, self.values, attn_mask=up_to(at))


@written(UPDATE)
def one_head_for_all(self, q, k, v, at):
    """The write broadcasts: the buffer holds more than was given."""
    self.keys[:, :, at] = k[:, :1]
    self.values[:, :, at] = v[:, :1]
    return attend(q, self.keys, self.values, attn_mask=up_to(at))


@written(UPDATE)
def written_by_a_boolean_mask(self, q, k, v, at):
    """Places are chosen by a condition."""
    hot = (torch.arange(ROOM) == at)[None, None, :, None]
    self.keys.copy_(torch.where(hot, k, self.keys))
    self.values.copy_(torch.where(hot, v, self.values))
    return attend(q, self.keys, self.values, attn_mask=up_to(at))


@written("UNSUPPORTED_ATTENTION")
def only_the_last_four_places(self, q, k, v, at):
    """A window of a longer buffer."""
    write(self, k, v, at)
    return attend(q, self.keys[:, :, 2:6], self.values[:, :, 2:6])


@written("UNSUPPORTED_ATTENTION")
def read_up_to_the_new_token(self, q, k, v, at):
    """The slice ends before what was just written."""
    self.keys[:, :, 5:6] = k
    self.values[:, :, 5:6] = v
    return eager(q, self.keys[:, :, :5], self.values[:, :, :5])


@written(UPDATE)
def keys_in_one_place_values_in_another(self, q, k, v, at):
    """Keys and values of a longer buffer, eight places apart."""
    self.keys[:, :, at] = k
    self.keys[:, :, at + 8] = v
    return attend(q, self.keys[:, :, :8], self.keys[:, :, 8:], attn_mask=up_to(at, 8))


@written("KEY_ESCAPES")
def also_averaged(self, q, k, v, at):
    """Somebody else reads the buffer."""
    write(self, k, v, at)
    return attend(q, self.keys, self.values, attn_mask=up_to(at)) + self.keys.mean()


@written(UPDATE)
def new_keys_cleared_after_the_write(self, q, k, v, at):
    """The buffer took a copy of them."""
    write(self, k, v, at)
    k.zero_()
    return attend(q, self.keys, self.values, attn_mask=up_to(at))


@written("SHARED_CACHE")
def two_attentions_read_a_buffer(self, q, k, v, at):
    """Queries of two kinds over one buffer."""
    write(self, k, v, at)
    mask = up_to(at)
    other = attend(q.flip(1), self.keys, self.values, attn_mask=mask)
    return attend(q, self.keys, self.values, attn_mask=mask) - other


@written("DTYPE", parts=lambda: buffers(dtype=torch.int8))
def eight_bit_buffer(self, q, k, v, at):
    """Quantised where it is stored."""
    write(self, (k * 16).to(torch.int8), (v * 16).to(torch.int8), at)
    return attend(q, self.keys.float() / 16, self.values.float() / 16, attn_mask=up_to(at))


@case("KEY_VALUE_MISMATCH", lambda: (*place(), past()[1]), buffers)
def keys_in_a_buffer_values_in_a_cat(self, x, at, old):
    """Two ways to cache in one attention."""
    q, k, v = self.project(x)
    self.keys[:, :, at] = k
    v = torch.cat([old, v], 2)
    return self.finish(attend(q, self.keys[:, :, :6], v)), v
