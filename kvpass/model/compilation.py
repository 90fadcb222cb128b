"""One compiled model: its facades, the graphs behind them, and what must hold when a call ends."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from kvpass.errors import CacheError, NothingRewritten
from kvpass.model.dynamo import isolated, limits
from kvpass.model.facade import Facade, facade_of
from kvpass.model.hooks import Hooks
from kvpass.model.one_by_one import one_by_one
from kvpass.model.turns import Turns
from kvpass.pipeline.compose import Backend
from kvpass.policy.load import variants
from kvpass.runtime.active import current
from kvpass.runtime.breaks import told
from kvpass.runtime.drafts import opened_for
from kvpass.runtime.host_state import HostState
from kvpass.runtime.replaying import replaying
from kvpass.runtime.store import SlotStore
from kvpass.runtime.watch import Call, Found, tensors


class Compilation:
    """Runs calls of a model's modules under a backend.

    Attributes:
        model: the module that was compiled; shared with whoever has it.
        root: its facade: what `kvpass.compile` returns.
        replays: the policy waits for calls' tokens to be fed again.
        compiled: runs calls of it, `without_hooks` those of a model that has none.
        state: attributes that calls change, where the compiled model has values of its own.
        stores: those that buffers of the caller's stand for, of its calls, while they live.
    """

    def __init__(self, model: torch.nn.Module, backend: Backend) -> None:
        self.model, self.backend = model, backend
        self.state, self.turns = HostState(model), Turns(model)
        self.hooks = Hooks(model)
        self.compiled, self.without_hooks = isolated(backend), isolated(backend, self.hooks)
        self.replays = any(one.replays for one in (backend.policy, *variants(backend.policy).values()))
        self._facades: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._hosted: list[weakref.ref[torch.Tensor]] = []
        self.stores: weakref.WeakSet[SlotStore] = weakref.WeakSet()
        self._said = False

    @property
    def root(self) -> Any:
        return self.facade(self.model)

    def facade(self, real: torch.nn.Module) -> Any:
        """The facade of a module, always the same one while somebody holds it."""
        if issubclass(type(real), Facade):
            return real
        result = self._facades.get(id(real))
        if result is None:
            result = self._facades[id(real)] = facade_of(real, self)
        return result

    def again(self, model: torch.nn.Module) -> Any:
        """A copy of the model, compiled likewise."""
        return Compilation(model, replace(self.backend, graphs=type(self.backend.graphs)())).root

    def reduced(self, real: torch.nn.Module) -> tuple[Any, ...]:
        """How pickle makes the facade of a module again: a compilation of its own."""
        return _restored, (real, self.backend)

    def run(self, module: torch.nn.Module, function: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
        """Call a module compiled, and check what became of the caches. Other threads wait.

        Args:
            function: what to call, and its first arguments: a method of the module, and the module.

        Raises:
            KVPassError: what `Call.compare` and Dynamo's limit say, and whatever the graphs raise.
        """
        outer = current()
        if outer is not None and outer.owner is self:
            return self.compiled(*function, *args, **kwargs)
        block = opened_for(self)
        if block is not None:
            return one_by_one(block, module, lambda *a, **k: self.run(module, function, a, k), args, kwargs)
        with self.turns.taken():
            result = self._run(module, function, args, kwargs)
            if self.replays and replaying() is None:
                from kvpass.model.replay import after_call

                after_call(lambda **more: self._run(module, function, (), more), module, args, kwargs, result)
            return result

    def _run(self, module: torch.nn.Module, function: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
        """The outermost call of this thread, while no other thread is in one."""
        call = Call(self, module is self.model, self._hosted)
        result, first = None, self.state.first is not None
        error: BaseException | None = None
        with self.state.swapped():
            try:
                result = self._watched(call, function, args, kwargs)
            except BaseException as raised:  # an interrupt too leaves the model's attributes as they were
                error = raised
        alien = self.state.disown() if error is not None and first else []
        alien += self.state.learn(call.before) if call.before is not None else []
        if alien and not _stops(error):  # calls of the model itself had left their state where this one began
            _refuse_objects(args, kwargs, alien)
            return self._run(module, function, args, kwargs)
        if error is not None:
            raise error
        return result

    def __str__(self) -> str:
        return f"{type(self.model).__name__} compiled with {self.backend.policy.name} {self.backend.policy.asked}"

    def _watched(self, call: Call, function: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
        strict = self.backend.strict
        call.begin(args, kwargs, list(self._kept()) if strict else [])
        try:
            with limits():
                compiled = self.compiled if self.hooks.any() else self.without_hooks
                result = compiled(*function, *args, **kwargs)
            after = call.compare(args, kwargs, result, list(self._kept(new=not call.graphs)) if strict else [])
        finally:
            call.end()
        self._hosted = [weakref.ref(t) for t in call.made if id(t) not in call.reached]
        if not self._said and (call.whole or call.reached or any(one.pair for one in after)):
            self._said = True
            self._say_if_idle(told(call.breaks))
        return result

    def _kept(self, new: bool = False) -> Iterator[Found]:
        """Tensors in the attributes that calls change; with `new`, in others too that have changed since compile. Only
        a strict compilation asks.
        """
        for name, value in self.state.changing(new):
            yield from tensors(value, (name,))

    def _say_if_idle(self, broken: str) -> None:
        """Once: this model has run, and nothing of it is rewritten."""
        tables = [record.table for record in self.backend.graphs]
        if any(table.sites for table in tables):
            return
        declined = {d.site: d for table in tables for d in table.declined}
        kinds = dict.fromkeys(d.reason.hint for d in declined.values())
        why = "; ".join(kinds) or "it sees no attention with a KV cache (with use_cache=True, where there is one)"
        why += f"; {broken}" if broken else ""
        warnings.warn(
            f"kvpass rewrites nothing in this {type(self.model).__name__}: {why}", NothingRewritten, stacklevel=8
        )


def _stops(error: BaseException | None) -> bool:
    """Whether it is an interrupt, after which nothing is tried again."""
    return error is not None and not isinstance(error, Exception)


def _restored(real: torch.nn.Module, backend: Any) -> Any:
    return Compilation(real, backend).root


def _refuse_objects(args: Any, kwargs: Any, alien: list[tuple[int, str]]) -> None:
    """A call can be made again only if it did not change what it was given."""
    if any(len(one.path) > 2 for one in tensors((args, kwargs))):
        names = ", ".join(sorted({name for _, name in alien}))
        raise CacheError(
            f"the model keeps state in its attributes ({names}), which was changed after kvpass.compile",
            hint="call kvpass.compile again, or reset the model's state before the first call",
        )
