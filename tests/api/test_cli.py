"""The command `kvpass`: what it prints, its exit statuses, and that docs and schema are what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kvpass.kernels.rank.scorers.registry import scorers
from kvpass.kernels.rank.scorers.seen import READS

from kvpass.api.cli import main
from kvpass.plan.listing import catalogue, example_rule
from kvpass.policy import evicted, spec
from kvpass.policy.evicted import Evicted, Merge, To
from kvpass.policy.layers import of_layer
from kvpass.policy.load import PRESETS, names
from kvpass.policy.policy import Policy
from kvpass.policy.schema import json_schema, schema_text
from kvpass.runtime.room import empty_state

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
OWN = ROOT / "examples" / "own_scorer.yaml"
GOOD = "name: mine\nextends: h2o\nprotect: {sinks: 4}\n"


def run(*command: str, check: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-P", *command], capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == check, done.stderr
    return done


def test_the_list_has_every_policy_in_columns(capsys):
    assert main(["policies"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names()
    for column in ("reads", "extra at prefill", "bytes/slot", "paper"):
        at = heading.index(column)
        assert all(line[at - 2 : at] == "  " and line[at] != " " for line in lines)
    costs = {row.name: (row.reads, row.extra, row.bytes) for row in catalogue()}
    assert costs["full"] == ("nothing", "none", 4)
    assert costs["streaming_llm"] == ("positions", "none", 4)
    assert costs["h2o"] == ("attention of all queries", "T*T", 8)
    assert costs["snapkv"] == ("attention of the last 32 queries and of generated tokens", "32*T", 12)
    assert costs["knorm"] == ("keys", "T", 8)
    assert costs["criticalkv"][1:] == ("32*T + T*(v W_O)", 16)


@pytest.mark.parametrize("name", names())
def test_bytes_are_those_of_the_state(name):
    (row,) = [row for row in catalogue() if row.name == name]
    like = torch.zeros(())
    state = empty_state(example_rule(Policy.load(name)), 500, like, {"B": 1, "Hkv": 1, "D": 4, "Dv": 4})
    beside = sum(
        tensor.nbytes for field, tensor in state.per_slot() if field.name not in ("k", "v") and not field.codes
    )
    assert beside == row.bytes * state.slots


@pytest.mark.parametrize("name", names())
def test_show_is_the_policy_with_all_its_fields_and_the_rule(name, capsys, tmp_path: Path):
    assert main(["policies", "show", name]) == 0
    out = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(out)
    assert Policy.load(tmp_path / "shown.yaml") == Policy.load(name)
    assert list(yaml.safe_load(out)) == [f.name for f in fields(Policy)]
    assert f"# rule at budget {Policy.load(name).budget or 0.2}: ops=" in out


def test_show_takes_files_and_budgets(capsys):
    arguments = ["--budget", "128", "--import", str(OWN.with_suffix(".py"))]
    assert main(["policies", "show", str(OWN), *arguments]) == 0
    out = capsys.readouterr().out
    assert "budget: 128\n" in out
    assert "scorer=loud options=order:float:1.0 reads=values" in out
    assert "each slot keeps: position + scored, 8 bytes beside K and V" in out
    assert main(["policies", "show", "h20"]) == 1
    assert "did you mean 'h2o'" in capsys.readouterr().err


def test_check_says_ok_or_the_one_error_of_each_file(capsys, tmp_path: Path):
    good, bad, worse = (tmp_path / f"{name}.yaml" for name in ("good", "bad", "worse"))
    good.write_text(GOOD)
    bad.write_text("name: bad\nprotect: {sink: 4}\n")
    worse.write_text("name: worse\nextends: worse.yaml\n")
    assert main(["policies", "check", str(good)]) == 0
    assert main(["policies", "check", str(bad), str(good), str(worse)]) == 1
    out, err = capsys.readouterr()
    assert out.count(f"{good}: ok, policy 'mine'") == 2
    assert [line for line in err.splitlines() if line.startswith("PolicyError: ")] == [
        "PolicyError: unknown key 'protect.sink'",
        "PolicyError: 'extends' runs in a circle: worse.yaml -> worse.yaml",
    ]
    assert f"  where: {bad}\n  what to do: did you mean 'sinks'?" in err


@pytest.mark.parametrize(
    ("budget", "status", "words"),
    [("0.2", 0, "with budget 0.2"), ("16", 0, "with budget 16"), ("4", 1, "4 slots, but 6"), ("2.0", 1, "at most at")],
)
def test_check_with_a_budget(budget, status, words, capsys, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert main(["policies", "check", str(path), "--budget", budget]) == status
    assert words in "".join(capsys.readouterr())


def test_check_misses_weight_files(capsys):
    assert main(["policies", "check", "q_filters"]) == 1
    assert "no weight file" in capsys.readouterr().err


def test_files_with_own_scorers(capsys):
    assert main(["policies", "check", str(OWN), "--import", str(OWN.with_suffix(".py"))]) == 0
    assert "with budget 0.25" in capsys.readouterr().out
    assert main(["scorers", "--import", "no.py"]) == 1
    assert "PolicyError: cannot import 'no.py'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["policies", "chek"], ["policies", "check"], ["policies", "check", "h2o", "--budget", "x"]],
    ids=str,
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: kvpass" in capsys.readouterr().err


def test_scorers_are_listed_with_options_and_docs(capsys):
    assert main(["scorers"]) == 0
    out = capsys.readouterr().out
    assert "cake(gamma=200.0, pool=5)\n    reads rows; " in out
    for scorer in scorers().values():
        assert f"\n{scorer.name}(" in "\n" + out
        assert " ".join(scorer.about.split()) in " ".join(out.split())


def test_as_a_module_it_is_quick_and_ends_with_its_reader():
    lean = (
        "import sys, kvpass.api.cli; sys.argv = ['kvpass', '--help']\ntry: kvpass.api.cli.main()\nexcept SystemExit: "
    )
    assert run("-c", lean + "assert 'torch' not in sys.modules").stdout.startswith("usage: kvpass")
    lean = "import sys; from kvpass.api.cli import main; main(['policies']); assert 'torch._dynamo' not in sys.modules"
    assert run("-c", lean).stdout.startswith("policy ")
    assert run("-m", "kvpass", "policies", "check", "/no.yaml", check=1).stderr.startswith("PolicyError: cannot read")
    piped = f"{sys.executable} -P -m kvpass scorers | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, timeout=300, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_is_installed_by_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"kvpass": f"{main.__module__}:{main.__name__}"}


def test_docs_hold_what_the_command_prints(capsys):
    """If not: `kvpass policies --markdown` between the marks, `kvpass policies schema > docs/policy.schema.json`."""
    main(["policies", "--markdown"])
    marked = re.search(r"markdown: begin -->\n(.*)<!--", (DOCS / "policies.md").read_text(), re.DOTALL)
    assert marked is not None
    assert marked.group(1) == capsys.readouterr().out
    assert main(["policies", "schema"]) == 0
    assert (DOCS / "policy.schema.json").read_text() == capsys.readouterr().out == schema_text()


def leaves(kind: type = Policy, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and defaults of all fields, those of optional parts too."""
    defaults = kind("") if kind is Policy else kind()
    for f in fields(kind):
        value, name = getattr(defaults, f.name), f.name.capitalize()
        part = getattr(spec, name, None) or getattr(evicted, name, None)
        part = part if value is None or is_dataclass(value) else None  # two fields are called `weight`
        if part is None or value is None:
            yield prefix + f.name, value
        if part is not None:
            yield from leaves(part, f"{prefix}{f.name}.")


