"""Strict dict / YAML -> Policy, with errors that name the key and the nearest valid one."""

from __future__ import annotations

import difflib
import json
import reprlib
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvpass.errors import PolicyError
from kvpass.policy.check import check_policy
from kvpass.policy.evicted import Evicted, Merge, Refit, To
from kvpass.policy.layer_keys import numbers_of
from kvpass.policy.limits import plain_number
from kvpass.policy.shorthand import alone, written_out
from kvpass.policy.spec import Allocate, Granule, Observe, Pool, Protect, Spec, Statistic, Store, Weight
from kvpass.policy.yaml_text import check_size, parts_of, read_yaml

PRESETS = Path(__file__).parent / "presets"
_PARTS = {
    "observe": Observe,
    "statistic": Statistic,
    "pool": Pool,
    "granule": Granule,
    "weight": Weight,
    "allocate": Allocate,
    "protect": Protect,
    "evicted": Evicted,
    "evicted.merge": Merge,
    "evicted.refit": Refit,
    "evicted.to": To,
    "store": Store,
}


WHOLE = "whole"
"""In an entry of `layers`: it is laid over nothing, because it extended another policy."""


def names() -> list[str]:
    """Built-in policies."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(policy: str | Path | Spec | dict[str, Any]) -> Spec:
    """See `Policy.load`."""
    if isinstance(policy, Spec):
        check_size(vars(policy), parts_of, "Policy object")
        return _from_dict(policy.to_dict(), where="Policy object")
    if isinstance(policy, dict):
        where = "policy given as a dict"
        check_size(policy, parts_of, where)
        return _from_dict(extended(alone(policy), where, Path()), where)
    if isinstance(policy, str) and not policy.endswith((".yaml", ".yml")):
        return _preset(policy)
    if isinstance(policy, (str, Path)):
        return _file(Path(policy))
    raise PolicyError(
        f"a policy is not a {type(policy).__name__}",
        hint="give a name, a path to a YAML file, a dict or a kvpass.Policy",
    )


@lru_cache(maxsize=64)
def _preset(name: str) -> Spec:
    return _file(PRESETS / f"{_known(name, '')}.yaml")


def _file(path: Path) -> Spec:
    data = alone(read(path))
    base = data.get("extends")
    where = f"{path}, which extends {base}" if isinstance(base, str) else str(path)
    return _from_dict(extended(data, str(path), path.parent, (path.resolve(),)), where)


def read(path: Path) -> dict[str, Any]:
    """The mapping in a policy file, as it stands there; an option that names a file starts at the file's folder.

    Raises:
        PolicyError: as `read_yaml`, or it holds no mapping.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise PolicyError("a policy file holds a mapping", where=str(path), hint="start with `name: my_policy`")
    return _rooted(data, path.parent)


def _rooted(data: dict[str, Any], folder: Path, *, layer: bool = False) -> dict[str, Any]:
    """The data, of a file or of one of its layers, with the files that it names starting at a folder."""
    out = dict(data)
    for key in ("options", "allocate"):
        part = out.get(key)
        if isinstance(part, dict) and part.get("file") and isinstance(part["file"], str):
            out[key] = {**part, "file": str(folder / part["file"])}
    if isinstance(out.get("layers"), dict):
        parts = out["layers"].items()
        out["layers"] = {key: _rooted(p, folder, layer=True) if isinstance(p, dict) else p for key, p in parts}
    if layer and isinstance(out.get("extends"), str) and out["extends"].endswith((".yaml", ".yml")):
        out["extends"] = str(folder / out["extends"])
    return out


