# `make demo` and `make check` set up whatever they need: a fresh machine has Python >= 3.11, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo check lint types imports reports-current test lab report bench bench-gpu bench-gpu-dry progress clean

help:  ## this list
	@grep -hE '^[a-z0-9%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 22

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: install a newer Python, or name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)"; exit 1; }

# Two stages, so that the demo does not wait for linters: the engine, then everything that develops and teaches.
$(VENV)/.engine: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up the engine in $(VENV) (once, a minute or two) ..."
	@$(PIP) -e . && touch $@

$(VENV)/.development: pyproject.toml constraints.txt | $(VENV)/.engine
	@echo "setting up tests, linters and notebooks in $(VENV) (once, a minute or two) ..."
	@$(PIP) -e '.[development,notebooks]' && touch $@ $(VENV)/.engine

setup: $(VENV)/.development  ## create .venv with everything that the project needs

demo: $(VENV)/.engine  ## generate text with the newest engine, on a GPU if there is one
	@$(BIN)/titan demo

check: lint types imports reports-current test  ## lint, types, import order, reports up to date, all tests

lint: $(VENV)/.development
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: $(VENV)/.development
	@$(BIN)/mypy

imports: $(VENV)/.development
	@$(BIN)/lint-imports --no-cache

test: $(VENV)/.development
	@GOMP_SPINCOUNT=1000 $(BIN)/pytest -n 2 --dist worksteal  # two processes compute on the same cores

start-phase%: $(VENV)/.development  ## copy a phase's framework into workspace/, to be made fast by you
	@$(BIN)/titan start phase$*

check-phase%: $(VENV)/.development  ## grade a phase: exactness, counts, ratios (IMPL=mine|framework|solution)
	@$(BIN)/titan check phase$*

hint-phase%: $(VENV)/.development  ## the next hint (TASK=0.1)
	@$(BIN)/titan hint phase$* $(TASK)

reset-phase%: $(VENV)/.development  ## restore the framework's files in workspace/ (PART=kv_cache)
	@$(BIN)/titan reset phase$* $(PART)

progress: $(VENV)/.development  ## gates, hints and skips of every phase
	@$(BIN)/titan progress

bench: $(VENV)/.development  ## run every phase's benchmark on this machine and record the results
	@for room in phase*_*/; do [ ! -f $$room/benchmark.py ] || $(BIN)/python -m $${room%/}.benchmark || exit 1; done

bench-gpu: $(VENV)/.development  ## everything that needs a GPU, most valuable first (BUDGET=540 seconds, resumable)
	@$(BIN)/python -m module0_profiling.bench_gpu --budget $(or $(BUDGET),540)

bench-gpu-dry: $(VENV)/.development  ## start everything that needs a GPU with tiny sizes on the CPU: records nothing
	@$(BIN)/python -m module0_profiling.bench_gpu --dry-run

reports-current: $(VENV)/.development
	@$(BIN)/python -m module0_profiling.report --check

lab: $(VENV)/.development  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=.

report: $(VENV)/.development  ## regenerate reports, tables and figures from reports/results
	@$(BIN)/python -m module0_profiling.report

clean:  ## remove .venv and everything generated that git ignores (not your workspace)
	@rm -rf $(VENV) build
