"""`kvpass tune`: the best policy for a model and a text of the user's, as a file."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpass.errors import KVPassError, PolicyError

if TYPE_CHECKING:
    from kvpass.tune.race import Race
    from kvpass.tune.windows import Windows

ABOUT = (
    "Tries policies and settings on windows of the text: each prompt is compressed before anything is asked of it, "
    "then the text goes on, and passages of it are read again; what is judged is how far the model's predictions are "
    "from the full cache's (docs/tune.md). The last quarter of the text is only for the report. Run again after an "
    "interruption, it goes on where it was."
)


def add(commands: Any, budget: Any) -> None:
    """The command's arguments.

    Args:
        commands: of argparse.
        budget: reads a budget.
    """
    parser = commands.add_parser("tune", help="the best policy for a model and a text, as a file", description=ABOUT)
    parser.add_argument("model", metavar="MODEL", help="a folder with a causal model of transformers and its tokenizer")
    parser.add_argument("--text", metavar="FILE", required=True, help="text as the model will get it, UTF-8")
    parser.add_argument("--budget", type=budget, required=True, help="a fraction (0.2), slots (1024) or '20%% bytes'")
    parser.add_argument("--minutes", type=_positive, default=20.0, help="for all, the report too (20)")
    parser.add_argument(
        "--out", metavar="FILE", default="tuned.yaml", help="the policy (tuned.yaml); .png and .json too"
    )
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt (1024)")
    parser.add_argument("--policies", type=_listed, default=[], metavar="A,B", help="names or files, instead of all")
    parser.add_argument("--without", type=_listed, default=[], metavar="A,B", help="of codes, replay, settings")
    parser.add_argument("--judge", choices=("both", "text", "copy"), default="both", help="what the loss is of (both)")
    parser.add_argument("--device", default="auto", help="as torch names it (the first CUDA device, or cpu)")
    parser.add_argument("--dtype", default="auto", help="as torch names it (that of the weights)")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.set_defaults(run=run)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes above 0")
    return minutes


def run(args: argparse.Namespace) -> int:
    """The search, its report, and its files. Status 130 if it was interrupted."""
    from kvpass.pipeline.progress import quiet

    out, text = Path(args.out), _text(Path(args.text))
    race = _race(args, out, text)
    print(f"{_judged_by(race)}\n", flush=True)
    try:
        with quiet():
            race.run()
            finals = race.finals()
    except KeyboardInterrupt:
        race.record.spent = race.clock.spent
        race.record.save()
        print("kvpass tune: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    _report(args, race, finals, out)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"cannot read the text: {error}", where="--text", hint="give a UTF-8 text file") from error


def _race(args: argparse.Namespace, out: Path, text: str) -> Race:
    """Everything that can be wrong is said here, before the first measurement."""
    import inspect

    import torch

    from kvpass import __version__
    from kvpass.api.compile import compile
    from kvpass.api.report import report
    from kvpass.tune.candidates import KINDS, bases
    from kvpass.tune.judge import Judge
    from kvpass.tune.loading import load, tokens_of
    from kvpass.tune.race import Clock, Race
    from kvpass.tune.record import Record
    from kvpass.tune.windows import windows_of

    clock = Clock(args.minutes)
    _check(args, out, [*KINDS])
    default = inspect.signature(compile).parameters["policy"].default
    without = set(args.without)
    start = bases(default, args.budget, args.policies, without)
    model, tokenizer = load(args.model, args.device, args.dtype)
    tokens, head = tokens_of(tokenizer, text)
    longest = getattr(model.config, "max_position_embeddings", None) or args.context + 64
    windows = windows_of(tokens, min(args.context, longest - 64), head=head)
    if isinstance(args.budget, int) and args.budget >= windows.context:
        what = f"a budget of {args.budget:,} slots holds all of a prompt of {windows.context:,} tokens"
        raise PolicyError(what, where="--budget", hint="give fewer slots, a longer --context or a longer text")
    about = {
        "model": str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model,
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
        "budget": args.budget,
        "context": windows.context,
        "policies": args.policies,
        "dtype": str(next(model.parameters()).dtype),
        "device": next(model.parameters()).device.type,
        "versions": f"kvpass {__version__}, torch {torch.__version__}",
    }
    record = Record.open(out.with_suffix(".json"), about, args.fresh)
    judge = Judge(
        model,
        lambda bare, policy: compile(bare, policy, inner="eager"),
        lambda cache: report(cache).to_dict(),
        windows.cue,
    )
    clock.before = record.spent
    limit = start[0].policy.budget if isinstance(start[0].policy.budget, float) else None
    race = Race(judge, windows, start, args.budget, without, _judge(args, judge, windows), record, clock, _quiet, limit)
    race.say = lambda name, row: _say(race, name, row)
    return race


def _check(args: argparse.Namespace, out: Path, kinds: list[str]) -> None:
    wrong = [word for word in args.without if word not in (*kinds[1:], "settings")]
    if wrong:
        hint = "of codes (slots in few bits), replay (the prompt is read twice), settings (laid over the best)"
        raise PolicyError(f"unknown word {wrong[0]!r}", where="--without", hint=hint)
    if out.suffix not in (".yaml", ".yml") or not out.parent.is_dir():
        hint = "give a name that ends in .yaml, in a folder that there is"
        raise PolicyError(f"cannot write a policy to {str(out)!r}", where="--out", hint=hint)
    if args.budget in (1.0, "100%", "100% bytes") and not isinstance(args.budget, int):
        raise PolicyError("a budget of 1.0 keeps everything", where="--budget", hint="give less, 0.2 say")


def _judge(args: argparse.Namespace, judge: Any, windows: Windows) -> str:
    """What a loss is of. A model that does not copy from its full cache either is judged by text alone."""
    if args.judge != "both":
        return str(args.judge)
    right = max(judge.full(window).marks.right for window in windows.search[:2])
    return "both" if right >= 0.5 else "text"


def _judged_by(race: Race) -> str:
    from kvpass.tune.table import criterion

    lines = [f"{len(race.windows.search)} windows to choose by, {len(race.windows.held_out)} held out"]
    if race.judged == "text":
        lines.append(
            "(read again, passages are not told by the full cache either, or --judge text: copies do not count)"
        )
    return "\n".join([criterion(race), *lines])


def _quiet(name: str, row: Any) -> None:
    return None


def _say(race: Race, name: str, row: Any) -> None:
    from kvpass.tune.table import one_line

    spent, whole = (f"{int(s) // 60}:{int(s) % 60:02d}" for s in (race.clock.spent, race.clock.seconds))
    if row is not None or name.endswith("held-out text"):
        print(f"[{spent} of {whole}] {one_line(name, row, race)}", file=sys.stderr, flush=True)


def _report(args: argparse.Namespace, race: Race, finals: list[Any], out: Path) -> None:
    from kvpass.tune.output import write
    from kvpass.tune.picture import draw
    from kvpass.tune.table import criterion, finals_table, search_table

    race.judge.expected.clear()  # to be timed, and after a warm-up by all that was before
    full = race.judge.full(race.windows.held_out[0], stepwise=True)
    report = finals_table(race, finals, full)
    print(search_table(race), "", "On the held-out text:", report, "", sep="\n")
    best, verdict = race.winner(finals)
    command = f"kvpass tune {args.model} --text {args.text} --budget {args.budget} --minutes {args.minutes:g}"
    write(best, out, [f"{best.name}, by `{command}`", criterion(race), verdict])
    print(f"wrote {out}: {best.name}; {verdict}")
    picture = out.with_suffix(".png")
    try:
        draw(race, finals, full, picture, f"{Path(args.model).name}, {Path(args.text).name}, budget {args.budget}")
        print(f"wrote {picture}")
    except KVPassError as error:
        print(error, file=sys.stderr)
