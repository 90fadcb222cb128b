"""What is given to `compile`, `backend`, `explain` and `rewrite`, checked at once: what it is, and what is valid."""

from __future__ import annotations

import difflib
import os
import reprlib
from typing import TYPE_CHECKING, Any

import torch

from kvpass.errors import ModelError, PolicyError, TrainingError

if TYPE_CHECKING:
    from kvpass.patterns import PatternSet


def check_model(model: Any, call: str) -> None:
    """A model that can be called.

    call: the function that was given it, for the message.

    Raises:
        ModelError: it is no `torch.nn.Module`, or one that Dynamo cannot read.
    """
    if not isinstance(model, torch.nn.Module):
        what = f"a model is a torch.nn.Module, not {described(model)}"
        raise ModelError(what, where=call, hint=_instead(model, call))
    if isinstance(model, torch.jit.ScriptModule):
        hint = "give the module that was scripted or traced"
        raise ModelError("TorchScript has no Python code for torch.compile to read", where=call, hint=hint)


def check_ready(model: torch.nn.Module, call: str, strict: bool) -> None:
    """A model that can be compiled as it is.

    Raises:
        TrainingError: all of it is in train mode. (A part may be: adapters come so, around a model in eval mode.)
        ModelError: under `strict`, hooks of accelerate on its parts: Dynamo does not trace them, so the graph breaks.
    """
    if all(part.training for part in model.modules()):
        what = f"the model is in train mode ({type(model).__name__}.training is True)"
        raise TrainingError(what, where=call, hint="call model.eval() first: an evicting cache has no gradients")
    hooked = [(name, part._hf_hook) for name, part in model.named_modules() if name and hasattr(part, "_hf_hook")]
    if strict and hooked:
        (name, hook), more = hooked[0], f" and {len(hooked) - 1} more modules" if len(hooked) > 1 else ""
        what = f"accelerate's hooks on {name!r}{more} ({type(hook).__name__}) break the graph before and after each"
        hint = "load the model whole onto one device, without offloading: device_map={'': device}; if its weights are "
        hint += "on one device already, accelerate.hooks.remove_hook_from_submodules(model) takes the hooks away"
        raise ModelError(what, where=call, hint=hint)


def described(value: Any) -> str:
    """What a value is, for people: short."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (str, bytes, bool, int, float)):
        return f"{reprlib.repr(value)} ({type(value).__name__})"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    return f"a {type(value).__name__}"


def _instead(given: Any, call: str) -> str:
    """What to give in place of what is no model."""
    inside = getattr(given, "model", None)
    if isinstance(given, type):
        named = f"{given.__name__}(..)"
        return f"make an instance, {call}({named}.eval(), ..)"
    if isinstance(inside, torch.nn.Module):  # a pipeline, a trainer
        return f"it holds a model: x.model = {call}(x.model, ..)"
    if isinstance(given, (str, os.PathLike)):
        return f"load it first: {call}(AutoModelForCausalLM.from_pretrained({str(given)!r}), ..)"
    if isinstance(given, torch.export.ExportedProgram):
        return "kvpass.rewrite takes an exported decode step"
    if callable(given):
        return "torch.compile(function, backend=kvpass.backend(..)) takes a function"
    return "give a model, e.g. AutoModelForCausalLM.from_pretrained(name)"


def check_program(program: Any) -> None:
    """An exported decode step.

    Raises:
        ModelError: it is neither an ExportedProgram nor a GraphModule.
    """
    if isinstance(program, (torch.export.ExportedProgram, torch.fx.GraphModule)):
        return
    hint = "export a decode step: torch.export.export(model, (one_token, past), dynamic_shapes=..) (docs/export.md)"
    if isinstance(program, torch.nn.Module):
        hint += ", or kvpass.compile(model, ..) for a model that Python calls"
    what = f"a program is an ExportedProgram or a GraphModule, not {described(program)}"
    raise ModelError(what, where="kvpass.rewrite", hint=hint)


def check_options(**given: Any) -> None:
    """Options that are no policy: `mode`, `debug`, and those that are True or False.

    Raises:
        PolicyError: naming the option, what was given, and what is valid.
    """
    for name, value in given.items():
        if name in _WORDS:
            _check_word(name, value)
        elif name == "debug":
            if not (value is None or isinstance(value, (bool, str, os.PathLike))):
                raise _bad(name, value, "a folder, True, False, or None for what KVPASS_DEBUG says")
        elif not isinstance(value, bool):
            raise _bad(name, value, "True or False")


MODES = ("default", "reduce-overhead")

_WORDS = {"mode": ("mode", MODES)}
"""Options that are one of a few words: what they are called, and the words."""


def _check_word(name: str, given: Any) -> None:
    what, words = _WORDS[name]
    if isinstance(given, str) and given in words:
        return
    near = difflib.get_close_matches(str(given).lower(), words, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise PolicyError(f"no {what} {described(given)}", where=f"{name}=", hint=f"{hint}one of {', '.join(words)}")


def _bad(name: str, value: Any, valid: str) -> PolicyError:
    return PolicyError(f"bad value {described(value)} in {name!r}", where=f"{name}=", hint=f"give {valid}")


def checked_patterns(patterns: Any) -> PatternSet | None:
    """A pattern set; None for one that equals the default one, so that both spellings give equal backends.

    Raises:
        PolicyError: it is none.
    """
    if patterns is None:
        return None
    from kvpass.patterns import DEFAULT, PatternSet

    if not isinstance(patterns, PatternSet):
        hint = "kvpass.patterns.DEFAULT.extended(cores=[MyCore()])"
        raise PolicyError(f"no pattern set: {patterns!r}", where="patterns=", hint=hint)
    return None if patterns == DEFAULT else patterns
