# Every target sets up what it needs in .venv; a second run installs only what changed.
# PYTHON picks the interpreter (3.10 or newer); ARGUMENTS go to the command: make test ARGUMENTS="-k fedavg".

PYTHON ?= python3
ARGUMENTS ?=
RESULTS ?= bench/results

VENV := .venv
FLOWER := build/flower-oldest
INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f)
PYTHON_SOURCES := $(shell find python $(wildcard bench) -type f -name '*.py*' -not -path '*/__pycache__/*')

MACHINE_PATH := $(PATH)
# cmake, ninja and the linters are the environment's own.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test test-flower test-all lint bench gpu-check sanitize format stubs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo $(VENV)/.stamp-package ## train digits on 20 clients, print the tables, draw build/fastagg-demo.png
	fastagg demo --output build/fastagg-demo.png $(ARGUMENTS)

test: $(VENV)/.stamp-test $(VENV)/.stamp-package ## run the tests, the CUDA kernels on the CPU included
	python -m pytest $(ARGUMENTS)

test-flower: $(FLOWER)/.stamp-flower $(VENV)/.stamp-package ## run Flower's tests with the oldest version that is supported
	$(FLOWER)/bin/python -m pytest tests/test_flower*.py -m "not real_run" $(ARGUMENTS)

test-all: $(VENV)/.stamp-test $(VENV)/.stamp-package ## also the tests of every value there is, and fuzzers (minutes)
	python -m pytest --all $(ARGUMENTS)
	bash tools/fuzz_sanitized.sh

lint: $(VENV)/.stamp-lint ## check style, types, stubs and compiler warnings
	ruff check
	ruff format --check
	mypy
	bash tools/lint_native.sh

bench: $(VENV)/.stamp-bench $(VENV)/.stamp-package ## time fastagg against what people use instead, into bench/results
	fastagg bench --output bench/results $(ARGUMENTS)

# The machine's own Python has torch for its GPU: no environment is made, and none is used.
gpu-check: export PATH := $(MACHINE_PATH)
gpu-check: ## build, test and time the CUDA kernels on this machine's GPU; the report goes to RESULTS
	$(PYTHON) tools/gpu_check.py --results $(RESULTS) $(ARGUMENTS)

sanitize: $(VENV)/.stamp-test ## run the native code under the sanitizers
	bash tools/sanitize.sh $(ARGUMENTS)

format: $(VENV)/.stamp-lint ## format all sources
	ruff check --fix --exit-zero --quiet
	ruff format
	bash tools/native_sources.sh | xargs clang-format -i

stubs: $(VENV)/.stamp-lint ## rewrite the stubs of the native modules
	bash tools/build_strict.sh
	bash tools/stubs.sh write

lock: $(VENV)/.stamp-lint ## pin the newest versions in requirements/
	$(INSTALL) uv
	bash tools/lock.sh

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks

$(VENV)/.stamp-venv:
	$(PYTHON) -c 'import sys; sys.exit("fastagg needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-%: requirements/%.txt $(VENV)/.stamp-venv
	$(INSTALL) -r $<
	@touch $@

# An older Flower and what it asks for, before all that .venv has.
$(FLOWER)/.stamp-flower: requirements/flower-oldest.txt $(VENV)/.stamp-test
	rm -rf $(FLOWER)
	$(VENV)/bin/python -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >$$($(FLOWER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth
	@touch $@

# Without build isolation the build folder is kept, so that only what changed is compiled.
$(VENV)/.stamp-package: pyproject.toml $(NATIVE_SOURCES) $(PYTHON_SOURCES) $(VENV)/.stamp-build
	$(INSTALL) --no-build-isolation --no-deps --force-reinstall .
	@touch $@
