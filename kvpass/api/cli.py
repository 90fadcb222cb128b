"""The command `kvpass`: what policies and scorers there are, whether a policy file is right, which one is best."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpass import __version__
from kvpass.api import harness, tuning
from kvpass.errors import KVPassError, PolicyError

if TYPE_CHECKING:
    from kvpass.policy.spec import Spec


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 1 for an error that the library names, 2 (by argparse) for usage."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and not hasattr(args, "rest"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest  # of `eval`: another program's
    try:
        for file in getattr(args, "imports", None) or ():
            _import(Path(file))
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KVPassError as error:
        _complain(error)
        return 1
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


_LISTED = (
    "Without an action, lists the built-in policies. attn (32, steps) is attention of the last 32 queries of a "
    "call and of generated tokens; bits are of a number of a key or value, with scales; docs/policies.md says more."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvpass", description="Eviction policies of kvpass.")
    parser.add_argument("--version", action="version", version=f"kvpass {__version__}")
    commands = parser.add_subparsers(required=True, metavar="policies|scorers|tune|eval")
    policies = commands.add_parser("policies", help="list, show and check policies", description=_LISTED)
    policies.add_argument("--markdown", action="store_true", help="the list as docs/policies.md holds it")
    policies.set_defaults(run=_list)
    actions = policies.add_subparsers(metavar="show|check|schema")
    show = actions.add_parser("show", help="a policy with all its fields, and the rule that the ops get")
    show.add_argument("policy", metavar="NAME|FILE")
    show.set_defaults(run=_show)
    check = actions.add_parser("check", help="whether policy files are right")
    check.add_argument("policies", nargs="+", metavar="FILE")
    check.set_defaults(run=_check)
    for action in (show, check):
        action.add_argument("--budget", type=_budget, help="a fraction (0.2), slots per KV head (1024) or '20%% bytes'")
    actions.add_parser("schema", help="JSON Schema of policy files, for editors").set_defaults(run=_schema)
    known = commands.add_parser("scorers", help="what policies can name in `score`")
    known.set_defaults(run=_scorers)
    for command in (show, check, known):
        text = "run this file first: it registers scorers of your own"
        command.add_argument("--import", dest="imports", action="append", metavar="FILE.py", help=text)
    tuning.add(commands, _budget)
    harness.add(commands)
    return parser


def _budget(text: str) -> int | float | str:
    from kvpass.policy.shorthand import share

    if share(text):
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; give 0.2, 1024 or '20% bytes'") from None


def _import(file: Path) -> None:
    name = f"kvpass_own_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise PolicyError(f"cannot import {str(file)!r}", hint="give the path of a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        what = f"cannot import {str(file)!r}: {type(error).__name__}: {error}"
        raise PolicyError(what, hint="mend the file") from error


def _complain(error: KVPassError) -> None:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _list(args: argparse.Namespace) -> int:
    from kvpass.plan.listing import as_markdown, as_text, catalogue

    print(as_markdown(catalogue()) if args.markdown else as_text(catalogue()))
    return 0


def _show(args: argparse.Namespace) -> int:
    import yaml

    from kvpass.plan.listing import emission
    from kvpass.policy.policy import Policy

    policy = Policy.load(args.policy)
    if args.budget is not None:
        policy = policy.with_budget(args.budget)
    data: dict[str, Any] = policy.to_dict()
    data["statistic"]["keep"] = list(policy.statistic.keep)
    print(yaml.safe_dump(data, sort_keys=False, width=100, allow_unicode=True), end="")
    print("\n".join(f"# {line}" for line in emission(policy)))
    return 0


def _check(args: argparse.Namespace) -> int:
    """Every file, each with its own verdict in one line; what to do about errors goes to stderr."""
    bad = 0
    for file in args.policies:
        try:
            print(f"{file}: ok, {_verdict(file, args.budget)}", flush=True)
        except KVPassError as error:
            print(f"{file}: {type(error).__name__}: {' '.join(error.what.split())}", flush=True)
            _complain(error)
            bad += 1
    return int(bad > 0)


def _verdict(file: str, budget: int | float | str | None) -> str:
    """What was checked, in words.

    Raises:
        PolicyError: what is wrong.
    """
    from kvpass.policy.files import check_files
    from kvpass.policy.load import variants
    from kvpass.policy.policy import Policy

    policy = Policy.load(file)
    if budget is None and policy.budget is None:
        known = f"policy {policy.name!r} (with --budget, what it protects is checked too)"
        for one in (policy, *variants(policy).values()):
            check_files(one)
    else:
        known = f"policy {policy.name!r} with budget {policy.with_budget(budget).asked}"
    notes = dict.fromkeys(filter(None, map(_trial, (policy, *variants(policy).values()))))
    return "; ".join([known, *notes])


def _trial(policy: Spec) -> str:
    """A user's own scorer is tried on made-up keys: what could not be tried, if anything.

    Raises:
        PolicyError: it gives no scores.
    """
    from kvpass.kernels.errors import ScorerError
    from kvpass.kernels.rank.scorers.registry import scorers
    from kvpass.kernels.rank.scorers.trial import tried

    scorer = scorers().get(policy.score)
    if scorer is None or scorer.run.__module__.startswith("kvpass."):
        return ""
    try:
        note = tried(scorer, policy.options)
    except ScorerError as error:
        raise PolicyError(f"policy {policy.name!r}: {error}", where=scorer.where, hint=error.hint) from error
    return note and f"scorer {scorer.name!r} was {note}"


def _schema(args: argparse.Namespace) -> int:
    from kvpass.policy.schema import schema_text

    print(schema_text(), end="")
    return 0


def _scorers(args: argparse.Namespace) -> int:
    from kvpass.kernels.rank.scorers.registry import scorers
    from kvpass.plan.listing import scorer_text

    print("\n\n".join(scorer_text(scorer) for scorer in scorers().values()))
    return 0
