# Two commands on a fresh machine, each does all its own set-up in .venv:
#   make demo   build a small set of songs and turn it into a scored corpus
#   make test   lint, type-check and run the test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs

.PHONY: demo test test-slow lint bench clean

$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python -m ttmray.synth.songs $(RUNS)/demo/songs
	$(BIN)/python jobs/score_corpus.py --config configs/debug/corpus.yaml --set input=$(RUNS)/demo/songs --set output=$(RUNS)/demo/corpus

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-slow: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

bench: $(BIN)/.installed
	$(BIN)/python benchmarks/corpus.py --output benchmarks/results/corpus.json
	$(BIN)/python benchmarks/loudness.py --output benchmarks/results/loudness.json
	$(BIN)/python benchmarks/levels.py --output benchmarks/results/levels.json
	$(BIN)/python benchmarks/encoders.py --output benchmarks/results/encoders.json
	$(BIN)/python benchmarks/generation.py --output benchmarks/results/generation.json
	$(BIN)/python benchmarks/training.py --output benchmarks/results/training.json
	$(BIN)/python benchmarks/loader.py --output benchmarks/results/loader.json
	$(BIN)/python benchmarks/ranker.py --output benchmarks/results/ranker.json
	$(BIN)/python benchmarks/rescore.py --output benchmarks/results/rescore.json
	$(BIN)/python benchmarks/score_heads.py --output benchmarks/results/score_heads.json --figure benchmarks/results/score_heads.svg
	$(BIN)/python benchmarks/metrics.py --output benchmarks/results/metrics.json
	$(BIN)/python benchmarks/evaluation.py --output benchmarks/results/evaluation.json

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
