# make demo   the whole way on a small cohort made from a seed, two to four minutes
# make test   lint, types, import rules and tests
# Both set up .venv by themselves the first time.
# make audit  known holes in the locked packages; asks a database over the network, and fails where it cannot

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# two at once; what is run with options of its own, such as tests that failed or take time, has the machine for itself
PYTEST_OPTIONS ?= --numprocesses 2 --no-loadscope-reorder
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint types pytest audit clean lock

demo: $(READY)
	$(BIN)/vnet demo

test: lint types pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# tests run side by side, and Ray would let its workers wait for all others
pytest: $(READY)
	RAY_worker_niceness=0 $(BIN)/python -m pytest $(PYTEST_OPTIONS)

audit:
	PYTHON=$(PYTHON) .ci/audit

# Every version is pinned; the project itself is installed from this folder.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements.lock
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --editable .
	touch $(READY)

# Resolve again after a change of pyproject.toml: a fresh environment, frozen; and the part of it that images need.
lock:
	rm -rf build/lock-venv
	$(PYTHON) -m venv build/lock-venv
	build/lock-venv/bin/pip install --disable-pip-version-check '.[test]'
	build/lock-venv/bin/pip freeze --exclude vnet-cohort | sed 's/+cpu$$//' > requirements.lock
	build/lock-venv/bin/python infra/runtime_lock.py > requirements-run.lock
	rm -rf build

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
