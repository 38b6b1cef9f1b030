# Every command of the project. `make sweep` and `make test` set up their own environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests mostly compile, which one process does on one core; those of a file share programs.
PARALLEL := --numprocesses=auto --maxprocesses=8 --dist=loadfile
# A package with __all__ shows its modules in the API reference only if they are named.
MODULES = $(sort $(subst /,.,$(patsubst %/__init__,%,$(basename $(shell find jaxprune -name '*.py')))))

.DEFAULT_GOAL := help
.PHONY: help env sweep real headline figures gallery docs notebook dist test test-slow mutants coverage bench bench-gpu lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . --group dev
	touch $(READY)

env: $(READY) ## the environment alone, in .venv

sweep: $(READY) ## the paper's synthetic experiment (Figure 2): runs/synthetic
	$(BIN)/python experiments/synthetic.py --resume --out runs/synthetic

# Files of your own: `make real TEXT=FILE`; some rows alone: `make real ROWS='qk-*'`.
real: $(READY) ## every method on SmolLM2-135M, fetched once (about four hours): runs/smollm2
	$(BIN)/python experiments/real.py --resume $(if $(TEXT),--calibration '$(TEXT)' --out runs/smollm2-text,--out runs/smollm2) $(if $(ROWS),--rows '$(ROWS)') $(if $(TEXT)$(ROWS),,--save docs/smollm2_zoo)

headline: $(READY) ## the table of the embedded model, printed (says how long it takes): runs/headline
	$(BIN)/python experiments/ablation.py --variants descent closed_form mask_only admm wanda sparsegpt magnitude --sparsity 0.5 0.7 2:4 --resume --out runs/headline
	$(BIN)/python tools/headline.py --run runs/headline

figures: $(READY) ## draw the figures of finished runs again from their saved metrics
	@for name in synthetic llama_heads fused_perplexity regimes convergence benchmark; do \
	  if [ -f runs/$$name/metrics.csv ]; then \
	    $(BIN)/python experiments/$$name.py --redraw --out runs/$$name || exit $$?; \
	  fi; \
	done

gallery: $(READY) ## docs/gallery.md with the figures of finished runs
	$(BIN)/python tools/gallery.py

docs: $(READY) ## API reference from docstrings: docs/api/index.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group docs
	PYTHONWARNINGS='ignore:Error parsing type annotation,ignore:The module specification' $(BIN)/python -m pdoc --docformat google --output-directory docs/api $(MODULES)

notebook: $(READY) ## the tutorial with its outputs (minutes): docs/tutorial.ipynb
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group docs
	TQDM_DISABLE=1 $(BIN)/jupytext --to notebook --set-kernel python3 --run-path . --execute --output docs/tutorial.ipynb docs/tutorial.py

dist: $(READY) ## wheel and source distribution, checked: dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group dist
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

test: $(READY) ## the tests of a few minutes
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow"

test-slow: $(READY) ## the others: kills by signal, memory limits, long fuzzing, whole runs
	$(BIN)/python -m pytest -q $(PARALLEL) --dist=worksteal -m slow

mutants: $(READY) ## changes to the source that tests must notice (minutes)
	$(BIN)/python tests/mutants.py

coverage: $(READY) ## lines of jaxprune/ that `make test` runs; fails below 95%
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow" --cov=jaxprune --cov-report=term-missing:skip-covered --cov-fail-under=95

bench: $(READY) ## speed and memory against products and PyTorch: runs/benchmark
	$(BIN)/python experiments/benchmark.py --resume --out runs/benchmark

bench-gpu: $(READY) ## on a GPU: the kernel, growth, a run of Llama-3.2-1B's shape
	$(BIN)/python -m pip install --quiet 'jax[cuda12]'
	$(BIN)/python experiments/benchmark.py --resume --parts kernel loss growth memory llama --out runs/benchmark-gpu

lint: $(READY) ## style, formatting, types, imports that run downwards only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and runs
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
