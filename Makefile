# make demo    searches this README with the bundled checkpoint
# make test    runs the whole suite
# make lint    runs ruff
# Each prepares .venv first, which takes minutes once and nothing afterwards. `make clean` removes it.
#
# torch is installed by itself and first, so that nothing else chooses its build. For another build or another source:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
QUERY ?= how is the model trained
FILES ?= README.md
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --constraint $(VENV)/torch.txt --constraint $(CONSTRAINTS)

.PHONY: demo test lint clean

demo: $(VENV)/.core
	$(BIN)/python embed.py search "$(QUERY)" $(FILES)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)

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

$(VENV)/.test: $(VENV)/.core
	$(INSTALL) --editable ".[test]"
	touch $@
