# make          shows the targets
# make test     sets up .venv if needed, then runs the fast tests

PYTHON ?= python3
VENV ?= .venv
# pip takes torch from its default index. On a fresh Linux machine that may be a CUDA build of several GB. For another build:
#   make venv TORCH_INDEX=URL      with the URL of an index of PyTorch (pytorch.org, "Get Started", lists them)
TORCH_INDEX ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
TEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.turboquant-installed
# Tests are many small computations: more threads than one only get in each other's way.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow lint bench clean

help: ## Show this help.
	@echo "Targets (variables: PYTHON, VENV, TORCH_INDEX, TEST_ARGS, DEMO_ARGS, BENCH_ARGS):"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

venv: $(STAMP) ## Set up the virtual environment; does nothing if it is up to date.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP) ## Compress the cache of a small model and show what it costs.
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(STAMP) ## Run the fast tests.
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 $(TEST_ARGS)

test-slow: $(STAMP) ## Run all tests, those that take minutes included.
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --slow $(TEST_ARGS)

lint: $(STAMP) ## Check style, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## Run the benchmarks.
	@set -e; found=; for f in benchmarks/bench_*.py; do \
		[ -e "$$f" ] || continue; found=1; \
		echo "== $$f"; $(BIN)/python "$$f" $(BENCH_ARGS); \
	done; [ -n "$$found" ] || { echo "there are no benchmarks/bench_*.py"; exit 1; }

clean: ## Remove caches and build products; the virtual environment stays.
	rm -rf build dist htmlcov .coverage .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
