# `make help` lists the targets. The first one that needs it makes .venv, with the versions pinned in constraints.txt.

PYTHON      ?= python3
WORKDIR     ?= runs/demo
ARGS        ?=
PYTEST_ARGS ?= -n auto --dist loadfile --no-loadscope-reorder

override VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo federation test test-slow lint types docs links clean

help:
	@echo 'make demo    train a small federation on the text that is already here, into $(WORKDIR)'
	@echo 'make federation  a server and three clients in processes of their own, and the difference to the simulation'
	@echo 'make test    the tests, but for the slow ones'
	@echo 'make test-slow  the slow ones: whole commands, killed and started again, several devices, benchmarks'
	@echo 'make lint    ruff, of format and of faults, and the arrows between modules'
	@echo 'make types   mypy'
	@echo 'make docs    the documentation as a site, in site/; its notebook is run, at a small size'
	@echo 'make links   the links of that site to other sites, too, which takes the network'
	@echo 'make clean   remove $(VENV), caches and build products; runs/ stays'
	@echo
	@echo 'Variables: PYTHON=python3.12, WORKDIR=DIR and ARGS="--config.KEY=VALUE ..." (demo), PYTEST_ARGS="-n 2 -k NAME" (test)'

demo: $(VENV)/.runtime
	$(BIN)/python -m fedbert_jax.main --config configs/demo.py --workdir "$(WORKDIR)" $(ARGS)

federation: $(VENV)/.runtime
	$(BIN)/python launch/federation.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST_ARGS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/.test
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --quiet
	NOTEBOOK_ROUNDS=4 NOTEBOOK_PLACE="$$(mktemp -d)" $(BIN)/python -m pytest --nbmake --nbmake-timeout=1200 docs/notebooks

clean:
	rm -rf $(VENV) build dist site fedbert_jax.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find . -name .git -prune -o -path ./runs -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# A stamp is newer than what it was installed from. The package is installed editable, so its own code never makes one old;
# the tests' packages include the runtime's.

$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(ensure_venv)
	@echo 'Installing the runtime packages into $(VENV) (a few minutes the first time)'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	@$(ensure_venv)
	@echo 'Installing the runtime and test packages into $(VENV) (a few minutes the first time)'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $(VENV)/.runtime $@

links: $(VENV)/.docs
	$(BIN)/mkdocs build --quiet
	$(BIN)/linkchecker --config docs/links.ini --check-extern site/index.html

$(VENV)/.docs: $(VENV)/.test
	@echo 'Installing what the documentation is built with into $(VENV)'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

# Makes .venv unless there is one that works (it may be half made, or its Python gone).
define ensure_venv
$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
  command -v "$(PYTHON)" >/dev/null 2>&1 || { \
    echo "fedbert_jax needs Python 3.11, 3.12 or 3.13, and there is no '$(PYTHON)' here: install one, or name it with 'make PYTHON=/path/to/python3.12'." >&2; exit 1; }; \
  "$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
    echo "fedbert_jax needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1): name another with 'make PYTHON=/path/to/python3.12'." >&2; exit 1; }; \
  "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
    echo "'$(PYTHON)' has no venv module, which .venv is made with: install it (Debian and Ubuntu: apt install python3-venv) or name another Python with 'make PYTHON=/path/to/python3.12'." >&2; exit 1; }; \
  echo "Making $(VENV) with $$("$(PYTHON)" --version 2>&1)"; \
  "$(PYTHON)" -m venv --clear $(VENV); }
endef
