# Every target sets up .venv where it is missing, or where setup.py or constraints.txt has changed.
PYTHON ?= python3

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test test-oldest lint bench gate record clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
PACKAGE := .venv/package.stamp
DEV := .venv/dev.stamp
OLDEST := .venv/triton-3.6
OLDEST_PIP := .venv-oldest/bin/python -m pip --disable-pip-version-check install --constraint .venv-oldest/constraints.txt

help:
	@echo "make demo   train a supernet, search it and export the best placement (runs/demo/)"
	@echo "make test   run the tests"
	@echo "make test-oldest   run them with the oldest torch and Triton that setup.py allows"
	@echo "make lint   run ruff and mypy"
	@echo "make bench  run the microbenchmarks, against peers, on the CPU"
	@echo "make gate   fail where a kernel takes more, or got slower against its peers, than recorded"
	@echo "make record write the benchmarks' results to bench/results/ and into the README"
	@echo "make clean  remove .venv and what the tools left behind; runs/ stays"

# Its tensors are tiny, and threads that wait for each other crawl where others use the cores.
demo: $(PACKAGE)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python examples/demo.py

# Files start in their order: the one that compiles for minutes would else be the last.
test: $(DEV) $(OLDEST)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder tests

# Compiling with that Triton is a part of `make test`.
test-oldest: .venv-oldest/stamp
	.venv-oldest/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --ignore tests/autotune/test_inspection.py tests

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV)
	$(BIN)/python -m pytest bench

gate: $(DEV)
	$(BIN)/python -m bench.gate

record: $(DEV)
	$(BIN)/python -m bench.record
	$(BIN)/python -m bench.table

clean:
	rm -rf .venv .venv-oldest build dist tossup.egg-info
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and shows its progress: it is by far the largest download.
$(PACKAGE): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Tossup needs Python 3.11 or newer, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.11 …")'
	@echo "Setting up .venv (1 of 2): torch"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@echo "Setting up .venv (2 of 2): Tossup"
	@$(PIP) --quiet --editable '.[report]'
	@touch $@

# mamba-ssm is an oracle: only its Python is wanted, so that its CUDA build is skipped.
# Hugging Face's kernels is there because its name is that of our folder, which must not matter.
$(DEV): $(PACKAGE)
	@echo "Setting up .venv for development (1 of 2): tools"
	@$(PIP) --quiet --editable '.[dev]'
	@echo "Setting up .venv for development (2 of 2): what tests compare with"
	@MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
		$(PIP) --quiet --no-deps --no-build-isolation mamba-ssm kernels
	@touch $@

# The oldest Triton that torch may bring: kernels are compiled with it too, beside the newest.
$(OLDEST): $(PACKAGE)
	@echo "Setting up Triton 3.6, with which the kernels are compiled too"
	@$(PIP) --quiet --no-deps --upgrade --target $@ triton==3.6.0
	@touch $@

# torch's CUDA build, which also runs on a CPU; others pin no Triton. The interpreter of Triton 3.6
# takes no numpy from 2.4 on, torch 2.11 no setuptools from 82 on, and no older one than 70.1 makes
# wheels by itself.
.venv-oldest/stamp: setup.py constraints.txt
	@rm -rf .venv-oldest
	@$(PYTHON) -m venv .venv-oldest
	@grep -vE '^(torch|numpy|setuptools|fsspec|networkx|sympy)==' constraints.txt >.venv-oldest/constraints.txt
	@$(OLDEST_PIP) torch==2.11.0 'numpy<2.4' 'setuptools>=70.1,<82'
	@$(OLDEST_PIP) --quiet --editable '.[dev]'
	@MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
		$(OLDEST_PIP) --quiet --no-deps --no-build-isolation mamba-ssm kernels
	@touch $@
