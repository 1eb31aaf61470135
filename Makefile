# Each target makes its own .venv from python3, installs the tested set of constraints.txt, and runs.

PYTHON ?= python3
BIN := .venv/bin
# They ask for torchvision, which the tests do without: what is compared is their arithmetic.
PEERS := torch-fidelity pytorch-fid
STAMPS := .venv/base.stamp .venv/test.stamp .venv/dev.stamp .venv/docs.stamp

FASHION_MNIST := $(or $(UNDIFFUSE_FASHION_MNIST),/usr/share/datasets/fashion-mnist)
HAVE_DATA := $(wildcard $(FASHION_MNIST)/train-images-idx3-ubyte.gz)
HAVE_BROWSER := $(shell command -v chromium)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-reliability check docs site

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

demo: .venv/base.stamp  ## the whole paper in one HTML report: train, sample, measure (5 minutes on 2 cores)
	$(BIN)/undiffuse demo --out demo

test: .venv/test.stamp  ## all tests, two at a time (6 minutes on 2 cores); ARGS="tests/test_key.py -x" for some of them
	$(if $(HAVE_DATA),,@echo 'Fashion-MNIST is not in $(FASHION_MNIST): the tests marked "data" are left out')
	$(if $(HAVE_BROWSER),,@echo 'there is no chromium: the tests marked "browser" are left out')
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not long$(if $(HAVE_DATA),, and not data)$(if $(HAVE_BROWSER),, and not browser)" $(ARGS)

test-reliability: .venv/test.stamp  ## the long tests: kills by the dozen, whole trainings (two hours)
	$(BIN)/python -m pytest -m long

check: .venv/dev.stamp  ## format, lint, types and the fast tests (four minutes on 2 cores)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m "not slow and not data and not long"

docs: .venv/base.stamp  ## docs/cli.md, from the commands themselves
	$(BIN)/python docs/make_cli.py

site: .venv/docs.stamp  ## the documentation as web pages in site/, with the Python interface; look at site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/base.stamp: WHAT := .
.venv/test.stamp: WHAT := .[test]
.venv/dev.stamp: WHAT := .[dev]
.venv/docs.stamp: WHAT := .[docs]

$(STAMPS): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e "$(WHAT)"
	$(if $(filter .[test] .[dev],$(WHAT)),$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps $(PEERS))
	@touch $@
