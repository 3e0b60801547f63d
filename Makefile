# Everything runs in .venv, made from constraints.txt on first use.
#
#   make demo      train on examples/digits and write a report
#   make test      lint, types and tests, about a quarter of an hour
#   make test-all  also the tests marked slow, about an hour in all
#
# PYTHON     the interpreter to make .venv with (3.11)
# PIP_FLAGS  passed to pip, for example an index with another build of torch (see README.md)

PYTHON ?= python3.11
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
# One thread each, where several processes share the cores: more would wait for one another. The
# processes that tests start keep what Python compiled, whatever the shell says.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: demo test test-all lint setup clean

demo: setup
	$(BIN)/raydiffusion run examples/digits/digits.toml

test: lint
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder

test-all: test
	$(PYTEST) -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

setup: $(VENV)/.complete

# The mark is written last, so that an interrupted set-up starts again.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt pip setuptools
	$(BIN)/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt torch
	$(BIN)/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --no-build-isolation \
		--editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
