"""examples/serving: OpenAI's client against a server on a tiny model (soak.py says why its projections are exact: a
batch may round otherwise than a row alone).
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import openai
import pytest
import tiny_llama
import torch
from models import traced
from models.kinds import KINDS
from serving import soak
from serving.admission import Admission, Need
from serving.app import chat_tokens
from serving.build import wait_until
from serving.cli import arguments, size
from serving.engine import Engine, Limits
from serving.prefixes import Prefix, Prefixes
from serving.sampling import Sampler
from serving.warm import check
from serving.words import Words
from spelling import cache_of, with_cache

import kvpass

pytestmark = pytest.mark.usefixtures("one_trace")  # what the server compiled outlives each test

ROOT = Path(__file__).resolve().parent.parent
BYTES = 700_000
LIMITS = Limits(rows=4, queue=5, seconds=60, tokens=400, context=1500, body=64 << 10)
LONG: dict[str, Any] = {"model": "tiny", "prompt": soak.TEXT[:40], "max_tokens": 400, "temperature": 0}
GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """The tiny model; whatever compiles it shares Dynamo's traces, as by the fixture `one_trace`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvpass.model.compilation.isolated", traced.isolated)
        yield soak.exact_model()[0]


@pytest.fixture(scope="module")
def served(model: Any) -> Iterator[tuple[Engine, Any, openai.OpenAI]]:
    engine, tokenizer = soak.engine_of("h2o", 0.25, BYTES, LIMITS, model)
    with soak.serving(engine, tokenizer) as (client, _):
        yield engine, tokenizer, client


def settled(engine: Engine) -> None:
    wait_until(lambda: engine.idle and engine.held == engine.admission.base)


def spoken(tokenizer: Any, out: Any, prompt: int) -> str:
    text: str = tokenizer.decode(out.sequences[0, prompt:], skip_special_tokens=True)
    return text


def greedy(model: Any, calls: list[list[int]], count: int) -> list[int]:
    """The likeliest tokens, one by one, behind a prompt that is fed in so many calls: a plain loop, without padding."""
    said: list[int] = []
    cache, seen, ids = None, 0, calls[0]
    for at in range(len(calls) + count - 1):
        ids = calls[at] if at < len(calls) else [said[-1]]
        seen += len(ids)
        given = {"attention_mask": torch.ones(1, seen, dtype=torch.long), "use_cache": True, "logits_to_keep": 1}
        given["position_ids"] = torch.arange(seen)[None, -len(ids) :]
        given |= {} if cache is None else with_cache(model, cache)
        with torch.no_grad():
            out = model(torch.tensor([ids]), **given)
        cache = cache_of(out)
        if at >= len(calls) - 1:
            said.append(int(out.logits[0, -1].argmax()))
    return said


def test_an_answer_is_the_models(served: Any) -> None:
    """Without a prefix; and behind one, as if prefix and rest were two turns."""
    engine, tokenizer, client = served
    words, model = soak.TEXT[:300], engine.model
    ids = tokenizer(words).input_ids
    want = tokenizer.decode(greedy(model, [ids], 30), skip_special_tokens=True)
    got = client.completions.create(model="tiny", prompt=words, max_tokens=30, temperature=0)
    assert got.choices[0].text == want
    assert got.usage.prompt_tokens == 300
    assert got.system_fingerprint == model.kvpass.policy.fingerprint
    again = client.completions.create(model="tiny", prompt=ids, max_tokens=30, temperature=0)
    assert again.choices[0].text == want

    talk = [{"role": "system", "content": soak.SYSTEM}, {"role": "user", "content": words}]
    begun, ids = chat_tokens(tokenizer, talk[:1], False), chat_tokens(tokenizer, talk, True)
    want, whole = (greedy(model, calls, 30) for calls in ([begun, ids[len(begun) :]], [ids]))
    assert want != whole  # compressed twice is not compressed once
    told = client.chat.completions.create(model="tiny", messages=talk, max_tokens=30, temperature=0)
    assert told.choices[0].message.content == tokenizer.decode(want, skip_special_tokens=True)
    assert told.usage.prompt_tokens_details.cached_tokens == len(begun)
    settled(engine)


