# Two commands do everything from a clean clone: `make demo` and `make test`. `make help` lists the others.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
# BIN and STAMP can be given on the command line to use an environment that is already there: make test BIN=/opt/env/bin STAMP=
BIN ?= $(VENV)/bin
STAMP ?= $(VENV)/.installed
RUN ?= $(BIN)/python -m relief_export
# Number of random networks for `make fuzz`, and processes for the tests.
N ?= 20000
JOBS ?= 2

include pipelines/rules.mk

.PHONY: help venv demo test check test-floors wheel docs reference pictures fuzz bench bench-scoring bench-formats bench-c results evidence evidence-status

help: ## Show the targets
	@grep -hE '^[a-z][a-zA-Z%-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

venv: $(STAMP) ## Make .venv with everything in it

$(VENV)/.installed: pyproject.toml pipelines/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c pipelines/constraints.txt -e '.[torch,test]'
	@touch $@

demo: digits-lenet5 ## Train, relieve, export and prove LeNet-5 on real digits; print what came of it
	@$(RUN) run digits-lenet5 --out $(BUILD)/digits-lenet5 $(SETTINGS)

test: check ## Make .venv if needed, then check

check: | $(STAMP) ## What CI runs: linter, formatter, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS)

FLOORS ?= build/floors
$(FLOORS)/.installed: pyproject.toml pipelines/floors.txt
	test -x $(FLOORS)/bin/python || $(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --disable-pip-version-check -c pipelines/floors.txt -e . filelock hypothesis pytest pytest-xdist 'setuptools>=77'
	@touch $@

test-floors: $(FLOORS)/.installed ## Test the rooms that need no torch with the oldest versions of what they stand on
	$(FLOORS)/bin/python -m pytest -n $(JOBS) -o filterwarnings=default tests/graph tests/formats tests/evaluation tests/report tests/test_cli.py

docs: ## Build the pages as a site into build/docs; a dead link is an error
	test -x build/docs-env/bin/python || $(PYTHON) -m venv build/docs-env
	build/docs-env/bin/python -m pip install --disable-pip-version-check -q 'furo>=2024' 'myst-parser>=4' 'sphinx>=8'
	build/docs-env/bin/python -m sphinx -W --keep-going -q -b html docs build/docs

reference: | $(STAMP) ## Write the reference pages that are made from the code
	$(BIN)/python -m docs.reference.generate

pictures: | $(STAMP) ## Draw the pictures of the pages
	$(BIN)/python -m docs.pictures.draw

RELEASE ?= build/release
wheel: ## Build sdist and wheel into dist/, check them, and try the wheel where there is no torch
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/python -m pip install --disable-pip-version-check -q build twine
	$(RELEASE)/tools/bin/python -m build --outdir dist .
	$(RELEASE)/tools/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(RELEASE)/clean
	$(RELEASE)/clean/bin/python -m pip install --disable-pip-version-check -q -c pipelines/constraints.txt dist/*.whl
	cp tests/wheel_smoke.py $(RELEASE)/ && cd $(RELEASE) && clean/bin/python wheel_smoke.py

fuzz: | $(STAMP) ## Shrink N random networks against ONNX Runtime (make fuzz N=20000; RELIEF_FUZZ_FIRST=K: from the K-th)
	RELIEF_FUZZ=$(N) $(BIN)/python -m pytest -n $(JOBS) tests/graph/test_fuzz.py

bench: digits-lenet5 ## Run every benchmark into benchmarks/results/
	$(BIN)/python -m benchmarks

bench-scoring bench-formats bench-c: bench-%: | $(STAMP) ## Run one benchmark
	$(BIN)/python -m benchmarks $*

results: | $(STAMP) ## Render docs/results.md from the records and benchmark results
	$(BIN)/python -m benchmarks.results

evidence: | $(STAMP) ## Run the list of pipelines/evidence.txt, going on where it was stopped (RUNS='NAME ...' for some of it)
	$(BIN)/python -m benchmarks.evidence --build '$(BUILD)' $(SETTINGS) $(RUNS)

evidence-status: | $(STAMP) ## Show how far the list is: accuracy, connections kept and time left, one line a run
	@$(BIN)/python -m benchmarks.evidence --build '$(BUILD)' --status
