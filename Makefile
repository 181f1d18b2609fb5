# Every target makes its own virtual environment on first use; a second run starts at once.
#
#   PYTHON     the interpreter that makes the environment              (default: python3)
#   VENV       where the environment lives                             (default: .venv)
#   LOWEST     where that of `make test-lowest` lives                  (default: .venv-lowest)
#   PIP_FLAGS  more flags for pip, such as an index of CPU-only builds of torch
#   ARGS       passed on: make demo ARGS="--steps 100", make test ARGS="-k reduction"
#   WORKERS    processes that run the tests, each on one thread         (default: one a core)

PYTHON ?= python3
VENV ?= .venv
LOWEST ?= $(VENV)-lowest
PIP_FLAGS ?=
ARGS ?=
WORKERS ?= auto

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt
# A file's tests stay in one process, where they share what is costly to make.
PYTEST := -m pytest -q -n $(WORKERS) --dist loadfile
# Some images of containers turn bytecode off. Without it every worker, and every process that a test
# starts, compiles the package and the tests again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-lowest coverage lint bench docs wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## train, distil, generate and measure, in a few minutes
	$(BIN)/gramian demo $(ARGS)

test: $(VENV)/installed-dev ## the tests, but for the slow ones
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/installed-dev ## every test
	$(BIN)/python $(PYTEST) $(ARGS)

test-lowest: $(LOWEST)/installed ## the tests, with the lowest versions that pyproject.toml accepts
	$(LOWEST)/bin/python $(PYTEST) -m "not slow" $(ARGS)

coverage: $(VENV)/installed-dev ## the tests of `make test`, with the share of lines and branches that they run
	rm -f .coverage .coverage.*
	$(BIN)/coverage run $(PYTEST) -m "not slow" $(ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

lint: $(VENV)/installed-dev ## ruff (rules and format), mypy and the layers of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/installed-dev ## every benchmark; each measures both sides and writes JSON
	@for script in benchmarks/[a-z]*.py; do \
		echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; \
	done

# The variable silences an announcement of the theme's authors about its successor.
docs: $(VENV)/installed-docs ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

wheel: $(VENV)/installed ## a wheel, into dist/, installed by itself without extras and imported
	rm -rf dist
	$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --wheel-dir dist .
	$(BIN)/python .ci/bare.py dist/gramian-*.whl

clean: ## remove the environment and everything that tools left behind
	rm -rf $(VENV) $(LOWEST) demo-output dist site .coverage .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The extras that the lowest torch is enough for; the tests of the others leave themselves out. uv finds
# the lowest versions that fit together, among those of all indexes. The tools of the tests are new.
LOWEST_EXTRAS := cli,evaluate,genomics,gguf,train
$(LOWEST)/installed: $(REQUIREMENTS)
	@echo "Installing gramian with the lowest versions into $(LOWEST)"
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check uv
	@$(LOWEST)/bin/uv pip install -q --python $(LOWEST)/bin/python --resolution lowest-direct \
		--index-strategy unsafe-best-match $(PIP_FLAGS) --editable ".[$(LOWEST_EXTRAS)]"
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check \
		control pymor pytest pytest-xdist scipy
	@touch $@

# torch comes first, by itself, so that nothing else decides which build of it is taken.
$(VENV)/torch: constraints.txt
	@echo "Installing PyTorch into $(VENV) (once; it takes a minute or so)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@touch $@

$(VENV)/installed: $(VENV)/torch $(REQUIREMENTS)
	@echo "Installing gramian into $(VENV)"
	@$(PIP) --editable ".[all]"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing the development tools into $(VENV)"
	@$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	@echo "Installing the documentation tools into $(VENV)"
	@$(PIP) --editable ".[docs]"
	@touch $@
