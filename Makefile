# `make demo` and `make test` make their own environment in .venv if there is none.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# two threads: more are slower on small models
export OMP_NUM_THREADS ?= 2

.PHONY: demo docs test lint build benchmark clean

$(BIN)/dms: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	@touch $@

$(VENV)/dev: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--config-settings editable_mode=strict --editable ".[dev]"
	@touch $@ $(BIN)/dms

demo: $(BIN)/dms
	$(BIN)/dms demo

docs: $(BIN)/dms
	$(BIN)/dms demo --samples 880 --write-docs .

test: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

benchmark: $(VENV)/dev
	$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf $(VENV) build dist *.egg-info
