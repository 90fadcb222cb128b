"""JSON Schema of policy files: pydantic's, of the dataclasses in spec.py, with what their docstrings say."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from kvpass.kernels.codecs.registry import CODECS, DENSE
from kvpass.kernels.rank.criterion import SCORES
from kvpass.kernels.rank.scorers.registry import Scorer, scorers
from kvpass.policy import evicted, spec

Schema = dict[str, Any]
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}
_EXTENDS = (
    "A built-in policy's name, or the path of another policy file, relative to this one. Its fields are filled in: "
    "mappings key by key, anything else whole; null takes a key out. Name, paper, source and notes are not inherited."
)


def json_schema() -> Schema:
    """Draft 2020-12. It knows names, types and choices; what depends on other fields only the loader knows."""
    from pydantic import TypeAdapter

    whole: Schema = TypeAdapter(spec.Spec).json_schema()
    _describe(whole, spec.Spec)
    for name, part in whole["$defs"].items():
        _describe(part, _kind(name))
        part["properties"] = {key: _or_null(value) for key, value in part["properties"].items()}
    fields: Schema = whole["properties"]
    for value in fields.values():
        parts = re.findall(r"#/\$defs/(\w+)", json.dumps(value))
        if parts and "description" not in value:
            value["description"] = _about(_kind(parts[0]))[0]
    own = [scorer for scorer in scorers().values() if scorer.run.__module__.startswith("kvpass.")]
    names = [*SCORES, *(scorer.name for scorer in own)]
    fields["score"] = {**fields["score"], "anyOf": [{"enum": names}, {"type": "string"}]}
    fields["budget"] = {**fields["budget"], "anyOf": [*fields["budget"]["anyOf"], {"type": "string", "pattern": "%"}]}
    held = [DENSE, *CODECS]
    for half in ("k", "v"):
        for part in ("Store", "To"):
            whole["$defs"][part]["properties"][half]["enum"] = [*held, None]
    fields["store"] = {**fields["store"], "anyOf": [{"$ref": "#/$defs/Store"}, {"enum": held}]}
    to = whole["$defs"]["Evicted"]["properties"]["to"]
    to["anyOf"] = [*to["anyOf"], {"enum": [*CODECS]}]
    exits = {"enum": ["drop", "merge", "refit"]}
    fields["evicted"] = {**fields["evicted"], "anyOf": [{"$ref": "#/$defs/Evicted"}, exits]}
    for short in ("store", "evicted"):
        fields[short].pop("$ref", None)
    rest = {key: _or_null(value) for key, value in fields.items() if key != "name"}
    extends = {"type": "string", "description": _EXTENDS}
    whole["properties"] = {"name": fields["name"], "extends": extends, **rest}
    whole["allOf"] = [_options_of(scorer) for scorer in own]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "kvpass policy"}
    return {**head, **{key: value for key, value in whole.items() if key not in head}}


def schema_text() -> str:
    """What `docs/policy.schema.json` holds."""
    return json.dumps(json_schema(), indent=1) + "\n"


def attributes(kind: type) -> dict[str, str]:
    """The fields that a dataclass' docstring describes, and what it says of each."""
    return _about(kind)[1]


def _kind(name: str) -> type:
    """The dataclass of a part."""
    found: type = getattr(spec, name, None) or getattr(evicted, name)
    return found


def _about(kind: type) -> tuple[str, dict[str, str]]:
    text, _, listed = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")
    found: dict[str, str] = {}
    for names, said in re.findall(r"^    (\w[\w, ]*): ((?:.+(?:\n {8,}.+)*))", listed, re.MULTILINE):
        found |= {name: " ".join(said.split()) for name in names.split(", ")}
    return " ".join(text.split()), found


def _describe(part: Schema, kind: type) -> None:
    """The docstring's sentences, each where it belongs."""
    part["description"], said = _about(kind)
    part.pop("title", None)
    for name, value in part["properties"].items():
        value.pop("title", None)
        if name in said:
            value["description"] = said[name]


def _or_null(value: Schema) -> Schema:
    """Null too: a file that extends another takes a key out with it."""
    if "$ref" in value:
        kept = {key: said for key, said in value.items() if key != "$ref"}
        return {"anyOf": [{"$ref": value["$ref"]}, {"type": "null"}], **kept}
    if "anyOf" in value:
        others = [choice for choice in value["anyOf"] if choice != {"type": "null"}]
        kept = {key: said for key, said in value.items() if key != "type"}
        return {**kept, "anyOf": [*others, {"type": "null"}]}
    chosen = {"enum": [*value["enum"], None]} if "enum" in value else {}
    return {**value, "type": [value["type"], "null"], **chosen}


def _options_of(scorer: Scorer) -> Schema:
    """If a policy names this scorer, its options are those of the scorer."""
    known = {name: {"type": _KINDS[type(value)], "default": value} for name, value in scorer.options.items()}
    options = {"description": scorer.about, "properties": known, "additionalProperties": False}
    named = {"properties": {"score": {"const": scorer.name}}, "required": ["score"]}
    return {"if": named, "then": {"properties": {"options": options}}}
