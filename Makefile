# Every target sets up .venv by itself the first time. `make` alone lists them.

PYTHON ?= python3
SHELL  := /bin/bash
BIN    := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Set up again only when one of these changed.
SOURCES := setup.py settings.ini pyproject.toml .ci/setup.py

.DEFAULT_GOAL := help
.PHONY: help demo lab app test fast bench docs clean

help: ## this list
	@printf 'freqseg: what a CLIP segmenter knows at each frequency\n\n'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@printf '\nThe first one you run sets up .venv: 2 to 5 minutes, about 6 GB. Another Python: make PYTHON=python3.12 demo\n'

demo: .venv/.ready ## from a picture to CAM, bands and masks, with the weights that ship
	@freqseg demo

lab: .venv/.ready ## the explorer in JupyterLab, and the other notebooks to explore
	@freqseg lab

app: .venv/.ready ## the explorer as a page without code
	@freqseg app

test: .venv/.ready ## everything: notebooks clean, in sync, types, lessons run, pytest, coverage
	@bash .ci/test all

fast: .venv/.ready ## the quick part of pytest, about three minutes on two cores
	@bash .ci/test fast

bench: .venv/.ready ## speed, side by side with other libraries
	@bash .ci/test bench

docs: .venv/.ready-docs ## the site, from the notebooks, in site/
	@NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict && echo "Open site/index.html"

clean: ## remove what builds and tests leave; keeps .venv and runs/
	rm -rf build dist site *.egg-info .coverage .coverage-data htmlcov .pytest_cache .hypothesis .ruff_cache .mypy_cache .benchmarks
	find . -name .venv -prune -o -name runs -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -print0 | xargs -0 rm -rf

.venv/.ready .venv/.ready-docs: $(SOURCES)
	@command -v $(PYTHON) > /dev/null || { \
	  echo "[setup] FAILED: there is no '$(PYTHON)' here. Install Python 3.10 to 3.13 (Debian, Ubuntu: sudo apt-get"; \
	  echo "[setup]   install python3 python3-venv), or name yours: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@$(PYTHON) .ci/setup.py $(if $(findstring docs,$@),docs,dev)
