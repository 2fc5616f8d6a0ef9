# Two commands on a fresh machine: `make demo` and `make test`.
# An interpreter that already has torch is used as it is; otherwise an environment is made in .venv.
PY := $(shell python3 -c 'import sys, torch; print(sys.executable)' 2>/dev/null || echo $(CURDIR)/.venv/bin/python)
export PYTHONPATH := $(CURDIR)/python
# Emulated CUDA kernels need no GPU; nvcc output is only worth its build time for tests and on machines with a GPU.
HAS_GPU := $(wildcard /dev/nvidia0)
DEMO_CUDA := $(if $(HAS_GPU),AUTO,OFF)
CMAKE := $(PY) -m cmake
CONFIGURE = $(CMAKE) -S . -B $(1) -G Ninja -DPython_EXECUTABLE=$(PY) -DTILEWISE_INPLACE=ON $(2)

.PHONY: demo test build lint format clean

build/.environment: pyproject.toml constraints.txt
	@test -x $(PY) || python3 -m venv .venv
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q 'scikit-build-core>=0.11' 'pybind11>=3.0' 'cmake>=3.26' ninja numpy pytest hypothesis expecttest rich matplotlib
	@mkdir -p build && touch $@

build: build/.environment
	$(call CONFIGURE,build,-DTILEWISE_EMULATOR=ON)
	$(CMAKE) --build build

test: build
	$(PY) -m pytest tests

demo: build/.environment
	$(call CONFIGURE,build/demo,-DTILEWISE_CUDA=$(DEMO_CUDA))
	$(CMAKE) --build build/demo
	$(PY) -m tilewise demo

clean:
	rm -rf build python/tilewise/*.so
