# Needs python3 (3.10 to 3.13) with pip, and make. Everything else goes to .venv.

SHELL := /bin/bash
export PIP_ROOT_USER_ACTION := ignore
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
# The first Python that fits; override with make PYTHON=...
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	"$$python" -c '$(SUPPORTED)' 2>/dev/null && echo "$$python" && break; done)

# A .venv whose Python is gone or does not fit, or that was made in another folder, is made again.
HEALTHY := $(shell test -x $(PY) && $(PY) -c '$(SUPPORTED)' 2>/dev/null && grep -qxF '$(CURDIR)' $(STAMP) 2>/dev/null && echo yes)
ifneq ($(HEALTHY),yes)
.PHONY: $(STAMP)
endif

.PHONY: help demo test test-airflow mutants bench bench-large check lock clean venv env

help:  ## show these targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 21

venv: $(STAMP)  ## make or repair .venv with everything in requirements.txt

$(STAMP): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "expected Python 3.10 to 3.13 as python3, found none; set PYTHON=/path/to/python" >&2; exit 1; }
	@rm -f $(STAMP); \
	if ! { $(PY) -c '$(SUPPORTED)' && $(PY) -m pip --version && grep -qF '$(CURDIR)/$(VENV)' $(VENV)/bin/activate; } >/dev/null 2>&1; then \
		echo "making $(VENV) with $$($(PYTHON) --version)"; rm -rf $(VENV); \
		$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
			echo "this Python cannot make environments with pip; using virtualenv"; rm -rf $(VENV); \
			tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; \
			$(PYTHON) -m pip install --quiet --target "$$tools" virtualenv; \
			PYTHONPATH="$$tools" $(PYTHON) -m virtualenv --quiet $(VENV); }; \
	fi
	@echo "installing requirements.txt"
	@$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep -oE '^uv==[^ ;]+' requirements.txt)"
	@$(PY) -m uv pip install --quiet --compile-bytecode --python $(PY) -r requirements.txt
	@$(PY) -m uv pip install --quiet --python $(PY) --no-deps --no-build-isolation -e .
	@echo '$(CURDIR)' > $(STAMP)

demo: $(STAMP)  ## Delta tables -> hourly Airflow DAG -> a real Valkey server, in under three minutes
	@$(PY) demo/demo.py

test: $(STAMP)  ## every test, with the servers they need, and the coverage gate
	@$(PY) -m pytest -n 2 --dist loadgroup --cov --cov-report=term

test-airflow: $(STAMP)  ## the part of make test that runs a real Airflow: scheduler, API server, triggerer, browser
	@$(PY) -m pytest -n 2 --dist loadgroup -m airflow

mutants: $(STAMP)  ## plant bugs in copies of the package, one at a time: each must be caught
	@$(PY) -m tests.mutants

# The report of all suites is docs/benchmarks/; one of chosen suites goes elsewhere.
BENCH = @$(PY) benchmarks/report.py --out $(if $(SUITES),build/benchmarks --suites $(SUITES),docs/benchmarks)

bench: $(STAMP)  ## how fast this is beside its limits and peers: docs/benchmarks/bench.md, in ten minutes; or SUITES="load reads"
	$(BENCH) --scale bench

bench-large: $(STAMP)  ## the same up to 5 M entities x 200 features: docs/benchmarks/large.md, in hours
	$(BENCH) --scale large

check: $(STAMP)  ## lint, format, types, import contracts and the gate against slowness
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy --strict materialize
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" lint-imports --no-logo
	@$(PY) benchmarks/gate.py

lock: $(STAMP)  ## compile requirements.txt from pyproject.toml for Python 3.10 to 3.13
	@$(PY) -m uv pip compile --quiet --universal --python-version 3.10 --all-extras \
		--custom-compile-command "make lock" --no-emit-index-url --no-emit-find-links pyproject.toml -o requirements.txt

env:  ## write .env with fresh secrets for docker-compose.yaml, unless there is one (docs/docker.md)
	@$(PYTHON) scripts/make_env.py

clean:  ## remove .venv, caches and what the examples wrote
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis htmlcov .coverage .coverage.* build dist lake online.db*
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
