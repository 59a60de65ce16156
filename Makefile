# make demo    set everything up and write images           make test   set everything up and run the tests
# make bench   native against reference, a table of ratios   make gpu    build, test and measure on an NVIDIA GPU
# make figures the pictures of this README, with the bundled model
# make kernels docs/kernels.md: registers, occupancy, floors of every CUDA kernel (nvcc, no GPU)
# Variables: PYTHON (the interpreter to start from), PYTEST_ARGS, EXTRAS (of pyproject.toml), FLEXVAR_CUDA=auto|on|off, CUDAARCHS.
PYTHON ?= python3
EXTRAS ?= test
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: FORCE setup ext emulated tiles demo test bench gpu figures kernels linters lint format clean

# The virtual environment borrows the packages of the Python it starts from when that has a torch that fits, and installs
# torch 2.13.0 otherwise. Packages that are already there are not fetched, so a prepared machine needs no network.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	@if $(PYTHON) -c 'import torch; v = tuple(map(int, torch.__version__.split(".")[:2])); raise SystemExit(v < (2, 11))' 2>/dev/null; then \
	  $(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth; \
	  echo "using the torch of $(PYTHON)"; \
	else \
	  $(BIN)/python -m pip install --disable-pip-version-check -q torch==2.13.0; \
	fi

$(VENV)/requirements: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -q "setuptools>=70" wheel pybind11 ninja
	command -v cmake >/dev/null || $(BIN)/python -m pip install --disable-pip-version-check -q cmake
	touch $@

# New when it says something else than at the last build.
BUILD_SETTINGS = FLEXVAR_CUDA=$(FLEXVAR_CUDA) CUDAARCHS=$(CUDAARCHS) nvcc=$(shell command -v nvcc)
$(VENV)/build-settings: $(BIN)/python FORCE
	@echo "$(BUILD_SETTINGS)" | cmp -s - $@ || echo "$(BUILD_SETTINGS)" > $@

$(VENV)/installed-$(EXTRAS): $(VENV)/requirements $(VENV)/build-settings CMakeLists.txt setup.py pyproject.toml $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

setup: $(VENV)/installed-$(EXTRAS)

# Native libraries only, in place, for whatever PYTHON is.
ext:
	$(PYTHON) setup.py -q build_ext --inplace

# The module with which tests/emulated runs the CUDA kernels on the CPU; needs no nvcc.
emulated:
	cmake -S . -B build/emulated -G Ninja -DFLEXVAR_TESTING=ON -DFLEXVAR_CUDA=off -DPython_EXECUTABLE=$$(command -v $(PYTHON))
	cmake --build build/emulated --target _emulated

# The library with which tests/emulated runs the code for Intel's tile unit (AMX) on other CPUs with AVX512-BF16.
tiles: setup
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/native-$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)') --target emulated_tiles

demo: setup
	mkdir -p out
	$(BIN)/flexvar generate --num 24 --seed 0 --out out/demo.png
	@echo "look at out/demo.png"

test: setup tiles
	PATH="$(abspath $(BIN)):$$PATH" $(MAKE) emulated PYTHON=$(abspath $(BIN))/python
	$(TEST_EVERYTHING)

# Emulated kernels are single threads that take most of the time: as many at once as there are cores. Everything else has
# threads of its own.
ifdef PYTEST_ARGS
TEST_EVERYTHING = FLEXVAR_REQUIRE_EMULATED=1 $(BIN)/python -m pytest $(PYTEST_ARGS)
else
TEST_EVERYTHING = FLEXVAR_REQUIRE_EMULATED=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/emulated && \
	$(BIN)/python -m pytest --ignore=tests/emulated
endif

bench: setup
	$(BIN)/python -m benchmarks.report

# Every CUDA test, the sanitizers over those of the ops, every benchmark and the parts of a generation's time: an hour or two,
# most of it the sanitizers'. What fails in one keeps nobody from the others.
gpu: export FLEXVAR_CUDA = on
gpu: setup
	status=0; FLEXVAR_REQUIRE_CUDA=1 $(BIN)/python -m pytest -m cuda $(PYTEST_ARGS) || status=$$?; \
	$(BIN)/python -m benchmarks.report --require-cuda || status=$$?; \
	$(BIN)/python -m benchmarks.parts --depth 16 24 --batch 1 64 --out benchmarks/results || status=$$?; \
	$(BIN)/python -m tests.sanitize || status=$$?; exit $$status

figures: setup
	$(BIN)/python -m benchmarks.figures

kernels: setup
	PATH="$(abspath $(BIN)):$$PATH" $(MAKE) emulated PYTHON=$(abspath $(BIN))/python
	$(BIN)/python -m benchmarks.kernel_table

linters: $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q ruff mypy clang-format

lint: setup linters
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: linters
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build $(VENV) flexvar_ext/*.so tests/emulated/*.so tests/emulated/tiles *.egg-info