def test_at_full_budget_answers_are_the_original_models(model: Any) -> None:
    """Requests that join and leave each other, with and without a prefix, against the unmodified model alone. Then
    SIGTERM: what is running is answered, what comes is told to go elsewhere, and the server ends.
    """
    engine, tokenizer = soak.engine_of("full", None, 8_000_000, LIMITS, model)
    some = [one for one in soak.requests(18) if one["temperature"] == 0 and "stop" not in one]
    with soak.serving(engine, tokenizer) as (client, server):
        with ThreadPoolExecutor(4) as pool:
            said = list(pool.map(lambda one: soak.asked(client, one)[0], some))
        stream = client.completions.create(**LONG, stream=True)
        text = next(stream).choices[0].text
        server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: engine.state == "draining")
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(**LONG)
        assert httpx.get(str(client.base_url).replace("/v1/", "/health")).status_code == 503
        text += "".join(piece.choices[0].text for piece in stream)
        wait_until(lambda: not engine.alive and server.should_exit)
    for one, got in zip([*some, LONG], [*said, text], strict=True):
        ids = chat_tokens(tokenizer, one["messages"], True) if "messages" in one else tokenizer(one["prompt"]).input_ids
        out = model.generate(torch.tensor([ids]), max_new_tokens=one["max_tokens"], **GREEDY)
        assert got == spoken(tokenizer, out, len(ids)), one


def test_clients_floods_and_disconnects(served: Any) -> None:
    """A short form of soak.py: each answer is the one that it was alone, bytes are below the budget after every change
    of any cache, no graph is compiled, and nothing is left.
    """
    engine, _, client = served
    seen: list[int] = []
    engine.watched = lambda caches: seen.append(kvpass.Cache.held(caches, overhead=True))
    figures = soak.soaked(engine, client, seconds=3, clients=6, kinds=12, least=20)
    engine.watched = lambda caches: None
    assert not soak.problems(figures, memory=False), figures
    assert max(seen) == engine.peak <= engine.admission.budget
    assert 0 < engine.admission.base < engine.peak


def test_streams(served: Any) -> None:
    engine, _, client = served
    asked = {"model": "tiny", "prompt": soak.TEXT[:80], "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]][-1] == whole.choices[0].finish_reason
    assert (pieces[-1].choices, pieces[-1].usage) == ([], whole.usage)
    talk = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_completion_tokens=5, stream=True
    )
    first, *_ = talk
    assert first.choices[0].delta.role == "assistant"
    settled(engine)


def test_samples_are_the_seeds_own(served: Any) -> None:
    """Also while others are in the batch; and others with other seeds."""
    engine, _, client = served
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 25, "temperature": 1.0}

    def one(seed: int) -> str:
        text: str = client.completions.create(**asked, seed=seed).choices[0].text
        return text

    alone = [one(seed) for seed in (1, 2, 1)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(one, (1, 2, 3)))
    assert alone[0] == alone[2] == together[0]
    assert alone[1] == together[1] != alone[0]
    settled(engine)


WRONG: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "another model": ({"model": "/etc/passwd"}, 404, "model", "no model"),
    "a policy": ({"extra_body": {"policy": "full"}}, 400, "policy", "not supported"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "not supported"),
    "several answers": ({"n": 2}, 400, "n", "should be 1"),
    "probabilities": ({"logprobs": True}, 400, "logprobs", "False"),
    "a penalty": ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "less than or equal to 0"),
    "heat": ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    "a long answer": ({"max_tokens": 401}, 400, "max_tokens", "at most 400"),
    "a text for a number": ({"max_tokens": "7"}, 400, "max_tokens", "valid integer"),
    "many stops": ({"stop": list("abcde")}, 400, "stop", "at most 4"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, 400, "stream_options", "for streams"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages",
        "not supported",
    ),
    "a tool's words": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "'system'"),
    "many bytes": ({"messages": [{"role": "user", "content": "x" * 1300}]}, 400, "messages", "bytes of cache"),
    "a long prompt": ({"messages": [{"role": "user", "content": "x" * 1500}]}, 400, "messages", "more than 1500"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused(served: Any, what: str) -> None:
    engine, _, client = served
    more, status, param, words = WRONG[what]
    plain = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(openai.APIStatusError, match=words) as told:
        client.chat.completions.create(**{**plain, **more})
    assert (told.value.status_code, told.value.param) == (status, param)
    assert engine.idle


def test_what_asks_for_nothing_is_taken(served: Any) -> None:
    engine, _, client = served
    nothing = {"n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": False}
    said = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=2, **nothing
    )
    assert said.usage.completion_tokens <= 2
    settled(engine)


