# `make quickstart` and `make test` are all a fresh machine needs: Python >= 3.11 and nothing else of ours.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.installed-dev
LOWEST := .venv-lowest
# Where there is no NVIDIA GPU, PyTorch's CPU build is taken from here if it answers; TORCH_CPU= takes what pip finds.
TORCH_CPU ?= https://download.pytorch.org/whl/cpu

.PHONY: quickstart setup setup-dev test test-slow test-lowest test-attack test-gpu test-mixins proof-cut proof check docs clean

quickstart: setup
	$(BIN)/longwave quickstart $(TEXT)

setup: $(STAMP)
setup-dev: $(TOOLS)

# What longwave needs to run. Renewed when the dependencies change; does nothing when all is in place.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "longwave needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install.py '' $(TORCH_CPU)
	touch $@

# What tests, linters and the documentation need beside it.
$(TOOLS): $(STAMP)
	$(BIN)/python tools/install.py dev $(TORCH_CPU)
	touch $@

test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not slow and not attack'

test-slow: setup-dev
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m slow

# 6,000 hostile inputs and 272 kills, those of `make test` among them; under 15 minutes on two cores. Then 12,000 requests
# to a server whose memory is measured, and what schemathesis asks it.
test-attack: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/attack
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m attack tests/serving

# The tests with the lowest versions of all dependencies, in an environment of its own.
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint tests/lowest.txt --editable '.[dev]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 -m 'not slow and not attack'

test-gpu: setup-dev
	$(BIN)/python -m pytest -m gpu

# transformers' own test mixins on longwave's classes; pip fetches them once (tests/mixins/run.py).
test-mixins: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/mixins/run.py

# The conversion proof (docs/conversion.md): its cut with a teacher of its own, or parts of it: make proof PARTS="rules".
proof-cut: setup
	OMP_NUM_THREADS=1 $(BIN)/python tools/proof.py teacher cut

proof: setup
	OMP_NUM_THREADS=1 $(BIN)/python tools/proof.py $(PARTS)

check: setup-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

# The site, strictly: a broken link or anchor stops it (as does the test that builds it).
docs: setup-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(LOWEST) build *.egg-info
