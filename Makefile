# `make demo` and `make test` need Python 3.11 or newer with venv, and nothing else: they set up everything.
SHELL := /bin/bash
PYTHON ?= python3
DEMO := runs/demo
# Three tasks of the demo's, an adapter for each.
SERVED := runs/serve-demo
SERVED_TASKS := literal operator count
# make serve-demo SERVE_DEMO=--once ends by itself.
SERVE_DEMO ?=

# Exact versions: one file for 3.11, one for every newer Python.
PINS := constraints/$(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
ifeq ($(PINS),constraints/.txt)
    $(error $(PYTHON) does not run: name an interpreter of Python 3.11 or newer, such as make PYTHON=python3.11)
endif

# Array shapes and dtypes in the annotations of these are checked at run time while the tests run.
TYPED := qlora_jax.quant,qlora_jax.kernels,qlora_jax.models

export JAX_PLATFORMS = cpu
export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/.cache/jax

.PHONY: help demo serve-demo test test-full test-no-torch test-aot test-cuda12 test-newest lint format clean

help:
	@echo "make demo     fine-tune a small 4-bit model on the CPU, export it, generate from it"
	@echo "make serve-demo  train three adapters of one base and serve them: the same question to each, and a page to try"
	@echo "make test     lint, types and all tests"
	@echo "make test-aot compile the kernels and the 7B steps for GPUs that are not there, and hold them to their budgets"
	@echo "make lint     lint and types only"
	@echo "make format   rewrite the sources in the project's style"
	@echo "make clean    remove the environments, the caches and the demo's run"

demo: .venv-notorch/stamp
	rm -rf $(DEMO)
	.venv-notorch/bin/python scripts/train.py --config configs/demo.py --config.output_dir=$(DEMO)
	.venv-notorch/bin/python scripts/export.py --run $(DEMO) --out $(DEMO)/export/peft --format peft
	.venv-notorch/bin/python scripts/export.py --run $(DEMO) --out $(DEMO)/export/merged --format merged
	.venv-notorch/bin/python scripts/evaluate.py --model demo/base --adapter $(DEMO)/export/peft --quant nf4 --dtype fp32 \
	    --data demo/tasks/test.jsonl --exact-match
	.venv-notorch/bin/python scripts/generate.py --model $(DEMO)/export/merged --prompt $$'Question: type of (4, 2)\nAnswer:' --max-new-tokens 8

serve-demo: .venv-notorch/stamp $(SERVED_TASKS:%=$(SERVED)/adapters/%/adapter_config.json)
	.venv-notorch/bin/python scripts/serve_demo.py --model demo/base --adapters $(SERVED)/adapters $(SERVE_DEMO)

# Trained once: the environment is no reason to do it again.
$(SERVED)/adapters/%/adapter_config.json: | .venv-notorch/stamp
	rm -rf $(SERVED)/runs/$*
	mkdir -p $(SERVED)/tasks
	for split in train validation; do grep '"task": "$*"' demo/tasks/$$split.jsonl > $(SERVED)/tasks/$*-$$split.jsonl || exit 1; done
	.venv-notorch/bin/python scripts/train.py --config configs/demo.py --config.output_dir=$(SERVED)/runs/$* \
	    --config.data.train=$(SERVED)/tasks/$*-train.jsonl --config.data.eval=$(SERVED)/tasks/$*-validation.jsonl \
	    --config.train.steps=60 --config.train.eval_every=60
	.venv-notorch/bin/python scripts/export.py --run $(SERVED)/runs/$* --out $(SERVED)/adapters/$* --format peft

test: lint test-full test-no-torch test-aot test-cuda12 test-newest

test-full: .venv/stamp
	.venv/bin/python -m pytest -n 2 --ignore=tests/test_without_torch.py --ignore=tests/aot \
	    --jaxtyping-packages=$(TYPED),beartype.beartype

# The main paths where torch cannot be imported, because it is not installed.
test-no-torch: .venv-notorch/stamp
	.venv-notorch/bin/python -m pytest tests/test_without_torch.py

# What needs no GPU to be known about one: kernels and whole steps are compiled to machine code, which is counted.
test-aot: .venv-aot/stamp
	AOT_REQUIRED=1 .venv-aot/bin/python -m pytest -n 2 tests/aot
	.venv-aot/bin/python -m pytest -n 2 tests/kernels/test_attention_on_gpus.py

# The same kernels through the plugin for CUDA 12, whose compiler is another one.
test-cuda12: .venv-cuda12/stamp
	AOT_REQUIRED=1 .venv-cuda12/bin/python -m pytest tests/aot/test_kernels.py tests/aot/test_compiling.py

# The kernels with the newest JAX, which needs a newer Python than the oldest that is supported.
test-newest:
	@newest=$$(.ci/newest-python $(PYTHON)) || exit 1; \
	if [ -z "$$newest" ]; then echo "test-newest: nothing to run, $(PYTHON) has the newest JAX or is the newest Python here"; \
	else $(MAKE) --no-print-directory PYTHON="$$newest" test-kernels-newest; fi

.PHONY: test-kernels-newest
test-kernels-newest: .venv-newest/stamp
	.venv-newest/bin/python -m pytest -n 2 tests/kernels --jaxtyping-packages=$(TYPED),beartype.beartype

lint: .venv/stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/stamp
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv .venv-notorch .venv-aot .venv-cuda12 .venv-newest .cache .mypy_cache .pytest_cache .ruff_cache $(DEMO) $(SERVED)

.venv/stamp: PACKAGES = -e '.[test,dev]'
.venv-notorch/stamp: PACKAGES = -e '.[serve]' pytest
# NVIDIA's wheels are pinned in a file of their own: PyPI's torch wants other versions of some of them in .venv.
.venv-aot/stamp: PACKAGES = --constraint constraints/aot.txt -e '.[aot]' pytest pytest-xdist
.venv-cuda12/stamp: PACKAGES = --constraint constraints/aot.txt -e . 'jax[cuda12-local]' nvidia-cuda-nvcc-cu12 pytest
.venv-aot/stamp .venv-cuda12/stamp: constraints/aot.txt
.venv-newest/stamp: PACKAGES = -e . pytest pytest-xdist beartype

.venv/stamp .venv-notorch/stamp .venv-aot/stamp .venv-cuda12/stamp .venv-newest/stamp: pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
	    f"Python 3.11 or newer is needed, $(PYTHON) is {v}: make PYTHON=python3.11")'
	@echo "Setting up $(@D) with the versions in $(PINS); this takes some minutes the first time"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) $(PACKAGES)
	touch $@
