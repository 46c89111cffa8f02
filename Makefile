# Each target sets up its own virtual environment when it is missing; Python 3.11 or newer is all a machine needs.
# A machine without a GPU gets a smaller torch with: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint clean

# One thread: the model is small, and two threads that wait for each other crawl when other programs want the cores.
demo: export OMP_NUM_THREADS = 1
demo: $(READY)
	$(BIN)/conceptron train recipes/demo.yaml resume=auto
	$(BIN)/conceptron analyze runs/demo

test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --benchmark-disable

lint: $(READY)
	$(BIN)/ruff check .

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
