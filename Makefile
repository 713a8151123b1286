# Everything runs in .venv, which every target makes or reuses.
#   make demo     the quickstart notebook in a real kernel, its port asked with curl
#   make test     all tests that this machine can run
#   make lab      JupyterLab on the notebooks
#   make lint     formatters, linters, types, layers; of the panel's JavaScript and CSS, too
#   make soak     100,000 requests with faults of every kind: each has one outcome; up to five minutes
#   make simulate a million simulated servers, hours; SIMULATE_ARGS='0 10000': these seeds
#   make bench    against other servers, hours; BENCH_ARGS=--quick: in short
#                 BENCH_ARGS='--against COMMIT': against another commit of this project, 15 minutes
#   make measure  sizes of functions and classes, `Any`, layout of the tests; MEASURE_ARGS='--commit COMMIT'
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
FRONTEND := serving_kit/notebook/frontend
export DENO_NO_UPDATE_CHECK := 1

.PHONY: install demo lab test lint format soak simulate bench measure clean
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

# Only a comparison with other servers needs them installed.
SIMULATE_ARGS ?= 0 1000000
simulate: install
	$(BIN)/python -m tests.simulator $(SIMULATE_ARGS)

bench: install
	$(if $(findstring --against,$(BENCH_ARGS)),,benchmarks/setup.sh)
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

measure: install
	$(BIN)/python scripts/measure_code.py $(MEASURE_ARGS)

clean:
	rm -rf $(VENV) .venv-3.* .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist .out
