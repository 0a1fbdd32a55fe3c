# `make demo` and `make test` need Python 3.11 or newer, pip and make; each sets up .venv on its own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps say what is installed; a change of the requirements installs anew.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing eggroll with PyTorch into $(VENV)"
	$(PIP_INSTALL) -e '.[torch,examples]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing eggroll with every backend and the development tools into $(VENV)"
	$(PIP_INSTALL) -e '.[torch,jax,examples,dev]'
	@touch $@ $(VENV)/.demo
