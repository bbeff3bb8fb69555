# make setup | quickstart | test | lint      (PYTHON=python3.12 make setup picks another interpreter)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint

help:
	@echo "make setup       create $(VENV) and install what requirements.lock pins"
	@echo "make quickstart  play, train, dream, fine-tune and report: $(RUN)/index.html"
	@echo "make test        lint, types and tests"
	@echo "make lint        lint and types alone"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make setup PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

quickstart: setup
	$(BIN)/worldmodels collect game=pong steps=30000 store=data/pong
	$(BIN)/worldmodels collect game=breakout steps=20000 store=data/breakout
	$(BIN)/worldmodels train experiment=pong_tiny out=$(RUN)/pong
	$(BIN)/worldmodels quality checkpoint=$(RUN)/pong/best.ckpt store=data/pong out=$(RUN)/quality
	$(BIN)/worldmodels imagine checkpoint=$(RUN)/pong/best.ckpt store=data/pong out=$(RUN)/imagine
	$(BIN)/worldmodels finetune checkpoint=$(RUN)/pong/best.ckpt store=data/breakout out=$(RUN)/breakout
	$(BIN)/worldmodels report run=$(RUN)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile
