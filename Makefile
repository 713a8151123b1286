# Everything runs in .venv, which every target makes or reuses.
#   make demo     the quickstart notebook in a real kernel, its port asked with curl
#   make test     all tests that this machine can run
#   make lab      JupyterLab on the notebooks
#   make lint     formatters, linters, types, layers; of the panel's JavaScript and CSS, too
#   make soak     100,000 requests while everything goes wrong: nothing may be lost; up to five minutes
#   make bench    against other servers, half an hour; BENCH_ARGS=--quick: ten minutes
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
FRONTEND := serving_kit/notebook/frontend
export DENO_NO_UPDATE_CHECK := 1

.PHONY: install demo lab test lint format soak bench clean
.DEFAULT_GOAL := install

install: $(VENV)/.installed

# The constraints pin what development uses; pyproject.toml says what is supported.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: install
	$(BIN)/python scripts/run_notebook.py notebooks/01_quickstart.ipynb

lab: install
	$(BIN)/jupyter lab --notebook-dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	scripts/test_other_pythons.sh

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deno fmt --quiet --check
	$(BIN)/deno lint --quiet
	$(BIN)/deno check --quiet $(FRONTEND)/*.js

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/deno fmt --quiet
	$(BIN)/deno lint --quiet --fix

soak: install
	$(BIN)/python scripts/soak.py $(SOAK_ARGS)

bench: install
	benchmarks/setup.sh
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) .venv-3.* .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist .out
