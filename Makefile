# make demo | test | check | bench | lint   set up .venv themselves (PYTHON=python3.12 chooses the interpreter)
# make gpu [PARTS="build ops"]      on a machine with a GPU: uses PYTHON's own packages, needs no network
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
OLDER_TRITON := .venv/triton-3.6
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: demo test check machines compat bench lint gpu gpu-rehearsal
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python -m varkern.demo --out out/demo

# A process a core, each on one thread.
test: $(INSTALLED) $(OLDER_TRITON)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses=8

# What does not take long: neither compilers nor Triton's interpreter, no child processes, no training.
LONG := native ops/test_allocations.py ops/test_alignment.py $(patsubst %,test_%.py,kernels_aot gpu_rehearsal golden build \
  imports benchmarks benchmark_checks packaging checkpoint_fuzz sampling_runs train eval demo sharded)
QUICK := not triton and not compile and not fullgraph and not opcheck and not bad_calls and not levels
check: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses=8 -m "not slow" -k "$(QUICK)" $(addprefix --ignore=tests/,$(LONG))

# The numeric tests, or TESTS, as on older processors and with 1, 2 and 4 threads.
machines: $(INSTALLED)
	$(BIN)/python tests/machines.py $(TESTS)

# Before a release: the last commit under other releases of PyTorch and Triton. Downloads gigabytes into .compat/.
compat:
	$(PYTHON) tests/compat.py

bench: $(INSTALLED)
	$(BIN)/varkern bench

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): $(BUILD_INPUTS)
	@command -v $(PYTHON) >/dev/null || { echo "varkern: $(PYTHON) was not found; run: make PYTHON=<a Python 3.10 to 3.13>"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "varkern: $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1), but Python 3.10 to 3.13 is needed; run: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "varkern: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Kernels are compiled ahead of time with this Triton too. It has wheels for Linux alone.
$(OLDER_TRITON): $(INSTALLED)
	test "$$(uname)" != Linux || test -d $@ || \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $@ triton==3.6.0

# Three calls of at most eight minutes, PARTS="build test", "build ops", "build generation", and "build sanitize"; results
# go to the folder GPU_OUT (out/gpu). Ends with an error where a part failed or was not finished.
PARTS ?= build test
gpu:
	$(PYTHON) benchmarks/gpu.py --parts "$(PARTS)"

# All of it against a device that is made up, on a machine without one.
gpu-rehearsal: $(INSTALLED)
	$(BIN)/pytest tests/test_gpu_rehearsal.py
