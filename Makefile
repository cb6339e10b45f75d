# Shoal's tasks. Each makes .venv and installs what it needs; a second call does nothing twice.
#
#   PYTHON=python3.12     another interpreter (3.11 or newer)
#   PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                         further arguments for pip, here for a build of torch without CUDA
#   ARGS="--seed 1"       further arguments for the command behind demo, test and bench

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
ARGS ?=
NAME ?=

# Where several processes share the cores, one thread each is fastest.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo loop test test-all lint format bench docs release clean

help: ## Show this list.
	@grep -hE '^[a-z.-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv: $(VENV)/.runtime ## Make the environment that running Shoal needs.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Shoal needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) lacks the venv module. On Debian and Ubuntu: apt-get install -y python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@

demo: $(VENV)/.runtime ## Post-train the embedded model on arithmetic, and show what it learnt.
	$(BIN)/shoal demo $(ARGS)

loop: $(VENV)/.dev ## Everything at once for half an hour: serve, act, remember, train; with a report.
	$(BIN)/shoal loop configs/loop.toml $(ARGS)

test: $(VENV)/.dev ## Run the quick tests (under ten minutes on two cores).
	$(TEST) -n 2 -m "not slow" $(ARGS)

test-all: $(VENV)/.dev ## Run all tests (under an hour).
	$(TEST) -n 2 $(ARGS)

lint: $(VENV)/.dev ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Rewrite the code in the house's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Run a benchmark: make bench NAME=engine. Without NAME, list them.
	$(BIN)/shoal bench $(NAME) $(ARGS)

docs: $(VENV)/.dev ## Build the documentation, strictly, into build/docs/site.
	$(BIN)/python docs/site/build.py

$(VENV)/.release: $(VENV)/.dev
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS) -e '.[release]'
	@touch $@

release: $(VENV)/.release ## Make in dist/ what a release is: the wheel, locks with hashes, bill of materials, licences.
	$(BIN)/python deploy/release.py

clean: ## Remove the environment and all caches; runs/ stays.
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
