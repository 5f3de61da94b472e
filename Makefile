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

LARGE := runs/world_large/hps
results: install ## All that README and docs/results.md show of the world, then these pages (hours; resumes)
	$(BIN)/python -m stitchvm.world.gates --samples 200
	$(BIN)/python benchmarks/world_values.py --seeds 0 1 2 --vae-seeds 0
	$(BIN)/python benchmarks/world_truth.py --rollout-images 64 \
		--vae-stitch 'runs/world_values/{reward}/vae_stitch_1000_seed0/value_model'
	$(BIN)/python benchmarks/search_study.py --steps 60 --images 256
	test -d $(LARGE)/value_model || $(BIN)/stitchvm fit --config configs/distill_world_hps.yaml \
		--model.backbone.path world:sd3_large --model.stitch_point '[4,1]' --data.generated 2560 \
		--trainer.max_steps 1000 --trainer.default_root_dir $(LARGE)
	$(BIN)/python benchmarks/world_sampling.py --parts tables
	$(BIN)/python benchmarks/world_sampling.py --parts scaling --rewards aesthetic --prompts 64
	$(BIN)/python benchmarks/world_sampling.py --parts cross --rewards hps --prompts 64 --large-value $(LARGE)/value_model
	for reward in hps aesthetic clip; do $(BIN)/python benchmarks/world_within_prompt.py --reward $$reward || exit 1; done
	$(BIN)/python benchmarks/world_within_prompt.py --reward clip --output results/world/within_prompt_clip_drawn.json \
		--value runs/world_values/clip/stitched_1000_seed0/value_model
	$(BIN)/python benchmarks/world_alignment.py --parts methods windows controls --seeds 0 1 2
	$(BIN)/python benchmarks/world_alignment.py --parts scales
	$(BIN)/python benchmarks/readme.py

ROOT ?= $(HOME)/stitchvm-rehearsal
rehearsal: install ## Every config on random weights laid out as on the hub (tiny; resumes; ROOT=folder)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rehearsal.py --root $(ROOT)

docs: install ## Build the documentation into site/; every warning is an error
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean: ## Remove caches and runs/ (asks first)
	@read -p "remove runs/ and caches? [y/N] " answer && [ "$$answer" = y ] && rm -rf runs .pytest_cache .ruff_cache .mypy_cache
