"""What two policies keep of one prompt, as pages to look at: a passkey in 1,024 tokens, asked for after the eviction.

    python -P examples/retention.py [--policies h2o kvzip] [--budget 0.2] [--picture docs/retention.png]

Writes a page for each policy, says what is left of the passkey and what the model answers; with --picture, both pages
side by side as chromium shows them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import chromium
import smollm2
import torch
from quality.prompts import Prompts
from quality.tasks.trial import Question

import kvpass

TASK = "passkey"
WIDTH, HEIGHT = 1080, 1740


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["h2o", "kvzip"])
    parser.add_argument("--budget", type=float, default=0.2, help="fraction of the tokens that is kept")
    parser.add_argument("--tokens", type=int, default=1024, help="length of the prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the text, the passkey and its place")
    parser.add_argument("--folder", type=Path, default=Path("retention"), help="where the pages go")
    parser.add_argument("--picture", type=Path, help="a PNG of the pages side by side; needs chromium")
    return parser.parse_args()


def place(ids: list[int], part: list[int]) -> tuple[int, int]:
    """Where a run of tokens stands in a text."""
    starts = [at for at in range(len(ids)) if ids[at : at + len(part)] == part]
    assert len(starts) == 1, "the text has it once"
    return starts[0], starts[0] + len(part)


def whole(cache: Any, start: int, stop: int) -> int:
    """How many heads hold all of a run of tokens."""
    heads = [head for layer in kvpass.inspect(cache).layers for head in layer.positions[0].tolist()]
    return sum(set(range(start, stop)) <= set(head) for head in heads)


def answer(model: Any, cache: Any, asked: list[int], question: Question) -> list[int]:
    """The digits that greedy decoding says, as many as there are to be found."""
    said: list[int] = []
    feed = asked
    while len(said) < len(question.gold):
        logits = model(torch.tensor([feed]), cache=cache, use_cache=True).logits
        feed = [int(logits[0, -1].argmax())]
        said += feed
    return said


def side_by_side(pages: list[Path], to: Path) -> None:
    frames = "".join(
        f'<iframe src="{page.name}" width="{WIDTH}" height="{HEIGHT}" frameborder="0" scrolling="no"></iframe>'
        for page in pages
    )
    pair = pages[0].with_name("side_by_side.html")
    pair.write_text(f'<!doctype html><body style="margin:0;white-space:nowrap">{frames}</body>')
    chromium.screenshot(pair, to, WIDTH * len(pages), HEIGHT)
    print(f"{to}: {to.stat().st_size / 1e3:.0f} KB")


@torch.no_grad()
def main() -> None:
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = smollm2.load()
    prompts = Prompts(tokenizer, args.seed)
    trial = prompts.trial(args.tokens, 0)
    question = trial.questions[TASK]
    ids = prompts.prompt(trial, args.tokens, "agnostic", TASK)
    spans = {"passkey": place(ids, question.gold)}
    print(f"passkey {tokenizer.decode(question.gold)!r} at {spans['passkey']} of {len(ids)} tokens")
    pages = []
    for policy in args.policies:
        compiled = kvpass.compile(model, policy, args.budget, inner="eager")
        cache = compiled(torch.tensor([ids]), use_cache=True).cache
        name = args.folder / f"{policy}.html"
        pages.append(kvpass.page(cache, ids, name, tokenizer=tokenizer, spans=spans))
        (row,) = kvpass.report(cache, spans).to_dict()["spans"]
        said = answer(compiled, cache, prompts.follow_up(trial, "agnostic", TASK), question)
        kept = f"{row['kept']:.1%} kept over {row['heads']} heads, {row['gone']} of {row['tokens']} tokens gone in all"
        kept += f", {whole(cache, *spans['passkey'])} heads hold all of it"
        print(f"{policy}: {kept}; asked for it, the model says {tokenizer.decode(said)!r}; {name}")
    if args.picture:
        side_by_side(pages, args.picture)


if __name__ == "__main__":
    main()
