"""The score of keys that the prompt gives when it is read again: until then they have the one of generated tokens."""

from __future__ import annotations

from kvpass.kernels.rank.scored import later
from kvpass.kernels.rank.scorers.registry import scorer
from kvpass.kernels.rank.scorers.seen import Seen
from torch import Tensor


@scorer("replay", reads=("own",))
def replay(seen: Seen, chunk: int = 2000, normed: bool = False, summed: bool = False) -> Tensor:
    """The largest probability that a key gets while the model reads the prompt again behind itself, `chunk` tokens at a
    time (KVzip, arXiv 2505.23416; with observe.replay: repeat). `normed`: times ||v W_O||_2, divided by the norm of the
    query's hidden states (KVzip+). `summed`: the geometric mean of that and of all that a query head gives the key.
    """
    return later(seen.pos)
