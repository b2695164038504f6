# `make train` and `make test` need only Python >= 3.10.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: train test test-all check bench clean

train: $(VENV)/ready
	$(BIN)/python tools/train.py configs/gpt/stdlib.py

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not ecosystem"

test-all: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 -m "not ecosystem"

check: $(VENV)/ready
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check . && $(BIN)/python -m mypy

bench: $(VENV)/ready
	$(BIN)/python benchmarks/step_overhead.py && $(BIN)/python benchmarks/startup.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
