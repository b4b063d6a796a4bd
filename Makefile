# `make demo` and `make test` do all the set-up themselves. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test chaos check install

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "raysearch needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch>=2.9,<2.14"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/raysearch demo

test: install
	$(BIN)/python -m pytest -q

chaos: install
	$(BIN)/python -m pytest -q -m "slow or not slow" tests/end_to_end tests/search tests/study tests/trial

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy
