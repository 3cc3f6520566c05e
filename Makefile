# `make demo` and `make test` create a virtual environment from the lock file; no other set-up is needed.

PYTHON ?= python3
VENV := .venv
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
READY := $(VENV)/.ready
BIN := $(VENV)/bin

# Neither the demo nor the tests may download from a model hub: they have to work without a network.
OFFLINE := HF_HUB_OFFLINE=1

.PHONY: demo test test-quick rehearsals test-slurm lint install benchmarks lock schema clean

demo: $(READY)
	$(OFFLINE) $(BIN)/snakemake --cores $(CORES)
	@echo "The report: $$(pwd)/results/moving-shapes/report.html"

test: $(READY)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist worksteal --ignore=tests/slurm

test-quick: $(READY)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) -m "not slow"

# Every job of the full-size configs, with small models and a few clips; too long for the tests, which rehearse a small config.
rehearsals: $(READY)
	set -e; for name in tgm stm clusterstm umt; do $(OFFLINE) $(BIN)/snakemake rehearse --cores $(CORES) --configfile config/$$name.yaml; done

# Starts a temporary Slurm; needs no root, but Debian's packages: apt-get install munge slurm-wlm. -rP shows its accounting.
test-slurm: $(READY)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rsP tests/slurm

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/snakefmt --check workflow && $(BIN)/codespell
	$(BIN)/mypy && $(BIN)/snakemake --lint

benchmarks: $(READY)
	$(OFFLINE) $(BIN)/python -m benchmarks

install: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stm needs Python 3.11 or newer; say which with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# For maintainers: regenerate the lock file and the schema.
lock:
	uv pip compile --universal --generate-hashes --no-annotate --no-header --python-version 3.11 \
		--extra workflow --extra decord --extra captions --extra trackers --extra docs --extra dev \
		--constraint config/constraints.txt pyproject.toml --output-file requirements.lock

schema: $(READY)
	$(BIN)/stm schema > config/schema.json

clean:
	find results -mindepth 1 -maxdepth 1 ! -name reference -exec rm -rf {} +
	rm -rf .snakemake
