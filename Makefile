# make pretrain | finetune | test | style | quality. Each sets up .venv with pinned dependencies first, if that is not done yet.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: pretrain finetune test style quality
.DEFAULT_GOAL := pretrain

# Torch comes first: installed alone, no other package can pull in another version of it.
.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

# An interrupted run goes on where it was; a finished one has its card.
pretrain: .venv/installed
	test -f outputs/elpv/README.md || $(BIN)/python run_mim.py examples/pretrain_elpv.yaml \
		--resume_from_checkpoint $(if $(wildcard outputs/elpv/checkpoint-*/trainer_state.json),true,false)
	@echo "Reconstructions: outputs/elpv/reconstruction.png (remove outputs/elpv to train anew)"

# What pre-training brings; finished runs are kept in outputs/elpv-studies.
finetune: pretrain
	$(BIN)/python benchmarks/elpv.py methods

# The tests that Transformers' own models pass; without them the others run.
.venv/transformers-tests: .venv/installed
	-$(BIN)/python tests/download_transformers_tests.py

test: .venv/installed .venv/transformers-tests
	$(BIN)/python -m pytest --numprocesses 2 tests

style: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