def test_bodies_that_are_too_large_or_no_json(served: Any) -> None:
    _, _, client = served
    url = str(client.base_url) + "completions"
    big = b'{"model": "tiny", "prompt": "' + b"x" * (64 << 10) + b'"}'
    for content in (big, (big[at : at + 1000] for at in range(0, len(big), 1000))):  # with its length, and in chunks
        told = httpx.post(url, content=content)
        assert (told.status_code, told.json()["error"]["code"]) == (413, "request_too_large")
    told = httpx.post(url, content=b"{", headers={"Content-Type": "application/json"})
    assert (told.status_code, told.json()["error"]["code"]) == (400, "invalid_json")
    assert httpx.get(str(client.base_url) + "nothing").json()["error"]["message"] == "Not Found"


def test_what_an_operator_sees(served: Any) -> None:
    engine, _, client = served
    assert [model.id for model in client.models.list()] == ["tiny"]
    root = str(client.base_url).removesuffix("/v1/")
    assert httpx.get(f"{root}/health").json() == {"status": "running"}
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{root}/metrics").text.splitlines() if line[0] != "#")
    assert float(lines["kvpass_kv_budget_bytes"]) == BYTES
    assert float(lines["kvpass_kv_held_bytes"]) == engine.admission.base
    assert float(lines["kvpass_kv_above_budget_total"]) == 0
    assert float(lines['kvpass_requests_refused_total{code="model_not_found"}']) >= 0
    assert float(lines["kvpass_graphs"]) == len(engine.model.kvpass.graphs)


def test_too_many_at_once(served: Any) -> None:
    """Four generate, five wait, others are told when to come again; a client that leaves the queue frees its place."""
    engine, _, client = served
    streams: list[Any] = []

    def many() -> None:
        while len(streams) < 40:
            streams.append(client.completions.create(**LONG, stream=True))

    with pytest.raises(openai.RateLimitError) as told:
        many()
    assert len(streams) >= LIMITS.queue
    assert int(told.value.response.headers["retry-after"]) >= 1
    for stream in streams:
        stream.close()
    started = time.monotonic()
    settled(engine)
    assert time.monotonic() - started < 5


def test_time_limits(served: Any) -> None:
    engine, _, client = served
    url = str(client.base_url) + "completions"
    engine.limits, usual = Limits(**{**vars(LIMITS), "seconds": 0.05}), engine.limits
    try:
        told = httpx.post(url, json=LONG, timeout=30)
        assert (told.status_code, told.json()["error"]["code"]) == (504, "timeout")
        with pytest.raises(openai.APIError, match="no whole answer"):
            list(client.completions.create(**LONG, stream=True))
    finally:
        engine.limits = usual
    settled(engine)


def test_an_error_in_a_step_costs_its_batch_alone(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, client = served
    asked = {"model": "tiny", "prompt": soak.TEXT[:40], "max_tokens": 9, "temperature": 0}
    want = client.completions.create(**asked).choices[0].text

    def broken() -> Any:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(engine.batch, "step", broken)
        with pytest.raises(openai.InternalServerError, match="the server failed"):
            client.completions.create(**asked)
    assert client.completions.create(**asked).choices[0].text == want
    settled(engine)


def test_stop_sequences_and_unfinished_characters() -> None:
    """Whatever the pieces, text is that of the whole up to the first stop."""
    tokenizer = tiny_llama.tokenizer()
    text = "größer — als 漢字 und 🙂 Ende"
    ids = tokenizer(text).input_ids
    cases = {(): "", ("Ende",): "Ende", ("d 🙂", "zzz"): "d 🙂", ("En", "🙂 "): "🙂 "}
    for stops, first in cases.items():
        want = text[: text.index(first)] if first else text
        words = Words(tokenizer, stops)
        pieces = []
        for token in ids:
            pieces.append(words.add(token))
            if words.stopped:
                break
        assert "".join(pieces) + words.end() == want
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        assert words.stopped is bool(stops)
    words = Words(tokenizer, ["never"])
    assert "".join(map(words.add, tokenizer("a neve").input_ids)) == "a "
    assert words.end() == "neve"


def test_sampling() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9, -5.0])
    assert Sampler(0, 1, None)(logits) == 1
    narrow, wide = Sampler(1.0, 0.5, 0), Sampler(2.0, 1.0, 0)
    assert {narrow(logits) for _ in range(50)} == {1}
    drawn = torch.tensor([wide(logits) for _ in range(4000)]).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, (logits / 2).softmax(-1), atol=0.03, rtol=0)


