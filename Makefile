# make pretrain | finetune | test | test-all | style | quality. Each first sets up .venv with pinned dependencies, and of
# the optional ones those that it needs, if that is not done yet.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses 2 tests

.PHONY: pretrain finetune test test-slow test-all style quality
.NOTPARALLEL:
.DEFAULT_GOAL := pretrain

# For runs. Torch comes first: installed alone, no other package can pull in another version of it.
.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable ".[augmentation,elpv,pictures]"
	touch $@

# For tests and style.
.venv/installed-test: .venv/installed
	$(PIP) --editable ".[test]"
	touch $@

# An interrupted run goes on where it was; a finished one has its card.
pretrain: .venv/installed
	test -f outputs/elpv/README.md || $(BIN)/python run_mim.py examples/pretrain_elpv.yaml \
		--resume_from_checkpoint $(if $(wildcard outputs/elpv/checkpoint-*/trainer_state.json),true,false)
	@echo "Reconstructions: outputs/elpv/reconstruction.png (remove outputs/elpv to train anew)"

# What pre-training brings; finished runs are kept in outputs/elpv-studies.
finetune: pretrain
	$(BIN)/python benchmarks/elpv.py methods

# What to run before each commit.
test: .venv/installed-test
	$(PYTEST) -m "not slow"

# What test leaves out: the tests that Transformers' own models pass, several processes, conversions at full size, faults.
test-slow: .venv/installed-test .venv/transformers-tests
	$(PYTEST) -m slow

test-all: test test-slow

# Without them (and without a network) the other tests run.
.venv/transformers-tests: .venv/installed-test
	-$(BIN)/python tests/download_transformers_tests.py

style: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