def extended(data: dict[str, Any], where: str, folder: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A policy's data with what it extends filled in: mappings are merged key by key, anything else is replaced, and
    null takes a key out. `extends` is a built-in name or a path, relative to `folder`. Names and papers are not
    inherited.

    Raises:
        PolicyError: `extends` is not a name, names nothing, or leads back to itself.
    """
    if "extends" not in data:
        return data
    name, own = data["extends"], {key: value for key, value in data.items() if key != "extends"}
    if not isinstance(name, str):
        raise PolicyError(f"bad value {name!r} in 'extends'", where=where, hint="give a policy's name or a path")
    if name.endswith((".yaml", ".yml")):
        path = folder / name
        if not path.is_file():
            hint = "give a policy's name, or the path of a YAML file; a relative one starts at this file's folder"
            raise PolicyError(f"bad value {name!r} in 'extends': no such file", where=where, hint=hint)
    else:
        path = PRESETS / f"{_known(name, where, field='extends')}.yaml"
    if path.resolve() in chain:
        loop = " -> ".join(p.name for p in (*chain, path))
        raise PolicyError(f"'extends' runs in a circle: {loop}", where=where, hint="let one of them stand alone")
    base = written_out(extended(read(path), str(path), path.parent, (*chain, path.resolve())))
    return merged({k: v for k, v in base.items() if k not in ("name", "paper", "source", "notes")}, own)


def merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`base` with `own` laid over it."""
    out = dict(base)
    for key, value in own.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            out[key] = merged(base[key], value)
        else:
            out[key] = value
    return out


def _known(name: str, where: str, field: str = "") -> str:
    if name not in names():
        near = difflib.get_close_matches(name.lower(), names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PolicyError(
            f"no policy named {name!r}" + (f" in {field!r}" if field else ""),
            where=where,
            hint=f"{hint}built in: {', '.join(names())}; or give a path ending in .yaml",
        )
    return name


def _from_dict(data: dict[str, Any], where: str) -> Spec:
    from pydantic import TypeAdapter, ValidationError

    data = written_out(data)
    if isinstance(data.get("layers"), dict):
        parts = data["layers"].items()
        filled = {k: _alone(p, f"{where}, layers.{k}") if isinstance(p, dict) else p for k, p in parts}
        data = {**data, "layers": filled}
    try:
        text = json.dumps(data, default=_plain)
    except TypeError:
        raise PolicyError("keys of a policy are words", where=where, hint=f"valid: {', '.join(_keys_at([]))}") from None
    try:
        policy = TypeAdapter(Spec).validate_json(text, strict=True)
    except ValidationError as error:
        raise _readable(error.errors(), json.loads(text), where) from None
    check_policy(policy, where)
    variants(policy, where)
    return policy


def _plain(value: Any) -> Any:
    """What JSON can say: numbers of numpy's as numbers, anything else as text."""
    number = plain_number(value)
    return number if number is not value else str(value)


@lru_cache(maxsize=64)
def variants(policy: Spec, where: str = "") -> dict[str, Spec]:
    """The policy of each entry of `layers`, checked.

    Raises:
        PolicyError: a key is no layer, or what it says is no policy.
    """
    out = {}
    for key, own in policy.layers.items():
        numbers_of(key, policy.name)
        out[key] = overridden(policy, own, f"{where or f'policy {policy.name!r}'}, layers.{key}")
        if out[key].allocate.layers != policy.allocate.layers:
            hint = "layers share the budget in one way, or in none: say allocate.layers outside"
            what = f"policy {policy.name!r}: bad value in layers.{key}.allocate.layers"
            raise PolicyError(what, where=where, hint=hint)
        if policy.allocate.layers in ("flat", "preference") and not out[key].keeps_all:
            hint = (
                f"layers that share by data ({policy.allocate.layers!r}) have one list: budget: 1.0 takes a layer out"
            )
            raise PolicyError(f"policy {policy.name!r}: bad value in layers.{key}", where=where, hint=hint)
    return out


def overridden(policy: Spec, own: dict[str, Any], where: str) -> Spec:
    """The policy of a layer: `own`, as a loaded policy holds it, laid over all that `policy` says, or over nothing; the
    budget is the policy's unless `own` says one.

    Raises:
        PolicyError: as for a whole policy.
    """
    fixed = {"name", "layers", "paper", "source", "notes"} & set(own)
    if fixed:
        what, hint = f"unknown key {min(fixed)!r}", "a layer differs in what decides, not in what is for people"
        raise PolicyError(what, where=where, hint=hint)
    data = {"budget": policy.budget, **own} if WHOLE in own else merged(policy.to_dict(), own)
    data.pop(WHOLE, None)
    return _from_dict({**data, "name": policy.name, "layers": {}}, where)


def _alone(own: dict[str, Any], where: str) -> dict[str, Any]:
    """A layer's entry with what it extends filled in, once and for all."""
    if "extends" not in own:
        return own
    whole = extended(own, where, Path())
    if whole.pop("layers", None):
        what, hint = f"{own['extends']!r} tells layers apart itself", "name those layers outside"
        raise PolicyError(f"bad value in 'extends': {what}", where=where, hint=hint)
    return {**whole, WHOLE: True}


def _readable(errors: list[Any], data: Any, where: str) -> PolicyError:
    """The first of pydantic's errors; those of the other members of a union are part of it."""
    error, path = errors[0], _path(errors[0], data)
    key = ".".join(path)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        valid = _keys_at(path[:-1])
        near = difflib.get_close_matches(path[-1], valid, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return PolicyError(f"unknown key {key!r}", where=where, hint=f"{hint}valid here: {', '.join(valid)}")
    if error["type"] in ("missing", "missing_argument"):
        hint = f"add `{path[-1]}:`" + (" (a policy that extends another has its own)" if path == ["name"] else "")
        return PolicyError(f"key {key!r} is missing", where=where, hint=hint)
    wanted = dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in errors if _path(e, data) == path)
    hint = f"give {' or '.join(wanted)}".replace("object", "object (a mapping)").replace("array", "array (a list)")
    value = error["input"]
    if isinstance(value, str) and "number" in hint and _is_number(value):
        hint += "; without quotes, and YAML wants a dot: 1.0e-4, not 1e-4"
    return PolicyError(f"bad value {reprlib.repr(value)} in {key!r}", where=where, hint=hint)


def _path(error: Any, data: Any) -> list[str]:
    """The keys down to an error, without the names that pydantic gives the members of a union."""
    path: list[str] = []
    for part in error["loc"]:
        listed = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if listed or (isinstance(data, dict) and part in data):
            data = data[part]
        elif "missing" not in error["type"]:
            break
        path.append(str(part))
    return path


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _keys_at(path: list[str]) -> list[str]:
    part = _PARTS.get(".".join(path)) or (_PARTS.get(path[0], Spec) if path else Spec)
    return [f.name for f in fields(part)] + (["extends"] if part is Spec else [])
