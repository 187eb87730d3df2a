# Two commands: `make book` and `make test`. Stamps in the virtual environment remember what is done.
SHELL := /bin/sh
VENV ?= .venv
PORT ?= 8000
SERVE ?= 1
PYTEST_ARGS ?=
BIN := $(VENV)/bin
PY := $(BIN)/python
export PATH := $(abspath $(BIN)):$(PATH):$(HOME)/.cargo/bin
export VIRTUAL_ENV := $(abspath $(VENV))
export PYO3_PYTHON := $(abspath $(PY))

# Where Python may not write what it compiled beside the sources, all that make starts share it elsewhere: else each
# notebook and each process of a test compiles torch, transformers and Ray for itself, which takes seven seconds.
ifdef PYTHONDONTWRITEBYTECODE
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX ?= $(abspath $(VENV))/.pycache
endif

# Two or more processes of one thread each get more done than one process of many threads.
CORES := $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)
RUST := $(shell find rust -type f -not -path '*/target/*' 2>/dev/null) $(wildcard Cargo.toml Cargo.lock)
PACKAGE := $(shell find headkv kernels -type f -not -name '*.pyc' -not -name '*.so' 2>/dev/null)
SCRIPTS := $(wildcard headkv/widgets/static/*.js book/_static/*.js)
CHAPTERS := benchmarks/README.md benchmarks/rows/ruler.parquet $(shell find book -type f -not -path 'book/_build/*' 2>/dev/null)
KVPRESS := 0.5.5
# Releases of transformers besides the installed one: the oldest that is served, two between, the newest.
VERSIONS := 5.12.0 5.16.1 5.20.2 5.24.0
MODEL := $(VENV)/.model$(subst /,-,$(HEADKV_HOME))
BUILT := book/_build/html/.built

.DEFAULT_GOAL := help
.PHONY: help setup book lab test fuzz soak families test-floor test-kvpress test-gpu test-rust sanitize-gpu lint lint-python lint-rust format bench bench-cpu bench-gpu constraints clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.rust $(MODEL) ## virtual environment, dependencies, the Rust extension, the model

book: setup $(BUILT) ## build the book, every notebook executed, and serve it on localhost (SERVE=0: only build, PORT=8000)
ifneq ($(SERVE),0)
	@$(PY) tools/serve.py book/_build/html --port $(PORT)
endif

lab: PORT := $(if $(filter file,$(origin PORT)),8888,$(PORT))
lab: setup ## open JupyterLab on the chapters, as notebooks that run (PORT=8888; without a browser it prints the address)
	@$(PY) tools/lab.py book --port $(PORT)

test: setup ## everything that must hold: style, types, Rust, Python, pages in a browser (PYTEST_ARGS=...)
	@$(MAKE) --no-print-directory -j$(CORES) lint test-rust  # mypy has use for one core only
	@$(PY) tools/browser.py --install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

fuzz: setup ## random conversations against the oracle (FOR=60 seconds; SEED=...: that one again)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(PY) tests/fuzz.py --seconds $(or $(FOR),60) $(if $(SEED),--seed $(SEED))

soak: setup ## 2,000 requests through the pipeline: does the memory stay where it is?
	OMP_NUM_THREADS=1 $(PY) benchmarks/soak.py

families: setup $(VERSIONS:%=$(VENV)-transformers-%/.deps) ## which decoder families are served, for README and book (VERSIONS=: the installed transformers only)
	@for python in $(VERSIONS:%=$(VENV)-transformers-%/bin/python) $(PY); do \
	  FAMILIES_DATA=book/data OMP_NUM_THREADS=1 $$python -m pytest -q -p no:cacheprovider tests/test_families.py || exit 1; done
	$(PY) tools/readme_families.py

test-floor: $(VENV)-floor/.deps ## the Hugging Face integration with the oldest supported transformers (its own environment)
	OMP_NUM_THREADS=1 $(VENV)-floor/bin/python -m pytest -p no:cacheprovider tests/test_huggingface*.py $(PYTEST_ARGS)

test-kvpress: $(VENV)-kvpress/.deps $(VENV)-kvpress-now/.deps ## kvpress's presses, masked in an environment of its own, and realised; prints a table (DATA=book/data: also for the book)
	KVPRESS_DATA=$(DATA) KVPRESS_PYTHON=$(abspath $(VENV)-kvpress/bin/python) OMP_NUM_THREADS=1 \
	  $(VENV)-kvpress-now/bin/python -m pytest -p no:cacheprovider tests/test_kvpress*.py $(PYTEST_ARGS)

test-gpu: setup ## the tests marked gpu; needs a CUDA device
	OMP_NUM_THREADS=1 $(PY) -m pytest -m gpu -n auto --maxprocesses 16 $(PYTEST_ARGS)

# Each tensor is an allocation of its own, so that a read past its end is seen; and the kernels are compiled before, by
# a run without the sanitizer, which slows all of it.
SANITIZED := -q -m gpu tests/test_triton.py -k \
  "test_equals_truth or test_any_cut or test_steps_in_a_row or test_append or (test_fused_steps_through_a_ring and 128)"
sanitize-gpu: setup ## the kernels under compute-sanitizer: memory, races, uninitialised reads
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 16 $(SANITIZED)
	$(MAKE) --jobs 3 --output-sync sanitize-memcheck sanitize-racecheck sanitize-initcheck

# What torch's own kernels write must be seen where reads of what nobody wrote are looked for; elsewhere they are left out.
sanitize-memcheck sanitize-racecheck: OURS := --kernel-regex-exclude kns=at6native
sanitize-%:
	OMP_NUM_THREADS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $* --error-exitcode 9 $(OURS) \
	  $(PY) -m pytest -n 5 $(SANITIZED)

lint: lint-python lint-rust ## ruff, mypy, import-linter, stubtest, deno (JavaScript), cargo fmt, clippy

lint-python: $(VENV)/.rust
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports
	$(PY) -m mypy.stubtest headkv._rust --mypy-config-file tools/stubtest.ini
	$(BIN)/deno lint --quiet
	$(BIN)/deno fmt --quiet --check
	$(BIN)/deno check --quiet $(SCRIPTS)

# With a plus, cargo and make share the jobs of -j.
lint-rust: $(VENV)/.rust
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || { \
	  echo "headkv: rustfmt or clippy is missing: rustup component add rustfmt clippy (Debian: apt-get install rustfmt rust-clippy)"; exit 1; }
	cargo fmt --all --check
	+cargo clippy --workspace --all-targets --quiet -- -D warnings

test-rust: $(VENV)/.rust
	+cargo test --workspace --quiet

format: $(VENV)/.deps ## write the style that lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/deno fmt --quiet
	cargo fmt --all

bench-cpu: setup ## side-by-side measurements on this CPU: one table, medians, ratios
	$(PY) benchmarks/cpu.py

bench-gpu: setup ## a layer's steps, an 8B-shaped model's, and prefills, on this GPU (SMALL=1: two minutes; DATA=book/data: also for the book)
	$(PY) benchmarks/gpu_attention.py $(if $(SMALL),--replays 10) $(if $(DATA),--json $(DATA)/kernel_gpu.json)
	$(PY) benchmarks/gpu_extend.py $(if $(SMALL),--tokens 4 1024)
	$(PY) benchmarks/gpu_model.py $(if $(SMALL),--cases 8192) $(if $(DATA),--json $(DATA)/model_gpu.json)
	$(PY) benchmarks/gpu_prefill.py $(if $(SMALL),--layers 4 --contexts 32768 --rounds 1)

bench: bench-cpu ## every benchmark that needs no GPU

constraints: $(VENV)/.deps ## write constraints.txt anew: the newest versions that fit together (KEEP=1: only add what is missing)
	sh tools/constraints.sh

clean: ## remove what was built, keep the environment
	rm -rf book/_build build dist target .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f headkv/_rust*.so $(VENV)/.rust

$(VENV)/.deps: pyproject.toml constraints.txt kernels/pyproject.toml tools/setup.sh
	@sh tools/setup.sh $(VENV)
	@touch $@

$(VENV)/.rust: $(VENV)/.deps $(RUST)
	$(BIN)/maturin develop --release --skip-install --quiet
	@touch $@

$(MODEL): headkv/models/smollm2.py | $(VENV)/.rust
	$(PY) -m headkv.models.smollm2
	@touch $@

# Notebooks are executed once and remembered, until their code, the data they read or the package changes.
$(BUILT): $(CHAPTERS) $(PACKAGE) $(RUST) | $(VENV)/.rust $(MODEL)
	@rm -rf $(if $(filter-out book/%.md book/_%,$?),book/_build/.jupyter_cache)
	$(BIN)/jupyter-book build book --all --warningiserror --keep-going
	@touch $@

# Every lower bound of pyproject.toml at once, transformers 5.12 among them.
$(VENV)-floor/.deps: pyproject.toml | $(VENV)/.rust
	$(PY) -m venv --clear $(VENV)-floor
	$(BIN)/uv pip install --quiet --python $(VENV)-floor/bin/python --resolution lowest-direct \
	  -r pyproject.toml --extra widgets --extra plots --group test
	@touch $@

# What `make families` runs with another release of transformers.
$(VENV)-transformers-%/.deps: pyproject.toml | $(VENV)/.rust
	$(PY) -m venv --clear $(VENV)-transformers-$*
	$(BIN)/uv pip install --quiet --python $(VENV)-transformers-$*/bin/python -r pyproject.toml \
	  transformers==$* torch==$$($(PY) -c 'import torch; print(torch.__version__.split("+")[0])') pytest
	@touch $@

# kvpress with the transformers that it pins, and beside the one that headkv runs with, which it does not allow.
$(VENV)-kvpress/.deps: Makefile | $(VENV)/.deps
	$(PY) -m venv --clear $(VENV)-kvpress
	$(BIN)/uv pip install --quiet --python $(VENV)-kvpress/bin/python kvpress==$(KVPRESS)
	@touch $@

$(VENV)-kvpress-now/.deps: Makefile pyproject.toml constraints.txt | $(VENV)/.rust
	$(PY) -m venv --clear $(VENV)-kvpress-now
	$(BIN)/uv pip install --quiet --python $(VENV)-kvpress-now/bin/python --constraints constraints.txt \
	  -r pyproject.toml --extra kvpress --group test
	$(BIN)/uv pip install --quiet --python $(VENV)-kvpress-now/bin/python --no-deps kvpress==$(KVPRESS)
	@touch $@
