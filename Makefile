PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
DEMO_HOME ?= demo-home

.PHONY: help install test test-slow check format demo dist docs bench system clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(READY)  ## make the environment in .venv

# torch comes first, pinned: a later range is then satisfied and pulls no build for a GPU.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: $(READY)  ## run the tests, a process per core (about fifteen minutes on two)
	$(BIN)/python -m pytest -m 'not slow' -n auto --dist loadfile

test-slow: $(READY)  ## run the long sweeps too
	$(BIN)/python -m pytest

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(READY)  ## train a base and experts on real data, run the daemon, show the table
	rm -rf $(DEMO_HOME)
	$(BIN)/mainstem demo --home $(DEMO_HOME)

dist: $(READY)  ## build the wheel and the source archive into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

docs: $(READY)  ## write the generated parts of docs/
	$(BIN)/python -m docs.generate
	$(BIN)/python -m bench.side_by_side

system:  ## Debian's Prometheus and Chromium for the tests that use them (as root)
	apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus chromium

# W: a folder on the disk to measure, with 15 GB free; the checkpoints made there stay, to be used again.
# FUSIONBENCH_PYTHON, MERGEKIT_PYTHON: the other tools' pythons (bench/README.md); without one its rows say so.
W ?= bench-work
CLIP ?= $(W)/clip
LLAMA ?= $(W)/llama

bench: $(READY) $(CLIP)/expert-005/model.safetensors $(LLAMA)/expert-003/model.safetensors  ## measure (needs W=FOLDER)
	$(BIN)/python -m bench.opcm $(CLIP) --experts 6
	$(BIN)/python -m bench.mean $(CLIP) --experts 6
	$(BIN)/python -m bench.llama $(LLAMA)
	mkdir -p $(W)
	$(BIN)/python -m bench.adapters $(LLAMA)
	$(BIN)/python -m bench.download $(CLIP) --experts 4
	$(BIN)/python -m bench.growth_experts $(W)
	$(BIN)/python -m bench.growth_size $(W)
	$(BIN)/python -m bench.gpu
	$(BIN)/python -m bench.report

$(CLIP)/expert-005/model.safetensors: | $(READY)
	$(BIN)/python -m bench.clip_shapes $(CLIP) --experts 6

$(LLAMA)/expert-003/model.safetensors: | $(READY)
	$(BIN)/python -m bench.llama_shapes $(LLAMA) --experts 4

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist $(DEMO_HOME)
