"""Strict dict / YAML -> Policy, with errors that name the key and the nearest valid one."""

from __future__ import annotations

import difflib
import json
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvpass.errors import PolicyError
from kvpass.policy.check import check_policy
from kvpass.policy.spec import Allocate, Granule, Observe, Policy, Pool, Protect, Statistic, Weight

PRESETS = Path(__file__).parent / "presets"
_PARTS = {
    "observe": Observe,
    "statistic": Statistic,
    "pool": Pool,
    "granule": Granule,
    "weight": Weight,
    "allocate": Allocate,
    "protect": Protect,
}


def names() -> list[str]:
    """Built-in policies."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(policy: str | Path | Policy | dict[str, Any]) -> Policy:
    """See `Policy.load`."""
    if isinstance(policy, Policy):
        return _from_dict(policy.to_dict(), where="Policy object")
    if isinstance(policy, dict):
        where = "policy given as a dict"
        return _from_dict(extended(policy, where, Path()), where)
    if isinstance(policy, str) and not policy.endswith((".yaml", ".yml")):
        return _preset(policy)
    if isinstance(policy, (str, Path)):
        return _file(Path(policy))
    raise PolicyError(
        f"a policy is not a {type(policy).__name__}",
        hint="give a name, a path to a YAML file, a dict or a kvpass.Policy",
    )


@lru_cache(maxsize=64)
def _preset(name: str) -> Policy:
    return _file(PRESETS / f"{_known(name, '')}.yaml")


def _file(path: Path) -> Policy:
    return _from_dict(_with_files(extended(read(path), str(path), path.parent, (path.resolve(),)), path), str(path))


def _with_files(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Options that name a file, relative to the folder of the policy file."""
    options = data.get("options")
    if isinstance(options, dict) and isinstance(options.get("file"), str):
        return {**data, "options": {**options, "file": str(path.parent / options["file"])}}
    return data


def read(path: Path) -> dict[str, Any]:
    """The mapping in a policy file, as it stands there.

    Raises:
        PolicyError: no such file, no YAML, no mapping.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(
            f"cannot read the policy file: {error.strerror}", where=str(path), hint="give an existing YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyError(
            f"not valid YAML: {error}", where=str(path), hint="see docs/policies.md for an example"
        ) from None
    if not isinstance(data, dict):
        raise PolicyError("a policy file holds a mapping", where=str(path), hint="start with `name: my_policy`")
    return data


def extended(data: dict[str, Any], where: str, folder: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A policy's data with what it extends filled in: mappings are merged key by key, anything else is replaced, and
    null takes a key out. `extends` is a built-in name or a path, relative to `folder`.

    Raises:
        PolicyError: `extends` is not a name, names nothing, or leads back to itself.
    """
    if "extends" not in data:
        return data
    name, own = data["extends"], {key: value for key, value in data.items() if key != "extends"}
    if not isinstance(name, str):
        raise PolicyError(f"bad value {name!r} in 'extends'", where=where, hint="give a policy's name or a path")
    path = folder / name if name.endswith((".yaml", ".yml")) else PRESETS / f"{_known(name, where)}.yaml"
    if path.resolve() in chain:
        loop = " -> ".join(p.name for p in (*chain, path))
        raise PolicyError(f"'extends' runs in a circle: {loop}", where=where, hint="let one of them stand alone")
    base = extended(read(path), str(path), path.parent, (*chain, path.resolve()))
    return merged(_with_files({k: v for k, v in base.items() if k not in ("paper", "source", "notes")}, path), own)


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


def _known(name: str, where: str) -> str:
    if name not in names():
        near = difflib.get_close_matches(name.lower(), names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PolicyError(
            f"no policy named {name!r}",
            where=where,
            hint=f"{hint}built in: {', '.join(names())}; or give a path ending in .yaml",
        )
    return name


def _from_dict(data: dict[str, Any], where: str) -> Policy:
    from pydantic import TypeAdapter, ValidationError

    try:
        policy = TypeAdapter(Policy).validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise _readable(error.errors()[0], where) from None
    except TypeError:
        raise PolicyError("keys of a policy are words", where=where, hint=f"valid: {', '.join(_keys_at([]))}") from None
    check_policy(policy, where)
    return policy


def _readable(error: Any, where: str) -> PolicyError:
    path = [
        str(part) for part in error["loc"] if str(part) not in ("int", "float") and not str(part).startswith("literal")
    ]
    key = ".".join(path)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        valid = _keys_at(path[:-1])
        near = difflib.get_close_matches(path[-1], valid, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return PolicyError(f"unknown key {key!r}", where=where, hint=f"{hint}valid here: {', '.join(valid)}")
    if error["type"] in ("missing", "missing_argument"):
        return PolicyError(f"key {key!r} is missing", where=where, hint=f"add `{path[-1]}:`")
    return PolicyError(f"bad value {error['input']!r} in {key!r}", where=where, hint=str(error["msg"]))


def _keys_at(path: list[str]) -> list[str]:
    part = _PARTS.get(path[0], Policy) if path else Policy
    return [f.name for f in fields(part)] if is_dataclass(part) else []
