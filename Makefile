# Every target makes the environment it needs itself when it is missing, and anew when the pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARITY_VENV := .venv-parity
PARITY_READY := $(PARITY_VENV)/.ready
DEEPSPEED_VENV := .venv-deepspeed
DEEPSPEED_READY := $(DEEPSPEED_VENV)/.ready
export HF_HUB_OFFLINE := 1
# Two threads on a busy two-core machine can be 30 times slower than one, and models this small gain nothing from a second.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test parity deepspeed lint format docs benchmark clean

quickstart: $(READY) ## the whole job on the shipped checkpoints
	$(BIN)/lata quickstart --output quickstart-output

test: $(READY) ## all tests, as many files at once as there are processors
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

parity: $(PARITY_READY) ## the tests beside mergekit, which no other target installs
	$(PARITY_VENV)/bin/python -m pytest tests/parity/test_mergekit_*.py tests/exports/test_export_mergekit_runs.py

deepspeed: $(DEEPSPEED_READY) ## the tests under DeepSpeed, which compiles a part of itself; no other target installs it
	PATH="$(CURDIR)/$(DEEPSPEED_VENV)/bin:$$PATH" $(DEEPSPEED_VENV)/bin/python -m pytest tests/callbacks/test_lata_deepspeed.py

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## the site, docs/_build/index.html; nothing is fetched to build or to read it
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

benchmark: $(READY) ## speed and memory beside plain passes over the same bytes; an hour and 30 GB of disk
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.measuring
	$(BIN)/python -m benchmarks.merging
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.callback
	$(BIN)/python -m benchmarks.memory

$(READY): constraints.txt pyproject.toml
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(PARITY_READY): constraints.txt pyproject.toml
	rm -rf $(PARITY_VENV)
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,mergekit]'
	touch $@

$(DEEPSPEED_READY): $(READY)
	rm -rf $(DEEPSPEED_VENV)
	$(PYTHON) -m venv $(DEEPSPEED_VENV)
	# What the environment of the tests has is seen from this one, and not installed again.
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$($(DEEPSPEED_VENV)/bin/python -c "import site; print(site.getsitepackages()[0])")/tests.pth
	$(DEEPSPEED_VENV)/bin/python -m pip install --quiet --disable-pip-version-check wheel==0.48.0 setuptools==84.2.1
	DS_ACCELERATOR=cpu $(DEEPSPEED_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
	touch $@

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(DEEPSPEED_VENV) quickstart-output docs/_build build *.egg-info
