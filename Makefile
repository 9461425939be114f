# Everything a clone needs is made here: `make test` and `make demo` set up their own environment.
# A second call finds the environment as it is and starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SCENES := runs/scenes
SAM_ARGS := --sparsity 0.7 --calibration coco:$(SCENES)/calibration --evaluate coco:$(SCENES)/evaluation
SMOL_ARGS := --sparsity 0.6 --preset quick --baseline sparsegpt

.PHONY: help setup check unit test lint demo demo-vision bench bench-speed docker-check soak clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## Make .venv with lampctl and its development tools

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("lampctl needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

lint: $(READY) ## Format, lint and type checks, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: $(READY) ## Lint, and the tests that make no run, in less than a minute on 2 cores
	@$(MAKE) --no-print-directory --jobs 2 lint unit

unit: $(READY)
	$(BIN)/python -m pytest -m unit -n 2 --dist worksteal

# Three workers on two cores: the tests of kills, buckets and disks wait for a third of their time.
test: lint ## Lint, then the default tests: less than 8 minutes on 2 quiet cores
	$(BIN)/python -m pytest -m 'not slow and not smollm2 and not gpu' -n 3 --dist worksteal

demo: $(READY) ## Prune SmolLM2-135M to 60% and compare with SparseGPT (minutes on 2 quiet cores)
	$(BIN)/lampctl run smollm2-135m $(SMOL_ARGS)

demo-vision: $(READY) ## Prune sam-tiny to 70% and compare with SparseGPT, with pictures (minutes on 2 cores)
	$(BIN)/python examples/drawn_scenes.py $(SCENES)/calibration --count 128 --first 0
	$(BIN)/python examples/drawn_scenes.py $(SCENES)/evaluation --count 200
	$(BIN)/lampctl run examples/sam-tiny $(SAM_ARGS) --baseline sparsegpt
	$(BIN)/python examples/sam_predict.py examples/sam-tiny runs/sam-tiny-s70-sparsegpt/model \
		runs/sam-tiny-s70-lamp/model --titles dense,SparseGPT,LAMP --out runs/sam-tiny-s70.png

bench: $(READY) ## Quality on SmolLM2-135M: the core table of docs/benchmark.md (many hours)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks.quality

bench-speed: $(READY) ## Speed and memory: the table of docs/performance.md (an hour and a half on 2 quiet cores)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks.quality.peers
	$(BIN)/python benchmarks/speed.py

docker-check: ## Build the image and stop and resume a run in it (needs buildah; BASE=image, TORCH=torch)
	.ci/docker_check.sh

soak: $(READY) ## The long tests: real models, many kills
	$(BIN)/python -m pytest -n0 -s -m 'slow or smollm2 or gpu'

clean: ## Remove the environment and caches, never runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info build dist