def test_admission_counts_copies_and_prompts() -> None:
    """By bounds of ten bytes a token and row, a hundred while a prompt is computed."""

    def held(calls: Any, steps: int = 0, rows: int = 1) -> int:
        return 10 * rows * (sum(calls) + steps)

    bounds = SimpleNamespace(
        held=held,
        peak=lambda calls, steps=0: max(100 * sum(calls), held(calls, steps)),
        layer=lambda calls, steps=0, rows=1: held(calls, steps, rows) // 2,
    )
    short, long = Need((5,), 5), Need((20,), 80)
    admission = Admission(bounds, 2 * 300 + 150 + 7, 7)
    assert admission.alone(long) == 7 + 2000
    assert admission.together([short, short], short) == 7 + 2 * 300 + 150
    assert admission.can_now([short, short], short)
    assert not admission.can_now([short, short, short], short)
    assert not admission.can_ever(long)
    assert admission.together([short, long], short) == 7 + 2 * 3000 + 1500  # a row is as large as the largest


def test_the_longest_prefix_that_leaves_a_token() -> None:
    prefixes = Prefixes([Prefix((1, 2), None), Prefix((1, 2, 3), None)])  # type: ignore[arg-type]
    found = [prefixes.of(prompt) for prompt in ((1, 2, 3, 4), (1, 2, 3), (1, 2), (2, 1, 3))]
    assert [one and one.ids for one in found] == [(1, 2, 3), (1, 2), None, None]


def test_what_an_operator_may_say(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(["--kv-bytes", "1.5GiB", "--budget", "20% bytes", "--system", "a", "--system", "b"])
    assert (args.kv_bytes, args.budget, args.system) == (3 << 29, "20% bytes", ["a", "b"])
    assert (size("500MB"), size("7"), size("2k")) == (500_000_000, 7, 2000)
    assert [arguments(["--budget", text]).budget for text in ("0.2", "1024")] == [0.2, 1024]
    with pytest.raises(SystemExit):
        arguments(["--kv-bytes", "many"])
    for waits in ({"every": 4}, {"layers": {"0": {"every": 4}}}):
        with pytest.raises(ValueError, match="`every: 4`"):
            check(kvpass.Policy.load({"name": "mine", "extends": "h2o", **waits}))
    bounds = SimpleNamespace(peak=lambda calls, steps: 1000)
    cache = SimpleNamespace(bounds=lambda: bounds)
    monkeypatch.setattr("serving.build.warmed", lambda model, beginnings: (cache, Prefixes()))
    with pytest.raises(ValueError, match="the shortest request needs 1,000 bytes"):
        soak.engine_of("h2o", 0.25, 999, LIMITS)


@pytest.mark.wide
def test_the_first_command_and_sigterm() -> None:
    """As docs/serving.md says it: a stream that is running is answered to its end, then the process ends with 0."""
    command = [
        sys.executable,
        "-P",
        str(ROOT / "examples" / "serve.py"),
        "--tiny",
        "--kv-bytes",
        "64MiB",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stderr is not None
        said: list[str] = []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"running on (http://[0-9.:]+)", line):
                break
        else:
            pytest.fail("".join(said))
        with openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0) as client:
            asked = {"model": "tiny", "messages": [{"role": "user", "content": soak.TEXT[:40]}], "temperature": 0}
            stream = client.chat.completions.create(**asked, max_tokens=120, stream=True)
            pieces = [next(stream), next(stream)]
            server.send_signal(signal.SIGTERM)
            pieces += list(stream)
            assert pieces[-1].choices[0].finish_reason in ("stop", "length")
        assert server.wait(60) == 0, server.stderr.read()


@pytest.mark.wide
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "even"])
def test_every_kind_of_slots(model: Any, kind: str) -> None:
    policy, budget = {**KINDS, "layers": ("cake", 48)}[kind]  # the other one reads plain projections
    engine, tokenizer = soak.engine_of(policy, budget, 2_000_000, LIMITS, model)
    with soak.serving(engine, tokenizer) as (client, _):
        figures = soak.soaked(engine, client, seconds=6, clients=6, kinds=12, least=20)
    assert not soak.problems(figures, memory=False), figures
