# make demo    searches this README and docs/ with the bundled checkpoint
# make test    runs the whole suite
# make bases   fills bases/ with pretrained encoders and decoders to train from; see scripts/bases.py
# make lint    runs ruff
# make test-oldest    runs the core of the suite on the oldest supported torch and transformers, in .venv-oldest
# Each prepares .venv first, which takes minutes once and nothing afterwards. `make clean` removes it.
#
# torch is installed by itself and first, so that nothing else chooses its build. For another build or another source:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
QUERY ?= how is the model trained
FILES ?= README.md docs
PYTEST_ARGS ?=
BASES_ARGS ?=
OLDEST ?= transformers==5.17.0 huggingface_hub==1.9.0 safetensors==0.8.0
OLDEST_TORCH ?= torch==2.11.0
OLDEST_TESTS ?= $(addprefix tests/test_,configuration_causal2vec.py tokenization_utils.py modeling_causal2vec.py \
	encoding_utils.py loading_utils.py saving_utils.py runtime_utils.py decoder_utils.py prefix_cache.py remote_code.py embed.py)

BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --constraint $(VENV)/torch.txt --constraint $(CONSTRAINTS)

.PHONY: demo test test-oldest bases lint clean

demo: $(VENV)/.search
	$(BIN)/python -m scripts.embed search "$(QUERY)" $(FILES)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-oldest: $(VENV)-oldest/.test
	$(VENV)-oldest/bin/python -m pytest $(PYTEST_ARGS) $(OLDEST_TESTS)

bases: $(VENV)/.gguf
	$(BIN)/python -m scripts.bases $(BASES_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-oldest

# torch.txt holds what torch turned out to be, so that the other dependencies cannot replace it.
$(VENV)/torch.txt:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $@.tmp
	mv $@.tmp $@

$(VENV)/.core: $(VENV)/torch.txt pyproject.toml $(CONSTRAINTS)
	$(INSTALL) --editable .
	touch $@

$(VENV)/.search: $(VENV)/.core
	$(INSTALL) --editable ".[search]"
	touch $@

$(VENV)/.gguf: $(VENV)/.core
	$(INSTALL) --editable ".[gguf]"
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(INSTALL) --editable ".[test]"
	touch $@

# Core dependencies and what `make demo` needs. torch comes last, or pip would tell at each step what torch lacks.
$(VENV)-oldest/.test: Makefile .ci/torch_without_cuda
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install $(OLDEST) filelock typing-extensions sympy networkx jinja2 fsspec "setuptools<82"
	$(VENV)-oldest/bin/pip install --constraint $(CONSTRAINTS) pytest pytest-timeout hypothesis semantic-text-splitter
	.ci/torch_without_cuda $(VENV)-oldest/bin $(OLDEST_TORCH)
	touch $@
