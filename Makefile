# One command per task; each makes the virtual environment that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The site is built without the package's own requirements, so in a virtual environment of its own.
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_DEFAULT_TIMEOUT ?= 180

.PHONY: demo test test-fast lint docs bench

# Trains one causal language model with Shampoo and with AdamW and draws both curves: demo_output/.
demo: $(STAMP)
	$(BIN)/python examples/demo.py --output_dir demo_output

# Two workers: each works on one launch of ranks, or on one file, at a time.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope

# The tests that start no other process and take less than a minute.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow" --ignore=tests/distributed

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, into build/site; a broken link is an error.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# torch comes first: DeepSpeed's source build needs it, and the constraint picks its version.
# pip installs nothing twice, so a stale stamp costs only seconds.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	touch $@

$(DOCS_STAMP): docs/site/requirements.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -r docs/site/requirements.txt
	touch $@
