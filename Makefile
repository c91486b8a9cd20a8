# Everything here is one command of the package or of a tool; `make help` lists the targets.
#   make train CONFIG=configs/model5.yaml NPROC=8 ARGS="--train.max_iters=100"

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin

# One process per GPU, or one where there is none.
NPROC  ?= auto

.DEFAULT_GOAL := help
.PHONY: help install develop prepare train test test-faults test-slow tensorboard compare bench bench-scaling bench-data lint format type check readme schema clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

install: $(VENV)/installed  ## create .venv and install what the commands need, pinned

develop: $(VENV)/developed  ## and what tests and checks need

PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/developed: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	@# Beside the environment: its schemas are a test's, and what it depends on does not go with the rest.
	$(PIP) --no-deps --upgrade --target $(VENV)/skypilot skypilot
	@touch $@

prepare: install  ## text to token shards (CONFIG=…)
	$(BIN)/python -m dist_train prepare $(CONFIG) $(ARGS)

train: install  ## train, on all GPUs or one CPU (CONFIG=… NPROC=… ARGS=…)
	$(BIN)/python -m dist_train launch $(NPROC) $(CONFIG) $(ARGS)

test: develop  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not slow' $(ARGS)

test-faults: develop  ## kills, hangs, full disks, torn and hostile files, as often as the README's table says (20 min)
	DIST_TRAIN_ALL_FAULTS=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/faults $(ARGS)

test-slow: develop  ## the tests that take minutes: Model 5 at its full size
	$(BIN)/pytest -m slow $(ARGS)

tensorboard: install  ## open the runs in TensorBoard, on this machine only
	$(BIN)/tensorboard --logdir runs --host localhost

compare: install  ## what the loss sees, measured: objectives, curricula, corpora, three seeds each, and the report
	$(BIN)/python -m dist_train compare configs/study_small.yaml --processes=$(NPROC) $(ARGS)

bench: install  ## speed and memory of a step, beside the plain way to do it
	$(BIN)/python -m dist_train bench configs/bench.yaml $(ARGS)

bench-scaling: install  ## what NPROC processes cost, two if not said, beside one of them alone
	$(BIN)/torchrun --standalone --nproc_per_node=$(if $(filter command line environment,$(origin NPROC)),$(NPROC),2) -m dist_train bench \
	  configs/bench.yaml --run.out_dir=runs/bench_scaling --model.n_layer=4 --train.global_batch_size=64 --train.micro_batch_size=4 $(ARGS)

bench-data: install  ## speed of preparing and reading data, beside the usual ways (ARGS="--data.path=…")
	$(BIN)/python -m dist_train bench-data configs/bench_data.yaml $(ARGS)

lint: develop  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: develop  ## ruff: mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: develop  ## mypy
	$(BIN)/mypy

check: lint type test  ## all static checks and the tests

readme: develop  ## write the README's table of settings anew
	$(BIN)/python tests/readme_settings.py

schema: develop  ## write the schemas of configs anew, by which editors complete and check keys
	$(BIN)/python -m tests.config_schemas

clean:  ## remove the environment and caches; runs and prepared data stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
