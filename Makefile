# `make help` lists the commands. Everything runs in .venv, which is made on first use.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
RANKS ?= 2

.PHONY: help env demo preprocess test test-multinode test-faults mutants mutants-sample check format docs clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

env: .venv/.installed  ## make .venv with the pinned requirements

.venv/.installed: requirements.txt
	@command -v g++ >/dev/null || { echo "make: no g++; DeepSpeed builds its CPU communication with it (Debian: apt-get install g++)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; give PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	@touch $@

# Variables reach the shell through its environment and as they were typed: quotes, $ and ` in them stay what they are.
DATA ?=
OUT ?=
TOKENIZER ?=
TEMPLATE ?= alpaca
KIND ?= instructions
MAX_PROMPT ?= 256
MAX_LENGTH ?= 512
ON_BAD ?= fail
WORKERS ?=
FRESH ?=
SEED ?=
define as_typed
override $(1) := $$(value $(1))
export $(1)
endef
GIVEN := DATA OUT TOKENIZER TEMPLATE KIND MAX_PROMPT MAX_LENGTH ON_BAD WORKERS FRESH RANKS SEED
$(foreach name,$(GIVEN),$(eval $(call as_typed,$(name))))

demo: env  ## distil a real model end to end into runs/demo (FRESH=1 starts again)
	@fresh=; [ "$$FRESH" != 1 ] || fresh=--fresh; PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m tools.demo --ranks "$$RANKS" $$fresh

# make preprocess DATA='raw/*.jsonl' OUT=records/train TOKENIZER=models/student; the same under mpirun and srun
preprocess: env  ## tokenise DATA= into OUT= with TOKENIZER= (TEMPLATE= KIND= MAX_PROMPT= MAX_LENGTH= ON_BAD= WORKERS=)
	@for name in DATA OUT TOKENIZER; do [ -n "$${!name}" ] || { echo "make preprocess: $$name= is missing, as in make preprocess DATA=file.jsonl OUT=folder TOKENIZER=folder" >&2; exit 2; }; done
	@$(BIN)/python -m data_prep.preprocess --data "$$DATA" --out "$$OUT" --tokenizer "$$TOKENIZER" \
	  --kind "$$KIND" --template "$$TEMPLATE" --max-prompt "$$MAX_PROMPT" --max-length "$$MAX_LENGTH" \
	  --on-bad "$$ON_BAD" $${WORKERS:+--workers "$$WORKERS"}

test: env  ## run all tests, two files at a time
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-multinode: env  ## two hosts made of network namespaces, over pdsh and OpenMPI (root on Linux; else skipped)
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m pytest -q tests/multinode

test-faults: env  ## break hundreds of runs on purpose and print what came of it (runs/faults.json)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q tests/faults

mutants: env  ## make the mistakes of tests/mutants.yaml one by one, and print those that no test notices (FRESH=1)
	@fresh=; [ "$$FRESH" != 1 ] || fresh=--fresh; PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m tools.mutants $$fresh

# Others every hour. The seed is printed: SEED=… tries the same again.
mutants-sample: env  ## a dozen of them, of which none is begun after two minutes (SEED=)
	@PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m tools.mutants --random 12 --seed "$${SEED:-$$(date -u +%Y%m%d%H)}" --minutes 2 --trusted

check: env  ## format, lint, types, import layers, fast tests
	$(BIN)/ruff format .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m pytest -q -m "not slow"

docs: env  ## write the config reference into README.md
	$(BIN)/python -m tools.config_reference README.md

clean:  ## remove caches, keep .venv and runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
