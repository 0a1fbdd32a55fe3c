# `make demo` and `make test` need Python 3.11 or newer, pip and make; each sets up .venv on its own. With the newest
# versions of everything instead of the pinned ones: `make test VENV=.venv-newest CONSTRAINTS= PYTHON=python3.13`.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=-c %)

.PHONY: demo test test-wheel test-gpu lint bench bench-gpu bench-peers bench-jax parity clean

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py

# Two processes of one thread each: the tests are small, and threads that wait for each other are slower than none. A
# test that hangs fails.
PYTEST_ARGUMENTS := -n 2 --dist worksteal -o faulthandler_exit_on_timeout=true
test test-wheel: export OMP_NUM_THREADS = 1

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGUMENTS)

# The suite, on the wheel, from outside the repository.
test-wheel: $(VENV)/.dev
	$(BIN)/python tests/run_on_wheel.py $(PYTEST_ARGUMENTS) $(ON_WHEEL)

# On a machine with a CUDA GPU: the kernels' tests, which compile for minutes, the parity command, and the kernels under
# CUDA's memory checker. Where nothing can be installed, with a virtual environment ENV that has what they need:
# `PYTHONPATH=$PWD:$PWD/backends make -o ENV/.dev test-gpu VENV=ENV`; likewise `bench-gpu`.
test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -n 8 tests/torch_backend/kernels
	$(BIN)/python -m eggroll.parity --backends torch-cuda
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(BIN)/python -m pytest tests/torch_backend/kernels/test_check.py tests/torch_backend/kernels/test_operations.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(VENV)/.dev
	$(BIN)/python -m eggroll.parity

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/torch_generation.py $(if $(wildcard $(VENV)-peers/.peers),--peers $(VENV)-peers/bin/python)

# Resumes what was measured on this GPU before; BENCH_GPU="--seconds 500 --only target" and the like narrow it down.
bench-gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu_generation.py $(BENCH_GPU)

bench-jax: $(VENV)/.dev
	$(BIN)/python benchmarks/jax_generation.py

# The libraries that the benchmark compares with, in an environment of their own; `make bench` then includes them.
bench-peers: $(VENV)-peers/.peers
	$(MAKE) bench

clean:
	rm -rf $(VENV) $(VENV)-peers build dist out site .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps say what is installed; a change of the requirements installs anew.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing eggroll with PyTorch into $(VENV)"
	$(PIP_INSTALL) -e '.[torch,examples]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing eggroll with every backend and the development tools into $(VENV)"
	$(PIP_INSTALL) -e '.[torch,jax,examples,dev]'
	@touch $@ $(VENV)/.demo

$(VENV)-peers/.peers: constraints.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet -c constraints.txt torch evox==1.4.0 torcheggroll==0.2.0 evotorch==0.6.1
	@touch $@
