PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
DEMO_HOME ?= demo-home

# The tests start many interpreters, which need not compile the same files again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install test test-slow check format demo dist docs bench gpu-wheels system clean

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

# One process more than there are cores: a test waits for the disk and for what others do as long as it computes.
test: $(READY)  ## run the tests, on all cores (about ten minutes on two)
	$(BIN)/python -m pytest -m 'not slow' -n $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder --durations 10

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

system:  ## Debian's Prometheus, Alertmanager, Chromium and systemd for the tests that use them (as root)
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends prometheus prometheus-alertmanager chromium systemd

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
	$(BIN)/python -m bench.gate $(W)
	$(BIN)/python -m bench.restart $(CLIP)
	$(BIN)/python -m bench.scrape $(W)
	$(BIN)/python -m bench.webhooks $(W)
	$(BIN)/python -m bench.gpu
	$(BIN)/python -m bench.report

QUALITY ?= build/quality

quality: $(READY)  ## which method when, on real experts: under three hours, goes on where it was (QUALITY=FOLDER)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[quality]'
	$(BIN)/python -m bench.quality --cache $(QUALITY)
	$(BIN)/python -m bench.quality.report

# For a machine with torch, a card and no network (bench/gpu.sh). GPU_PYTHON: the version of that machine's python.
GPU_PYTHON ?= 3.12
GPU_PLATFORMS = 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17
GPU_PIP = --quiet --no-deps --no-cache-dir --python-version $(GPU_PYTHON) --implementation cp \
	$(foreach glibc,$(GPU_PLATFORMS),--platform manylinux_$(glibc)_x86_64) --platform manylinux2014_x86_64 \
	--platform manylinux1_x86_64

gpu-wheels: $(READY)  ## fetch what bench/gpu.sh needs on a machine without a network, into gpu-wheels/
	rm -rf gpu-wheels
	grep -v antlr4 bench/gpu_wheels/fusionbench.txt > $(VENV)/fusionbench.txt
	$(BIN)/python -m pip download $(GPU_PIP) --only-binary=:all: -d gpu-wheels/mainstem -r bench/gpu_wheels/mainstem.txt
	$(BIN)/python -m pip download $(GPU_PIP) --only-binary=:all: -d gpu-wheels/fusionbench -r $(VENV)/fusionbench.txt
	$(BIN)/python -m pip wheel --quiet --no-deps -w gpu-wheels/fusionbench antlr4-python3-runtime==4.9.3
	@test $$(du -sm gpu-wheels | cut -f1) -le 60 || { echo "gpu-wheels is larger than 60 MiB"; exit 1; }
	@du -sh gpu-wheels

$(CLIP)/expert-005/model.safetensors: | $(READY)
	$(BIN)/python -m bench.clip_shapes $(CLIP) --experts 6

$(LLAMA)/expert-003/model.safetensors: | $(READY)
	$(BIN)/python -m bench.llama_shapes $(LLAMA) --experts 4

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist $(DEMO_HOME)
