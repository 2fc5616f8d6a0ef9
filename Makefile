# Two commands on a fresh machine: `make demo` and `make test`.
# An interpreter that already has torch is used as it is; otherwise an environment is made in .venv.
PY := $(shell python3 -c 'import sys, torch; print(sys.executable)' 2>/dev/null || echo $(CURDIR)/.venv/bin/python)
export PYTHONPATH := $(CURDIR)/python
# The demo builds CUDA kernels only where a GPU can run them; `make build` builds them wherever nvcc is.
DEMO_CUDA := $(if $(wildcard /dev/nvidia0),AUTO,OFF)
NINJA = $(shell $(PY) -c 'import shutil, ninja, pathlib; print(pathlib.Path(ninja.BIN_DIR) / "ninja")')
CONFIGURE = $(PY) -m cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(NINJA) -DPython_EXECUTABLE=$(PY) -DTILEWISE_INPLACE=ON
SANITIZERS := $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)
SANITIZER_OPTIONS := detect_leaks=0:detect_stack_use_after_return=0:verify_asan_link_order=0
FAMILY ?=
TESTS := test-mutations test-attention test-others test-race test-asan
BESIDE ?=

.PHONY: help demo test $(TESTS) test-wheel build bench bench-cpp study gpu-report lint format wheel-check torches-check clean
help:
	@echo 'make demo         train two small models on real text and decode with token trees (4 minutes)'
	@echo 'make test         every test; CUDA kernels run emulated, race-checked and sanitized'
	@echo 'make bench        every kernel beside torch (FAMILY=attention for one)'
	@echo 'make study        train with states of 32, 8 and 4 bits, and compare where they end'
	@echo 'make gpu-report   build, test, record and measure on a machine with a GPU (FAMILY=... to split)'
	@echo 'make torches-check the suite under every release of torch from 2.10 on (gigabytes; VERSIONS=2.11.0 for one)'
	@echo 'make lint | format | wheel-check | bench-cpp | clean'

build/.environment: pyproject.toml constraints.txt
	@test -x $(PY) || python3 -m venv .venv
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q 'scikit-build-core>=0.11' 'pybind11>=3.0' 'cmake>=3.26' ninja \
	  'pytest>=8' 'hypothesis>=6.100' numpy expecttest 'rich>=13' 'matplotlib>=3.8' \
	  $(if $(shell command -v nvcc),nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)
	@mkdir -p build && touch $@

# Without make's flags: ninja cannot share the jobs of `make -j2 test-race`.
build: build/.environment
	$(CONFIGURE) -B build -DTILEWISE_EMULATOR=ON
	MAKEFLAGS= $(PY) -m cmake --build build

# The seeded bugs; the whole suite, in two halves; then its small cases again with the CUDA kernels race-checked, and
# under ASan and UBSan. Two at a time, the longest first; where nobody watches, the output of each stays together.
# Bounds stand near what kernels do, so of ten thousand cases some draw misses its own: these are the ones that were
# looked at. pytest alone draws fresh ones each time.
$(TESTS): export TILEWISE_SEED ?= $(shell cat .ci/seed)
test: build
	$(MAKE) -j2 $(if $(MAKE_TERMOUT),,--output-sync=target) $(TESTS) $(BESIDE)
test-attention: build
	$(PY) -m pytest tests/test_attention*.py
test-others: build
	$(PY) -m pytest tests --ignore-glob 'tests/test_attention*' --ignore tests/test_mutations.py
test-mutations: build
	$(PY) -m pytest tests/test_mutations.py
test-race: build
	TILEWISE_EMULATOR=race $(PY) -m pytest tests
test-asan: build
	LD_PRELOAD='$(SANITIZERS)' ASAN_OPTIONS=$(SANITIZER_OPTIONS) TILEWISE_EMULATOR=asan $(PY) -m pytest tests

demo: build/.environment
	$(CONFIGURE) -B build/demo -DTILEWISE_CUDA=$(DEMO_CUDA)
	$(PY) -m cmake --build build/demo
	$(PY) -m tilewise demo

bench: build/.environment
	$(CONFIGURE) -B build/demo -DTILEWISE_CUDA=$(DEMO_CUDA)
	$(PY) -m cmake --build build/demo
	$(PY) -m tilewise bench $(FAMILY)

bench-cpp: build/.environment
	$(CONFIGURE) -B build/bench -DTILEWISE_CUDA=OFF -DTILEWISE_INPLACE=OFF -DTILEWISE_BENCH=ON
	$(PY) -m cmake --build build/bench
	@for program in build/bench/bench/bench_*; do test -x $$program -a -f $$program && $$program; done

study: build/.environment
	$(PY) -m pip install -q scikit-learn
	$(CONFIGURE) -B build/demo -DTILEWISE_CUDA=$(DEMO_CUDA)
	$(PY) -m cmake --build build/demo
	$(PY) tools/optim_study.py

# Needs only nvcc, cmake, ninja, torch, pybind11 and pytest on the machine.
gpu-report:
	$(PY) tools/gpu_report.py $(FAMILY)

build/.lint: tools/lint-requirements.txt | build/.environment
	$(PY) -m pip install -q -r $<
	@touch $@
SOURCES = $(shell git ls-files '*.h' '*.cpp' '*.cu')
TOOLS = $(dir $(PY))
lint: build/.lint
	$(TOOLS)ruff check . && $(TOOLS)ruff format --check .
	$(TOOLS)clang-format --dry-run -Werror $(SOURCES)
format: build/.lint
	$(TOOLS)ruff check --fix . && $(TOOLS)ruff format .
	$(TOOLS)clang-format -i $(SOURCES)

wheel-check: build/.environment
	$(PY) tools/check_wheel.py
# The same of what is built: `make test BESIDE=test-wheel` makes it one more part.
test-wheel: build
	MAKEFLAGS= $(PY) tools/check_wheel.py

# Not in CI: it downloads every release of torch with its CUDA libraries, 3 to 7 GB each.
torches-check: build/.environment
	$(PY) tools/check_torches.py $(VERSIONS)

clean:
	rm -rf build dist python/tilewise/*.so
