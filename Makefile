# Two commands on a fresh machine, each does all its own set-up in .venv:
#   make demo   compose songs, score them, make clips from prompts, and a page to listen to all of it
#   make test   lint, type-check and run the test suite
# One more tries faults at random moments, for as long as COUNT says:
#   make faults COUNT=1000 SEED=7   kills, full disks, unruly stores, damaged files; RAY=1: under Ray, too
# and one damages what files hold, a hundred inputs and more a second:
#   make fuzz COUNT=100000 SEED=7   every reader takes an input or refuses it with one message
# and one in an environment of its own, .venv-laion, with 7 GB of packages:
#   make test-laion-clap   compare our CLAP with LAION's package, on seeded weights of full size
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs
COUNT ?= 100
SEED ?= 0
RAY ?=

.PHONY: demo test test-slow test-laion-clap faults fuzz lint bench clean

$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python jobs/demo.py --set output=$(RUNS)/demo

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-slow: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

faults: $(BIN)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/fault_schedules.py --count $(COUNT) --seed $(SEED) $(if $(RAY),--ray)

fuzz: $(BIN)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python tests/fuzz.py --count $(COUNT) --seed $(SEED)

# LAION's package holds numpy below 2, and its torchvision fits only the build of torch from the same index.
.venv-laion/.installed: pyproject.toml constraints-laion-clap.txt
	test -x .venv-laion/bin/python || $(PYTHON) -m venv .venv-laion
	.venv-laion/bin/pip install --quiet --disable-pip-version-check -c constraints-laion-clap.txt -e '.[laion-clap]' pytest pytest-timeout hypothesis 'moto[server]'
	touch $@

test-laion-clap: .venv-laion/.installed
	OMP_NUM_THREADS=1 .venv-laion/bin/python -m pytest -s tests/models/test_laion_clap.py

bench: $(BIN)/.installed
	$(BIN)/python benchmarks/corpus.py --output benchmarks/results/corpus.json
	$(BIN)/python benchmarks/loudness.py --output benchmarks/results/loudness.json
	$(BIN)/python benchmarks/levels.py --output benchmarks/results/levels.json
	$(BIN)/python benchmarks/encoders.py --output benchmarks/results/encoders.json
	$(BIN)/python benchmarks/generation.py --output benchmarks/results/generation.json
	$(BIN)/python benchmarks/training.py --output benchmarks/results/training.json
	$(BIN)/python benchmarks/scale.py --output benchmarks/results/scale.json
	$(BIN)/python benchmarks/loader.py --output benchmarks/results/loader.json
	$(BIN)/python benchmarks/ranker.py --output benchmarks/results/ranker.json
	$(BIN)/python benchmarks/rescore.py --output benchmarks/results/rescore.json
	$(BIN)/python benchmarks/score_heads.py --output benchmarks/results/score_heads.json --figure benchmarks/results/score_heads.svg
	$(BIN)/python benchmarks/metrics.py --output benchmarks/results/metrics.json
	$(BIN)/python benchmarks/evaluation.py --output benchmarks/results/evaluation.json

clean:
	rm -rf $(VENV) .venv-laion build *.egg-info .pytest_cache .ruff_cache .mypy_cache
