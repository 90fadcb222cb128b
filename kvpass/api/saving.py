"""Compressed caches in files: safetensors with slots and statistics, and JSON that says whose they are.

A file holds numbers and words. Reading it runs no code that it names: nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from kvpass import __version__
from kvpass.api.saved_host import Telling, made, shells_in
from kvpass.api.saved_part import of_this_rank
from kvpass.errors import CacheError, KVPassError, StaleCacheError
from kvpass.model.facade import Facade, uncompiled
from kvpass.runtime.identity import Identity, Origin, by_content
from kvpass.runtime.saved import Unfit, facts_of, restored, tensors_of
from kvpass.runtime.shell import make
from kvpass.runtime.store import SlotStore
from kvpass.runtime.veil import veil

FORMAT = 1
"""Of a file: raise it when older files would be misread."""
_WORDS, _SUM = "kvpass", "kvpass.crc32"
"""Entries of a file's metadata: JSON, and the sum of that text."""
_AGAIN = "run the prompt through the model again"


def save(host: Any, path: str | PathLike[str]) -> None:
    """Write a compressed cache to a safetensors file: it is there whole, or what was there before still is.

    Args:
        host: what the compiled model returned as its cache: one of transformers' caches, or containers of tensors.

    Raises:
        CacheError: the cache holds what cannot be made again from a file (named), no slots, or is stale; or the file
            cannot be written.
    """
    path, telling = Path(path), Telling()
    words = telling.told(host)
    if not telling.stores:
        raise CacheError(
            f"no compressed cache in this {type(host).__name__}",
            hint="save the cache that a kvpass-compiled model returned",
        )
    tensors = {f"{at}.{name}": t for at, store in enumerate(telling.stores) for name, t in tensors_of(store).items()}
    tensors |= {f"dense.{at}": t.clone() for at, t in enumerate(telling.dense)}
    with torch.no_grad():
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(_said(telling, words, {name: _sum(t) for name, t in tensors.items()}))
    with _written(path) as part:
        _safetensors().torch.save_file(tensors, part, {_WORDS: text, _SUM: str(zlib.crc32(text.encode()))})


def load(path: str | PathLike[str], model: Any) -> Any:
    """The cache that `save` wrote, for a model: the same kind of object, on the model's device.

    Args:
        model: what `kvpass.compile` returned, with the policy, budget and weights that the cache was made with.

    Raises:
        CacheError: no such file, another file's format or version, or it is damaged.
        StaleCacheError: another policy, budget or model made it.
    """
    path = Path(path)
    if not issubclass(type(model), Facade):
        raise CacheError(
            f"a cache goes on with a model of kvpass.compile, not with this {type(model).__name__}",
            where=str(path),
            hint="compile the model first: load(path, kvpass.compile(model, policy, budget))",
        )
    with _read(path) as file:
        said = _words(path, file)
        _check_policy(path, said, model.kvpass.policy)
        said = of_this_rank(path, said, model.kvpass.part)
        bare = uncompiled(model)
        origins = _origins(path, said, model.kvpass.policy, list(bare.parameters()))
        try:
            return _rebuilt(said, origins, _tensors(file, said["sums"]), _device(bare))
        except Unfit as error:
            raise _damaged(path, str(error)) from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _said(telling: Telling, host: Any, sums: dict[str, int]) -> dict[str, Any]:
    stores: list[SlotStore] = telling.stores
    origins = list({id(store.origin): store.origin for store in stores}.values())
    first = origins[0]
    return {
        "format": FORMAT,
        "kvpass": __version__,
        "torch": str(torch.__version__),
        "transformers": _transformers() if telling.hf else None,
        "policy": first.policy,
        "budget": first.budget,
        "part": first.part,
        "fingerprint": first.fingerprint,
        "origins": [{"declined": list(one.declined), "model": _told(one)} for one in origins],
        "stores": [
            {**facts_of(s), "origin": next(at for at, o in enumerate(origins) if o is s.origin)} for s in stores
        ],
        "host": host,
        "sums": sums,
    }


def _told(origin: Origin) -> list[list[Any]] | None:
    if origin.model is None:
        return None
    told = origin.model.told()
    if not told:
        raise CacheError(
            "the model's weights do not show their content (quantized, or on the meta device): a file could not say "
            "whose cache it holds",
            hint="copy.deepcopy(cache) keeps it within the process",
        )
    return told


def _check_policy(path: Path, said: Mapping[str, Any], policy: Any) -> None:
    if said["fingerprint"] != policy.fingerprint:
        raise StaleCacheError(
            f"the cache was made under policy {said['policy']}, budget {said['budget']}; the model was compiled with "
            f"policy {policy.name}, budget {policy.asked}"
            + (": other fields differ" if (said["policy"], said["budget"]) == (policy.name, policy.asked) else ""),
            where=str(path),
            hint=f"compile the model with the policy and budget of the file, or {_AGAIN}",
        )


