# The two commands of the README are `make demo` and `make test`; both set up a virtual environment first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-slow test-deepsparse test-ipex lint types floors bench bench-inc clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("graphprune needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another with make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch>=2.8,<2.14"
	$(BIN)/pip install --quiet --editable ".[onnx,openvino,demo,sparse-cpu,train,test,dev]"
	@touch $@

demo: setup
	$(BIN)/graphprune demo --out out/demo

test: setup
	$(BIN)/pytest --numprocesses 2 --dist worksteal

test-slow: setup
	$(BIN)/pytest -m slow

test-deepsparse: setup
	python=$$($(BIN)/python tools/environment.py deepsparse) && \
	GRAPHPRUNE_DEEPSPARSE_PYTHON=$$python $(BIN)/pytest -m deepsparse --numprocesses 2 tests/test_target_deepsparse.py

# Programs are saved with the torch of the main environment and lowered with that of IPEX.
test-ipex: setup
	python=$$($(BIN)/python tools/environment.py ipex) && folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python -m tests.ipex_programs "$$folder" && \
	GRAPHPRUNE_IPEX_PROGRAMS=$$folder "$$(dirname "$$python")/pytest" -m ipex --numprocesses 2 tests/test_target_ipex.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

floors: setup
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python tools/bench.py

bench-inc: setup
	$(BIN)/python tools/environment.py inc --bare

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
