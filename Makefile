# `make demo` and `make check` set up whatever they need: a fresh machine has Python >= 3.11, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo check lint types imports test lab report bench bench-gpu progress clean

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

check: lint types imports test  ## lint, types, import order of the phases, all tests

lint: $(VENV)/.development
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: $(VENV)/.development
	@$(BIN)/mypy

imports: $(VENV)/.development
	@$(BIN)/lint-imports --no-cache

test: $(VENV)/.development
	@$(BIN)/pytest -n 2 --dist worksteal

lab: $(VENV)/.development  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=.

report: $(VENV)/.development  ## regenerate reports, tables and figures from reports/results
	@$(BIN)/python -m module0_profiling.report

clean:  ## remove .venv and everything generated that git ignores (not your workspace)
	@rm -rf $(VENV) build
