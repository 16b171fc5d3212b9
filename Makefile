# Everything a newcomer types. `.venv` and the demo model are made when they are missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := $(HOME)/.cache/ballonet/SmolLM2-135M-Instruct.Q4_1.gguf
BENCH ?= cpu_decode $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu_kernels engine_side_by_side)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve setup model test check format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=python3.12, PYTEST_ARGS='-k name' and BENCH=name can be given to any of them"

demo: $(STAMP) $(MODEL) ## deploy on a local Ray cluster, ask one question, show the pool, stop
	$(BIN)/ballonet serve deploy/laptop.yaml --ask "What is the capital of France?"

serve: $(STAMP) $(MODEL) ## the same, and stay
	$(BIN)/ballonet serve deploy/laptop.yaml

setup: $(STAMP) ## the virtual environment only

model: $(MODEL) ## the demo model only (98 MB)

# Tools run as modules: one that a GPU host brings along has no script in .venv/bin.
# Tests that start a cluster or use a GPU measure time and want the machine alone. The others share it, with one thread
# of torch each: a process for each core, each with a thread for each core, would be too many.
test: $(STAMP) $(MODEL) ## every test this machine can run; says which it skips and why
ifdef PYTEST_ARGS
	$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(nproc) --maxprocesses=8 --dist=loadfile -m "not ray and not gpu"
	$(BIN)/python -m pytest -m "ray or gpu"
endif

check: $(STAMP) ## formatting, lint, types and the import contracts
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff format the code and sort its imports
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix --select I .

bench: $(STAMP) $(MODEL) ## the benchmarks of tests/bench, or the one named by BENCH
	@set -e; for bench in $(BENCH); do echo "== $$bench"; $(BIN)/python -m tests.bench.$$bench; done

clean: ## remove the environment, caches and build products (not the demo model)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(MODEL): | $(STAMP)
	@deploy/fetch-demo-model.sh "$@" $(BIN)/python

# The stamp is written last: an installation that failed or was interrupted is taken up again.
$(STAMP): pyproject.toml constraints.txt deploy/make-venv.sh
	@deploy/make-venv.sh "$(PYTHON)" $(VENV)
	@touch $@
