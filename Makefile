# StitchVM: `make demo` and `make test` do their own set-up.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo test test-quick lint format types world bench results docs rehearsal clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

install: $(VENV)/installed ## Make .venv/ with everything in it

demo: install ## The embedded world: search, distil, test against both baselines, draw (minutes on 2 cores)
	$(BIN)/python -m stitchvm.world.demo

test: install ## Every test that needs no GPU, killed processes, DDP and FSDP2 included (CPU, offline)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not gpu' -n 2 --dist loadfile

test-quick: install ## The tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not slow and not gpu' -n 2 --dist loadfile

lint: install ## ruff: lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## ruff: mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## mypy
	$(BIN)/mypy

world: install ## Train every network of the embedded world from scratch (hours on 2 cores; resumes)
	$(BIN)/python -m stitchvm.world.train --stage all

bench: install ## Stage 1, stage 2, sampling and fine-tuning on the world: rates, their split, utilisation
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/training.py

results: install ## All that README and docs/results.md show of the world, then these pages (hours; resumes)
	$(BIN)/python -m stitchvm.world.gates
	$(BIN)/python benchmarks/world_values.py
	$(BIN)/python benchmarks/search_study.py
	$(BIN)/python benchmarks/world_sampling.py
	$(BIN)/python benchmarks/world_alignment.py --seeds 0 1 2
	$(BIN)/python benchmarks/readme.py

ROOT ?= $(HOME)/stitchvm-rehearsal
rehearsal: install ## Every config on random weights laid out as on the hub (tiny; resumes; ROOT=folder)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rehearsal.py --root $(ROOT)

docs: install ## Build the documentation into site/; every warning is an error
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean: ## Remove caches and runs/ (asks first)
	@read -p "remove runs/ and caches? [y/N] " answer && [ "$$answer" = y ] && rm -rf runs .pytest_cache .ruff_cache .mypy_cache