def test_the_reference_has_every_field_with_its_default():
    rows = re.findall(r"^\| `([\w.]+)` \|(.*?)\|", (DOCS / "policy-files.md").read_text(), re.MULTILINE)
    found = {name: default.strip(" `") for name, default in rows}
    for name, value in leaves():
        said = json.dumps(value).strip('"') if value != "" else '""'
        assert found[name] == ("" if name == "name" else said), name


def test_the_reference_has_what_scorers_may_read():
    (said,) = re.findall(r"`reads` says .*", (DOCS / "policy-files.md").read_text())
    assert [word for word in READS if f"`{word}`" not in said] == []


def test_examples_of_the_reference_load(tmp_path: Path):
    text = (DOCS / "policy-files.md").read_text()
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "name:" in block]
    assert len(blocks) == 10
    blocks = blocks[1:]  # the first shows an error
    (tmp_path / "differing.yaml").write_text(blocks[1])
    differing = Policy.load(tmp_path / "differing.yaml").with_budget(0.2)
    assert [of_layer(differing, at, 30).budget for at in (0, 1, 2, 28, 29)] == [1.0, 1.0, 0.2, 0.2, 128]
    (tmp_path / "small.yaml").write_text(blocks[2])
    small = Policy.load(tmp_path / "small.yaml")
    assert (small.asked, small.store.k, small.store.v, of_layer(small, 1, 30).store.k) == (
        "12.5% bytes",
        "int8",
        "int4",
        "dense",
    )
    (tmp_path / "mine.yaml").write_text(blocks[0])
    mine, snapkv = Policy.load(tmp_path / "mine.yaml").with_budget(0.2), Policy.load("snapkv")
    assert (mine.observe, mine.statistic, mine.pool) == (snapkv.observe, snapkv.statistic, snapkv.pool)
    assert (mine.protect.sinks, mine.protect.recent, mine.allocate.heads, mine.min_slots) == (4, 32, "flat", 96)
    assert mine.weight is not None
    (tmp_path / "fitted.yaml").write_text(blocks[3])
    assert Policy.load(tmp_path / "fitted.yaml").store.fit_k == "range"
    (tmp_path / "merging.yaml").write_text(blocks[4])
    assert Policy.load(tmp_path / "merging.yaml").evicted == Evicted(
        Merge(halves="both", weight="cosine", threshold=0.7)
    )
    (tmp_path / "tiers.yaml").write_text(blocks[5])
    assert Policy.load(tmp_path / "tiers.yaml").evicted == Evicted(to=To("int2", "int2"))
    (tmp_path / "replay.yaml").write_text(blocks[8])
    assert Policy.load(tmp_path / "replay.yaml").observe.replay == "repeat"
    for name in ("q_filters", "kvp", "gate", "surrogate"):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert all(part in " ".join((scorers()[name].run.__doc__ or "").split()) for part in row.split(" | ")[1:-1])


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> list[str]:
    """Where JSON data breaks a schema: the part of JSON Schema that pydantic writes."""
    kinds: dict[str, Any] = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
    kinds |= {"integer": int, "number": (int, float)}
    out: list[str] = []
    if "$ref" in schema:
        out += faults(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema and all(faults(value, choice, root) for choice in schema["anyOf"]):
        out.append(f"{value!r} is none of {schema['anyOf']}")
    wanted = schema.get("type", list(kinds))
    wanted = [wanted] if isinstance(wanted, str) else wanted
    numeric = isinstance(value, bool) and "boolean" not in wanted
    if numeric or not any(isinstance(value, kinds[kind]) for kind in wanted):
        out.append(f"{value!r} is no {wanted}")
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        out.append(f"{value!r} is not like {schema['pattern']}")
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        out.append(f"{value!r} is no choice")
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", {})
        out += [f"{key} is missing" for key in schema.get("required", []) if key not in value]
        for key, inner in value.items():
            below = known.get(key, rest)
            if isinstance(below, bool):
                out += [] if below else [f"{key} is unknown"]
            else:
                out += faults(inner, below, root)
    for item in value if isinstance(value, list) else []:
        out += faults(item, schema.get("items", {}), root)
    for part in schema.get("allOf", []):
        if not faults(value, part["if"], root):
            out += faults(value, part["then"], root)
    return out


@pytest.mark.parametrize("path", [*sorted(PRESETS.glob("*.yaml")), OWN], ids=lambda path: path.stem)
def test_every_file_fits_the_schema(path):
    schema = json_schema()
    assert faults(yaml.safe_load(path.read_text()), schema, schema) == []
    if path != OWN:
        assert faults(json.loads(json.dumps(Policy.load(path).to_dict())), schema, schema) == []


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"name": 5},
        {"name": "x", "protekt": {}},
        {"name": "x", "protect": {"sink": 1}},
        {"name": "x", "observe": {"queries": "most"}},
        {"name": "x", "observe": {"queries": True}},
        {"name": "x", "statistic": {"keep": ["smu"]}},
        {"name": "x", "score": 5},
        {"name": "x", "extends": ["h2o"]},
        {"name": "x", "weight": {"by": "l3"}},
        {"name": "x", "score": "cake", "options": {"gama": 1.0}},
        {"name": "x", "score": "cake", "options": {"pool": "5"}},
        {"name": "x", "store": "itn4"},
        {"name": "x", "store": ["int4"]},
        {"name": "x", "store": {"k": "int9"}},
        {"name": "x", "store": {"keys": "int4"}},
        {"name": "x", "store": {"group": "6"}},
        {"name": "x", "evicted": {"to": "itn2"}},
        {"name": "x", "evicted": {"to": {"keys": "int2"}}},
        {"name": "x", "budget": "much"},
        {"name": "x", "unit": "words"},
    ],
    ids=str,
)
def test_bad_data_does_not_fit_the_schema(data):
    schema = json_schema()
    assert faults(data, schema, schema)


@pytest.mark.parametrize(
    "data",
    [
        {"store": "int4"},
        {"store": "dense"},
        {"store": {"k": "int8", "v": "fp8_e5m2", "rotate": "none", "group": 32, "residual": 0, "sinks": 0}},
        {"store": {"v": "int2"}},
        {"extends": "h2o", "store": {"k": None}},
        {"store": None},
        {"budget": "20% bytes"},
        {"budget": 0.2, "unit": "bytes"},
        {"layers": {"0": {"store": "int8"}}},
    ],
    ids=str,
)
def test_both_ways_to_say_a_store_and_a_budget_fit_the_schema(data):
    schema = json_schema()
    assert faults({"name": "x", **data}, schema, schema) == []


def test_the_schema_says_what_fields_mean():
    schema = json_schema()
    parts = [schema, *schema["$defs"].values()]
    assert all(part["description"] for part in parts)
    assert schema["properties"]["score"]["description"].startswith("what ranks unprotected slots")
    assert "null takes a key out" in schema["properties"]["extends"]["description"]
    assert schema["$defs"]["Observe"]["properties"]["group"]["description"]
    assert {"snapkv", "lag"} & set(schema["properties"]["score"]["anyOf"][0]["enum"]) == {"lag"}
