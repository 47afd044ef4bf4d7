# make demo   train two models inside a memory budget and print what it cost
# make test   the everyday tests
# make gpu    what only a CUDA device can tell, in eight minutes; uses the torch that $(PYTHON) has
# The first two need nothing but Python 3.10 or newer and a package index that pip can reach.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Threads that wait busily make everything ten times slower where another process runs on one of two cores.
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test test-guard test-all versions versions-jax gpu lint types docs bench clean

demo: $(VENV)/.demo
	$(BIN)/autoremat demo

# A process per core, each with one thread: twice as fast as one process with all of them.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Of the slow ones those that guard the most: what .ci/run adds to the everyday tests.
test-guard: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "slow and guard and not gpu" -rs

# Everything: more examples and random ones, and the sweeps of all there is. The seed is printed; SEED=... has it again.
test-all: SEED := $(or $(SEED),$(shell $(PYTHON) -c 'import random; print(random.randrange(1, 1 << 32))'))
test-all: $(VENV)/.all
	AUTOREMAT_SEED=$(SEED) JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not gpu" -rs --hypothesis-seed=$(SEED)

# The everyday tests with several versions of torch: gigabytes and an hour, by hand. VERSIONS="2.13 2.15" for some.
versions: $(BIN)/python
	$(BIN)/python scripts/versions.py $(VERSIONS)

# The tests of the engine for JAX with the oldest and the newest JAX that it is for, by hand.
versions-jax: $(BIN)/python
	$(BIN)/python scripts/versions.py jax $(VERSIONS)

# Nothing is installed: another torch must not come over the one that fits the driver.
RESULTS ?= build/gpu.json
gpu:
	@$(PYTHON) benchmarks/_gpu_needs.py
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --tests --results $(RESULTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# The site, into build/site. Nothing is fetched, and a warning is an error. (The variable silences an advertisement.)
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	for script in $(filter-out benchmarks/_% benchmarks/zoo% benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; PYTHONPATH=. $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "autoremat needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing autoremat and what the demo needs into $(VENV) (a few minutes the first time) ..."
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing autoremat and its development tools into $(VENV) (a few minutes the first time) ..."
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.all: $(VENV)/.dev
	$(PIP) -e '.[dev,tpu]'
	@touch $@
