# `make help` lists the targets. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
BIN := .venv/bin
# The number of tests at a time, one thread each.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadgroup
# For pip, such as another index: a machine without a GPU is served well by torch's CPU wheels.
PIP_OPTIONS ?=
# For deepvit-bench, as KEY=VALUE, and for `uv pip compile`, such as --upgrade.
BENCH_OPTIONS ?=
LOCK_OPTIONS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-runs test-slow lint type format lock lock-check bench bench-data docs audit sbom clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_OPTIONS) --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install $(PIP_OPTIONS) --editable '.[dev]'
	touch $@

install: .venv/.installed ## install the commands into .venv, with all that they need
	@echo "installed: type 'source .venv/bin/activate', then deepvit-train --help"

demo: install ## train a re-attention DeepViT on real digits, evaluate it, and say how to watch it
	$(BIN)/deepvit-train name=demo
	$(BIN)/deepvit-eval checkpoint=runs/demo
	@echo "curves: $(BIN)/tensorboard --logdir runs"

test: .venv/.installed-dev ## run the tests of parts and of small runs: about seven minutes on two cores
	$(PYTEST) -m "not runs and not slow"

test-runs: .venv/.installed-dev ## run the tests of whole runs, kills and several ranks
	$(PYTEST) -m "runs and not slow"

test-slow: .venv/.installed-dev ## run all tests, those that take minutes too
	$(PYTEST) -m "slow or not slow"

lock: .venv/.installed-dev ## write requirements.lock anew: all packages by version and digest (needs the network)
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) uv
	$(BIN)/python -m scripts.lock write $(LOCK_OPTIONS)

lock-check: .venv/.installed-dev ## check that requirements.lock belongs to pyproject.toml
	$(BIN)/python -m scripts.lock check

bench: .venv/.installed-dev ## time plain and re-attention models side by side, with timm and vit-pytorch
	$(BIN)/deepvit-bench $(BENCH_OPTIONS)

bench-data: .venv/.installed-dev ## time the data pipeline beside timm's, and JPEG decoders
	$(BIN)/python -m scripts.bench_data --decoders

lint: .venv/.installed-dev ## check style, formatting and the layers of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

type: .venv/.installed-dev ## check types
	$(BIN)/basedpyright

format: .venv/.installed-dev ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/.installed-dev ## draw the picture of the house, and check the documents: links, commands, keys, records
	$(BIN)/python -m scripts.architecture
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_architecture.py tests/test_records.py

audit: .venv/.installed-dev ## look the installed packages up in PyPI's advisory database (needs the network)
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) pip-audit
	$(BIN)/pip-audit --skip-editable

sbom: .venv/.installed-dev ## write a CycloneDX list of the installed packages to dist/sbom.json
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) cyclonedx-bom
	mkdir -p dist
	$(BIN)/cyclonedx-py environment --output-file dist/sbom.json .venv/bin/python

clean: ## remove what was made here, runs/ excepted
	rm -rf .venv dist build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
