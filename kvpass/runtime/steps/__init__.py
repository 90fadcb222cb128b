"""What is done around a compiled call, a file for each feature, and the order in which it runs.

To add one: a file with a `Step` (or a `SharedInput`, which an op then takes in `kvpass/lowering/emit.py`), and a name
below.
"""

from __future__ import annotations

from kvpass.runtime.step import SharedInput, Step
from kvpass.runtime.steps.await_replay import AwaitReplay, CheckReplay
from kvpass.runtime.steps.buffer_position import POSITION
from kvpass.runtime.steps.caller_marks import MARKS, CheckMarks
from kvpass.runtime.steps.evict_waiting import EvictWaiting
from kvpass.runtime.steps.free_slots import FreeSlots
from kvpass.runtime.steps.repeated_tokens import REPEATED
from kvpass.runtime.steps.share_slots import ShareSlots
from kvpass.runtime.steps.turn_keys import TurnKeys

STEPS: tuple[Step, ...] = (
    CheckMarks(),
    CheckReplay(),
    ShareSlots(),
    AwaitReplay(),
    FreeSlots(),
    EvictWaiting(),
    TurnKeys(),
)
"""In the order in which those of one moment run."""

INPUTS: tuple[SharedInput, ...] = (POSITION, MARKS, REPEATED)
"""In the order in which the graph takes them."""
