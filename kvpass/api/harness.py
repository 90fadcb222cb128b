"""lm-evaluation-harness over a compressed cache: its model `kvpass`, and `kvpass eval`, the harness' own command with
that model known to it (the harness has no plug-ins that an installed package could register itself by).
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import cache
from importlib import import_module
from typing import Any

from kvpass.errors import KVPassError

Request = tuple[Any, list[int], list[int]]
"""A key or None, the context's tokens, the continuation's."""


def add(commands: Any) -> None:
    """The command's arguments: all are the harness'."""
    about = "lm_eval with --model kvpass; its own arguments: --model_args pretrained=..,policy=..,budget=.. --tasks .."
    parser = commands.add_parser("eval", help="lm-evaluation-harness over a compressed cache", description=about)
    parser.set_defaults(run=run, rest=True)


def run(args: argparse.Namespace) -> int:
    """The harness' command."""
    register()
    sys.argv = ["lm_eval", "run", "--model", "kvpass", *args.rest]
    import_module("lm_eval.__main__").cli_evaluate()
    return 0


def register() -> Any:
    """Make `kvpass` known to the harness in this process; the class.

    Raises:
        KVPassError: lm-eval is not installed.
    """
    made = model_class()
    registry: Any = import_module("lm_eval.api.registry")
    if "kvpass" not in registry.model_registry:
        import_module("lm_eval.models")  # its own names come first, or it believes that there are none but ours
        registry.register_model("kvpass")(made)
    return made


@cache
def model_class() -> Any:
    """The harness' model of transformers, compiled; made on first use, since its base is an optional package's.

    Raises:
        KVPassError: lm-eval is not installed.
    """
    try:
        huggingface: Any = import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise KVPassError(f"lm-eval is not installed: {error}", hint='pip install "kvpass[eval]"') from error

    class KVPassLM(huggingface.HFLM):  # type: ignore[misc]  # a base of an optional package, which mypy cannot see
        """Generation runs under the policy. A continuation is scored by splitting: the context but for its last token
        is one call and is compressed at its end, then that token and the continuation read the compressed cache.
        """

        def __init__(
            self,
            pretrained: Any,
            policy: str = "kvpass",
            budget: int | float | str | None = None,
            inner: str = "eager",
            **kwargs: Any,
        ) -> None:
            from kvpass.api.compile import compile

            super().__init__(pretrained, backend="causal", **kwargs)
            bare: Any = vars(self)["_model"]
            self._model: Any = compile(bare, policy, budget, inner=inner)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise KVPassError(
                "the likelihood of a whole text reads no compressed cache: nothing comes before it",
                where="loglikelihood_rolling",
                hint="give tasks with a context and a continuation, or generation tasks",
            )

        def _loglikelihood_tokens(
            self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            return split_scores(self, requests)

    return KVPassLM


def split_scores(lm: Any, requests: list[Request]) -> list[tuple[float, bool]]:
    """(log-likelihood of the continuation, whether it is the greedy one) for each request. Requests of one context, as
    multiple-choice tasks make them, are read from copies of one cache. Contexts lose tokens on the left where the whole
    is longer than the model, as in the harness.
    """
    import torch

    from kvpass.model.asked import cache_in

    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    held: tuple[list[int], Any] = ([], None)
    for at in sorted(range(len(requests)), key=lambda i: requests[i][1]):
        key, context, continuation = requests[at]
        context = context[-max(1, lm.max_length - len(continuation)) :]
        before, rest = context[:-1], [*context[-1:], *continuation[:-1]]
        with torch.no_grad():
            if before and held[0] != before:
                held = before, cache_in(dict(lm.model(input_ids=_ids(lm, before), use_cache=True)))
            logits = _called(lm.model, _ids(lm, rest), copy.deepcopy(held[1]) if before else None)
        wanted = torch.tensor(continuation, device=logits.device)
        logp = logits.float().log_softmax(-1)
        score = float(logp.gather(-1, wanted[:, None]).sum())
        found[at] = score, bool((logp.argmax(-1) == wanted).all())
        if key is not None:
            lm.cache_hook.add_partial("loglikelihood", key, found[at])
    return found


def _ids(lm: Any, tokens: list[int]) -> Any:
    import torch

    return torch.tensor([tokens], device=lm.device)


def _called(model: Any, ids: Any, held: Any) -> Any:
    """Logits [S, V] of a call that goes on from a cache (None: from nothing), by this transformers' name for it."""
    import inspect

    from kvpass.model.asked import CACHES

    known = inspect.signature(model.forward).parameters
    name = next((one for one in CACHES if one in known), CACHES[0])
    return model(input_ids=ids, use_cache=True, **({} if held is None else {name: held})).logits[0]
