"""Hosts of decoders with preallocated buffers: the position is an argument, so a host may give any."""

from __future__ import annotations

import torch
from corpus.buffers import ROOM, buffers, up_to, write
from corpus.case import conversation
from models.attention import attend, hidden


def indexed(self, x, at, room=ROOM):
    """gpt-fast."""
    q, k, v = self.project(x)
    write(self, k, v, at)
    return self.finish(attend(q, self.keys, self.values, attn_mask=up_to(at, room)))


def given_mask(self, x, at, mask):
    q, k, v = self.project(x)
    write(self, k, v, at)
    return self.finish(attend(q, self.keys, self.values, attn_mask=mask))


def begin(call, length=5):
    return call(hidden(length), torch.arange(length))


def one(call, position):
    return call(hidden(), torch.tensor([position]))


@conversation(indexed, buffers, quiet=True)
def buffers_well_behaved(call):
    """Positions 0 to 4, then 5, 6, 7."""
    yield begin(call)
    for position in (5, 6, 7):
        yield one(call, position)


@conversation(indexed, buffers, quiet=True)
def a_second_prompt(call):
    """The buffers are used again from position 0: what lies behind is masked."""
    yield begin(call)
    yield one(call, 5)
    yield begin(call, 3)
    yield one(call, 3)
    yield one(call, 4)


@conversation(indexed, buffers)
def one_position_left_out(call):
    """A place that was never written is seen."""
    yield begin(call)
    yield one(call, 6)
    yield one(call, 7)


@conversation(indexed, buffers)
def one_position_written_again(call):
    """A token is replaced: its old key must not be seen."""
    yield begin(call)
    yield one(call, 5)
    yield one(call, 5)
    yield one(call, 6)


@conversation(indexed, buffers)
def rolled_back(call):
    """Speculative decoding: three tokens are tried, two are taken back."""
    yield begin(call)
    yield call(hidden(3), torch.arange(5, 8))
    yield one(call, 6)
    yield one(call, 7)


@conversation(indexed, buffers)
def prompt_begins_later(call):
    """The first call writes at position 3."""
    yield call(hidden(4), torch.arange(3, 7))
    yield one(call, 7)


@conversation(indexed, buffers)
def positions_out_of_order(call):
    """One call writes 2, 0, 1."""
    yield call(hidden(3), torch.tensor([2, 0, 1]))
    yield one(call, 3)


@conversation(indexed, buffers)
def one_position_twice_in_a_call(call):
    """The last of two writes to one place wins."""
    yield call(hidden(3), torch.tensor([0, 1, 1]))
    yield one(call, 2)


def placed(place, room=ROOM):
    """A layer that writes and looks elsewhere than at the position that it is given."""

    def forward(self, x, at):
        q, k, v = self.project(x)
        write(self, k, v, place(at))
        return self.finish(attend(q, self.keys, self.values, attn_mask=up_to(at, room)))

    return forward


def ten(call):
    yield begin(call)
    for position in range(5, 10):
        yield one(call, position)


@conversation(placed(lambda at: at % 8, 8), lambda: buffers(8))
def ring(call):
    """Position modulo length: old tokens are overwritten, in every policy."""
    yield from ten(call)


@conversation(placed(lambda at: at - at[0]), buffers)
def always_the_first_places(call):
    """Each call overwrites the one before."""
    yield from ten(call)


@conversation(placed(lambda at: at + 1), buffers)
def one_place_further(call):
    """The first place is never written, and seen; the newest token is not."""
    yield from ten(call)


@conversation(placed(lambda at: at.flip(0)), buffers)
def written_backwards(call):
    """Tokens of one call in the reverse order."""
    yield from ten(call)


@conversation(placed(lambda at: ((torch.arange(ROOM) * 5) % ROOM)[at]), buffers)
def through_a_table_of_pages(call):
    """Where a token lies is looked up."""
    yield from ten(call)


@conversation(given_mask, buffers)
def mask_of_the_future(call):
    """The mask shows what was not written, and hides what was."""
    yield call(hidden(5), torch.arange(5), up_to(torch.arange(5)))
    yield call(hidden(), torch.tensor([5]), (torch.arange(ROOM) > 5)[None])


@conversation(given_mask, buffers)
def mask_of_ones(call):
    """Everything is seen, written or not."""
    yield call(hidden(5), torch.arange(5), up_to(torch.arange(5)))
    yield call(hidden(), torch.tensor([5]), torch.ones(1, ROOM, dtype=torch.bool))


def remembering(self, x, at, forget=False):
    """A host that clears the buffers reaches them as attributes, so the layer does it here, in a graph of its own."""
    if forget:
        self.keys.zero_()
        self.values.zero_()
        return self.keys.sum()
    return indexed(self, x, at)


@conversation(remembering, buffers)
def cleared_between_two_calls(call):
    """Old keys are zeros from here on, and seen as such."""
    yield begin(call)
    yield call(hidden(), torch.tensor([5]), True)
    yield one(call, 5)


def loaded(self, x, at, prompt_keys=None):
    """Keys from a file are copied in."""
    if prompt_keys is not None:
        self.keys[:, :, :4].copy_(prompt_keys)
        return self.keys.sum()
    return indexed(self, x, at)


@conversation(loaded, buffers)
def a_prompt_loaded_from_elsewhere(call):
    """A prefix is copied into the buffers without an attention."""
    yield begin(call, 4)
    yield call(hidden(), torch.tensor([4]), torch.ones(2, 2, 4, 8))
    yield one(call, 4)


@conversation(indexed, buffers)
def cleared_by_the_host(call):
    """Old keys are zeros from here on, and seen as such; no graph shows it."""
    yield begin(call)
    call.keys.zero_()
    call.values.zero_()
    yield one(call, 5)


@conversation(indexed, buffers)
def restored_by_the_host(call):
    """A prefix is put back from a copy: the next token goes on from there."""
    yield begin(call)
    saved = call.keys.clone(), call.values.clone()
    yield begin(call)
    call.keys.copy_(saved[0])
    call.values.copy_(saved[1])
    yield one(call, 5)


@conversation(indexed, buffers)
def new_buffers_in_the_middle(call):
    """Larger buffers, filled from the old ones."""
    yield begin(call)
    call.keys, call.values = (torch.cat([t, torch.zeros_like(t)], 2) for t in (call.keys, call.values))
    yield call(hidden(), torch.tensor([5]), 2 * ROOM)
