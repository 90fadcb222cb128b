"""Which model a compressed cache belongs to: known by the parameters that reach its graphs as inputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import ref

import torch

from kvpass.errors import StaleCacheError

SAMPLE = 32
"""Entries of a parameter that its digest looks at, evenly spread."""
MOST_LAYERS = 512
"""Layers that are remembered to share one graph."""

_UNKNOWN = count()


@dataclass(frozen=True)
class Origin:
    """Where a store comes from: shared by all sites of a graph, and by all copies of a store.

    Attributes:
        budget: as the caller would write it.
        fingerprint: of the policy with its budget.
        model: whose keys and values they are; None where no parameters reach the graph.
        part: which rank's of how many; "" for all heads.
    """

    policy: str
    budget: int | float | str | None
    declined: tuple[dict[str, str], ...] = ()
    fingerprint: str = ""
    model: Identity | None = None
    part: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self


class Identity:
    """The parameters of one call, by their names in the graph: the objects while they live, and digests of them.

    Two calls are of one model if the parameters that both name are the same objects (a model, its twins and equal
    compilations share them; `.to(device)` and merged adapters keep them) or equal in content (a copy, an offloaded or
    a pickled model). A call may name others beside them: an encoder, adapters that are switched on.
    """

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self.objects = {name: ref(tensor) for name, tensor in parameters.items()}
        self.digests = dict(zip(parameters, digests(list(parameters.values())), strict=True))
        self.agreed: Identity | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Identity:
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Objects do not outlive their process; their content may."""
        return {"objects": {}, "digests": self.digests, "agreed": None}

    def told(self) -> list[list[Any]]:
        """Names and digests as plain data, of the parameters that show their content."""
        objects = {name: _alive(self.objects.get(name)) for name in self.digests}  # of a pickled cache none is known
        shown = [name for name, tensor in objects.items() if tensor is None or _shows(tensor)]
        return [[n, list(shape), kind, entries.hex()] for n in shown for shape, kind, entries in (self.digests[n],)]

    @staticmethod
    def among(told: Sequence[Sequence[Any]], parameters: Mapping[Any, deque[torch.Tensor]]) -> Identity | str:
        """The identity that was `told`, of a model whose parameters are given by digest (`by_content`); or the name of
        one that the model has not.
        """
        own = Identity({})
        for name, shape, kind, entries in told:
            digest = tuple(shape), kind, bytes.fromhex(entries)
            alike = parameters.get(digest)
            if not alike:
                return str(name)
            own.digests[name], own.objects[name] = digest, ref(alike[0])
            alike.rotate(-1)  # parameters of equal content come in the model's order
        return own

    def same(self, other: Identity) -> bool:
        """Whether a call with `other`'s parameters goes on with the model of this one."""
        if other is self or other.agreed is self:
            return True
        common = self.digests.keys() & other.digests.keys()
        changed = [name for name in common if not self._shares(name, other)]
        if common and not changed:
            other.agreed = self
            return True
        if not common:  # named in another way, as a module of another one
            ours = {id(tensor) for tensor in map(_alive, self.objects.values()) if tensor is not None}
            return not self.digests or not other.digests or any(id(o()) in ours for o in other.objects.values())
        equal = all(self.digests[name] == digest for name, digest in other.now(changed).items())
        if equal:  # of a pickled cache nobody knows the objects until here
            unknown = [name for name in changed if _alive(self.objects.get(name)) is None]
            self.objects |= {name: other.objects[name] for name in unknown if name in other.objects}
        return equal

    def now(self, names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """Digests of parameters as they are; as they were, where the objects are gone or were never known."""
        found = {name: _alive(self.objects.get(name)) for name in names}
        alive = {name: tensor for name, tensor in found.items() if tensor is not None}
        return {name: self.digests[name] for name in names} | dict(zip(alive, digests([*alive.values()]), strict=True))

    def _shares(self, name: str, other: Identity) -> bool:
        mine, theirs = _alive(self.objects.get(name)), _alive(other.objects.get(name))
        return mine is not None and mine is theirs


class Weights:
    """The parameters among a graph's inputs.

    Args:
        names: of the graph's inputs, in order.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self.places: list[int] | None = None
        self.known: dict[int, tuple[Objects, Identity]] = {}

    def of(self, args: Sequence[Any], fresh: bool) -> Identity | None:
        """Whose parameters a call was given; None if none reach the graph.

        fresh: look at the contents anew, for a cache that begins.
        """
        if self.places is None:
            self.places = [at for at, _ in enumerate(self.names) if isinstance(args[at], torch.nn.Parameter)]
        if not self.places:
            return None
        given = [args[at] for at in self.places]
        known = self.known.get(id(given[0]))  # layers behind graph breaks may share a graph
        if known is None or fresh or not known[0].are(given):
            if len(self.known) >= MOST_LAYERS:  # weights that are brought in anew for each call
                self.known.clear()
            names = (self.names[at] for at in self.places)
            known = self.known[id(given[0])] = Objects(given), Identity(dict(zip(names, given, strict=True)))
        return known[1]


class Objects:
    """Which objects a call was given: known by their ids, which no others have while all of them live."""

    def __init__(self, given: Sequence[Any]) -> None:
        self.gone: list[Any] = []
        self.ids, self.alive = [*map(id, given)], [ref(one, self.gone.append) for one in given]

    def are(self, given: Sequence[Any]) -> bool:
        """Whether these are the very objects, in order."""
        return not self.gone and [*map(id, given)] == self.ids


def by_content(parameters: Sequence[torch.Tensor]) -> dict[Any, deque[torch.Tensor]]:
    """Parameters by their digests, in order."""
    found: dict[Any, deque[torch.Tensor]] = {}
    for digest, tensor in zip(digests(parameters), parameters, strict=True):
        found.setdefault(digest, deque()).append(tensor)
    return found


def _alive(reference: Any) -> Any:
    return reference() if reference is not None else None


def digests(tensors: Sequence[torch.Tensor]) -> list[tuple[Any, ...]]:
    """Shape, dtype and a few entries of each tensor; one synchronisation for each device."""
    with torch.inference_mode(False), torch.no_grad():
        samples = [_sample(tensor) for tensor in tensors]
        devices: dict[torch.device, list[int]] = {}
        for at, sample in enumerate(samples):
            devices.setdefault(sample.device, []).append(at)
        entries = [b""] * len(samples)
        for ats in devices.values():
            read = bytes(torch.cat([samples[at] for at in ats]).tolist())
            for at in ats:
                size = len(samples[at])
                entries[at], read = read[:size], read[size:]
    return [(tuple(t.shape), str(t.dtype), entry) for t, entry in zip(tensors, entries, strict=True)]


def _shows(tensor: torch.Tensor) -> bool:
    """Whether a parameter's data can be read: of one that is parted over ranks, this rank's."""
    return not tensor.is_meta and (type(tensor) is torch.nn.Parameter or hasattr(tensor, "to_local"))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of a few entries, uint8 [n]; of a tensor that does not show its data, some that no other has."""
    if not _shows(tensor):
        return torch.tensor([*next(_UNKNOWN).to_bytes(8, "big"), 0], dtype=torch.uint8)
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8)
    flat = tensor.detach().reshape(-1)
    return flat[:: -(-len(flat) // SAMPLE)].contiguous().view(torch.uint8)


def require_same(made: Origin, called: Origin, where: str) -> None:
    """Refuse a cache that another policy, budget or model made: its slots were chosen by another rule.

    Raises:
        StaleCacheError: who made it, and who was given it.
    """
    other_model = made.model is not None and called.model is not None and not made.model.same(called.model)
    if made.fingerprint == called.fingerprint and made.part == called.part and not other_model:
        return
    weights = "a model with other weights" if other_model else "this model"
    by, to = (f"{one.part}, " if one.part else "" for one in (made, called))
    raise StaleCacheError(
        f"the cache was made by {by}{weights} under policy {made.policy}, budget {made.budget}; it was given to {to}"
        f"policy {called.policy}, budget {called.budget}",
        where=where,
        hint="compile once and keep one compiled model for each cache, or begin from an empty cache",
    )