def _origins(path: Path, said: Mapping[str, Any], policy: Any, parameters: list[Any]) -> list[Origin]:
    """The origins of the file's stores, which are of the given model from here on."""
    found, alike = [], by_content(parameters)
    for one in said["origins"]:
        model = None if one["model"] is None else Identity.among(one["model"], alike)
        if isinstance(model, str):
            raise StaleCacheError(
                f"the cache was made by a model with other weights: this one has no parameter like {model}",
                where=str(path),
                hint=f"load it with the model that made it, in the same dtype, or {_AGAIN}",
            )
        found.append(
            Origin(policy.name, policy.asked, tuple(one["declined"]), policy.fingerprint, model, said.get("part", ""))
        )
    return found


def _rebuilt(
    said: Mapping[str, Any], origins: list[Origin], tensors: dict[str, torch.Tensor], device: torch.device | None
) -> Any:
    def there(name: str, home: str | None = None) -> torch.Tensor:
        return tensors[name].to(device or home or "cpu")

    stores: list[SlotStore] = []
    with torch.inference_mode(False), torch.no_grad():
        for at, facts in enumerate(said["stores"]):
            own = {name.removeprefix(f"{at}."): there(name) for name in tensors if name.startswith(f"{at}.")}
            stores.append(restored(facts, own, origins[facts["origin"]]))
        shells = {(at, half): make(stores[at], half) for at, half in dict.fromkeys(shells_in(said["host"]))}
        dense = {at: there(f"dense.{at}") for at in range(sum(name.startswith("dense.") for name in tensors))}
    host = made(
        said["host"],
        lambda at, half: shells[at, half],
        lambda at: dense[at],
        lambda name: device or torch.device(name),
    )
    veil(shells.values())
    return host


def _tensors(file: Any, sums: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The file's tensors, in memory of their own, each of which must be what was saved."""
    if set(file.keys()) != set(sums):
        raise Unfit(f"tensors are missing or too many: {', '.join(sorted(set(file.keys()) ^ set(sums))[:4])}")
    found: dict[str, torch.Tensor] = {}
    for name, total in sums.items():
        found[name] = file.get_tensor(name).clone()
        if _sum(found[name]) != total:
            raise Unfit(f"the bytes of {name} are not those that were saved")
    return found


def _sum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0


def _device(model: torch.nn.Module) -> torch.device | None:
    """Where a model is, if it is in one place."""
    places = {parameter.device for parameter in model.parameters()}
    return places.pop() if len(places) == 1 else None


def _words(path: Path, file: Any) -> dict[str, Any]:
    """What a file says, of a format and a version that this kvpass reads."""
    entries = file.metadata() or {}
    if _WORDS not in entries:
        raise CacheError(f"{path.name} holds no cache of kvpass", where=str(path), hint="Cache.save writes such files")
    text = entries[_WORDS]
    if entries.get(_SUM) != str(zlib.crc32(text.encode())):
        raise _damaged(path, "its description is not the one that was saved")
    said: dict[str, Any] = json.loads(text)
    own = {"format": FORMAT, "kvpass": __version__}
    if said.get("transformers") is not None:
        own["transformers"] = _transformers()
    for what, here in own.items():
        if said.get(what) != here:
            what = "format" if what == "format" else f"version of {what}"
            raise CacheError(
                f"the cache was saved under another {what}: {said.get(what.split()[-1])}, here it is {here}",
                where=str(path),
                hint=f"load it where it was saved, or {_AGAIN}",
            )
    return said


def _transformers() -> str:
    """Release of transformers, without the last number: what its cache objects hold changes between releases."""
    from importlib.metadata import version

    return ".".join(version("transformers").split(".")[:2])


@contextmanager
def _written(path: Path) -> Iterator[str]:
    """A file beside `path` to write, which takes its place when it is whole."""
    part = ""
    try:
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        part = ""
    except (OSError, _safetensors().SafetensorError) as error:
        raise CacheError(
            f"the cache could not be written: {error}",
            where=str(path),
            hint="look for room and rights on that disk; what was there before is untouched, and so is the cache",
        ) from error
    finally:
        if part:
            with suppress(OSError):
                os.unlink(part)


@contextmanager
def _read(path: Path) -> Iterator[Any]:
    st = _safetensors()
    try:
        with st.safe_open(str(path), "pt") as file:
            yield file
    except KVPassError:
        raise
    except OSError as error:
        raise CacheError(
            f"the cache cannot be read: {error}", where=str(path), hint="give the path of a file"
        ) from error
    except (st.SafetensorError, UnicodeError, json.JSONDecodeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, how: str) -> CacheError:
    return CacheError(
        f"{path.name} is no cache that kvpass saved, or it is damaged: {how}",
        where=str(path),
        hint=f"take another copy of the file, or {_AGAIN}",
    )


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CacheError(
            "caches are saved as safetensors, which is not installed", hint="pip install safetensors"
        ) from error
    return safetensors
