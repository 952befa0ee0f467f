# Every target sets the environment up on first use; it is rebuilt only when requirements.lock or pyproject.toml change.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
PROFILE ?= mini
# Notebooks at once. They share the cores; of those that train, one at a time has a GPU.
JOBS ?= 2
# Tests side by side, a core each: two trainings on one thread each finish sooner than one after the other on two.
WORKERS ?= -n auto --maxprocesses 4 --maxschedchunk 1

.PHONY: help setup reproduce test test-full unit lattice lab site bench lint clean

help:
	@echo "make reproduce   run every notebook (PROFILE=mini|smoke|pets|seeds) and print the table of metrics"
	@echo "make test        lint, unit tests, notebooks against their stored outputs and recorded numbers, those that train long in small"
	@echo "make test-full   the same with every notebook as it is: an hour and more on two cores"
	@echo "make unit        the fast part of the tests"
	@echo "make lattice     build the lattice CRF (needs a C++ compiler), and run the tests that use it"
	@echo "make lab         open JupyterLab on notebook 00, from which all others are reached"
	@echo "make site        build the book of the stored notebooks in outputs/site (of a run: wsolnb report outputs/mini)"
	@echo "make bench       speed and memory claims, measured side by side"
	@echo "make lint        ruff"

setup:
	@tools/setup.sh "$(PYTHON)" "$(VENV)"

reproduce: setup
	$(RUN)/wsolnb reproduce --profile $(PROFILE) --jobs $(JOBS) $(ARGS)

test: setup lint
	$(RUN)/python -m pytest tests -m "not long" $(WORKERS)

test-full: setup lint
	$(RUN)/python -m pytest tests $(WORKERS)

unit: setup
	$(RUN)/python -m pytest tests -m "not slow" $(WORKERS)

lattice: setup
	@tools/lattice.sh "$(VENV)"

lab: setup
	$(RUN)/jupyter lab --notebook-dir notebooks --LabApp.default_url=/lab/tree/00_overview.ipynb $(ARGS)

site: setup
	$(RUN)/wsolnb report

bench: setup
	$(RUN)/python -m benchmarks

lint: setup
	$(RUN)/ruff check .

clean:
	rm -rf outputs/cache outputs/mini outputs/smoke outputs/pets outputs/site
