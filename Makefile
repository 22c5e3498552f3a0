# Everything happens in .venv, which the first target that needs it makes. Only Python 3.10+ has to be there.
#
#   make demo      the whole method on small videos, 7 to 11 minutes on 2 CPU cores; results in outputs/demo
#   make test      all tests (CPU, no network), two at once; 20 to 30 minutes on 2 CPU cores
#   make test-quick   those that launch nothing and run no example, 4 to 6 minutes, for the loop of a change
#   make parity    training on two processes against one, every engine, about 12 minutes; outputs/parity.json
#   make memory    memory of a process with each engine, about 10 minutes; outputs/memory.json
#   make benchmark what an update costs, against RGB ReFL and with each switch, about 28 minutes; outputs/benchmark
#   make real-size one step of every recipe at its real size on a pretended GPU, about 25 minutes; docs/real_size.md;
#                  needs g++
#   make recipes   what every recipe needs, as the planner says, about two minutes; docs/recipes.md
#   make gpu-check what one GPU does, under 15 minutes on an H100; without one it says what it would do
#   make quality   lint, format, types, spelling; changes nothing
#   make style     format and fix what can be fixed by itself
#   make clean     removes what the targets above wrote, except .venv

PYTHON ?= python3
# Tests run side by side in this many processes: make test TEST_WORKERS=4, or 0 to run them in one.
TEST_WORKERS ?= 2
# Another build of torch: make demo TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
# Passed on to the demo: make demo DEMO_ARGS=--fresh
DEMO_ARGS ?=
# The same for the benchmark: make benchmark BENCHMARK_ARGS="--sizes tiny"
BENCHMARK_ARGS ?=
# And for the real sizes: make real-size REAL_SIZE_ARGS="--recipes examples/prfl/wan2.1_t2v_14b_720p_lora.yaml"
REAL_SIZE_ARGS ?=
# And for the check of a GPU: make gpu-check GPU_CHECK_ARGS="--device cpu --sizes tiny"
GPU_CHECK_ARGS ?=

BIN := .venv/bin

.PHONY: demo test test-quick parity memory benchmark real-size recipes gpu-check quality style clean
.DELETE_ON_ERROR:

demo: .venv/.package
	$(BIN)/python -m examples.shapes.demo $(DEMO_ARGS)

test: .venv/.dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(TEST_ARGS)

test-quick: .venv/.dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m "not launch" --ignore=tests/distributed --ignore=tests/examples $(TEST_ARGS)

parity: .venv/.dev
	$(BIN)/python -m examples.parity.parity

memory: .venv/.dev
	$(BIN)/python -m examples.parity.memory

benchmark: .venv/.package
	$(BIN)/python -m examples.benchmark.benchmark $(BENCHMARK_ARGS)

real-size: .venv/.package
	$(BIN)/python -m examples.real_size.real_size $(REAL_SIZE_ARGS)

recipes: .venv/.package
	$(BIN)/python -m examples.real_size.recipes

gpu-check: .venv/.dev
	$(BIN)/python -m examples.gpu_check.gpu_check $(GPU_CHECK_ARGS)

quality: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

style: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf outputs build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info

# torch comes first and by itself, so that nothing that requires it chooses another build.
.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install $(TORCH)
	touch $@

.venv/.package: .venv/.torch pyproject.toml
	$(BIN)/pip install --editable .
	touch $@

# deepspeed is built from source, and in isolation its build would fetch a torch of its own. Its kernels are not
# built here: they compile on first use, and the tests use none.
.venv/.dev: .venv/.package
	DS_BUILD_OPS=0 $(BIN)/pip install --no-build-isolation --editable ".[dev,deepspeed,pages,trackers]"
	touch $@
