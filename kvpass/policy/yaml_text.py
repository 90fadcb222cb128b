"""The text of a policy file -> plain data, within limits that are counted before anything is built.

YAML can say much in few bytes: aliases of aliases of lists, tags that make objects. A policy file needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from kvpass.errors import PolicyError

MOST_BYTES = 1 << 18
MOST_VALUES = 10_000
MOST_DEPTH = 20
"""What a policy may hold: bytes of its file; values, aliases written out; mappings and lists inside of each other."""

_PLAIN = "tag:yaml.org,2002:"
_TAGS = frozenset(_PLAIN + kind for kind in ("str", "int", "float", "bool", "null", "map", "seq"))
_SEE = "see docs/policy-files.md for an example"

T = TypeVar("T")


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        PolicyError: it cannot be read, is no YAML, holds a key twice or a tag, or is too large.
    """
    import yaml

    text = _text(path)
    try:
        _check_tags(text)
        loader = _loader()(text)
        node = loader.get_single_node()
        check_size(node, _below, str(path))
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = " ".join(str(error).split())
        hint = f"indent with spaces; {_SEE}" if "'\\t'" in what else _SEE
        raise PolicyError(f"not valid YAML: {what}", where=str(path), hint=hint) from None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        what = f"cannot read the policy file: {getattr(error, 'strerror', error)}"
        raise PolicyError(what, where=str(path), hint="give an existing YAML file") from None
    if len(data) > MOST_BYTES:
        hint = "a policy is a few lines; tensors belong into a file of their own (options.file)"
        raise PolicyError(f"a policy file holds at most {MOST_BYTES} bytes", where=str(path), hint=hint)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"not valid YAML: not UTF-8 text: byte {data[error.start]:#04x} at {error.start}"
        raise PolicyError(what, where=str(path), hint="save the file as UTF-8") from None


def _check_tags(text: str) -> None:
    """Refuse tags and nesting while the text is read event by event: nothing is built, nothing recurses.

    Raises:
        yaml.YAMLError: naming what is wrong and its line.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=_loader()):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _TAGS:
            shown = tag.replace(_PLAIN, "!!")
            raise yaml.YAMLError(f"the tag {shown} in line {line}: policies hold plain values only")
        opens = isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent))
        depth += opens - isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent))
        if depth > MOST_DEPTH:
            raise yaml.YAMLError(f"more than {MOST_DEPTH} mappings and lists inside of each other in line {line}")


def _below(node: Any) -> Iterable[Any]:
    """The nodes that a node of YAML holds, keys too."""
    if isinstance(node.value if node is not None else None, list):
        for part in node.value:
            yield from part if isinstance(part, tuple) else (part,)


def parts_of(value: Any) -> Iterable[Any]:
    """The values that plain data holds, without the keys."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def check_size(whole: T, parts: Callable[[T], Iterable[T]], where: str) -> None:
    """Count the values of data with shared parts as if each were written out, visiting each part once.

    Raises:
        PolicyError: a value holds itself, or there are too many, or they are nested too deep.
    """
    counts: dict[int, tuple[int, int]] = {}
    open_: set[int] = set()
    stack: list[tuple[T, bool]] = [(whole, False)]
    while stack:
        value, done = stack.pop()
        key = id(value)
        if done:
            open_.discard(key)
            inner = [counts[id(part)] for part in parts(value)]
            counts[key] = 1 + sum(n for n, _ in inner), 1 + max((deep for _, deep in inner), default=-1)
        elif key in open_:
            what = "a policy cannot hold itself"
            raise PolicyError(what, where=where, hint="write the values out, without YAML's & and *")
        elif key not in counts:
            if any(True for _ in parts(value)):
                open_.add(key)
            stack.append((value, True))
            stack += [(part, False) for part in parts(value)]
    values, depth = counts[id(whole)]
    if values > MOST_VALUES:
        what = f"a policy holds at most {MOST_VALUES} values, not {values if values < 1e9 else 'billions'}"
        raise PolicyError(what, where=where, hint="write out what is meant; aliases (*) count wherever they stand")
    if depth > MOST_DEPTH:
        what = f"more than {MOST_DEPTH} mappings and lists inside of each other"
        raise PolicyError(what, where=where, hint="a policy's fields are at most four deep")


@lru_cache(maxsize=1)
def _loader() -> Any:
    """A safe loader of YAML that refuses a mapping with a key twice, where PyYAML takes the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            first: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                word = key.value if isinstance(key, yaml.ScalarNode) else ""
                if word and word in first:
                    raise yaml.YAMLError(f"key {word!r} is there twice, in lines {first[word]} and {line}; leave one")
                first[word] = line
            return super().construct_mapping(node, deep)

    return Loader
