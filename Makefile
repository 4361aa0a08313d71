# `make demo` and `make test` need Python 3.11 (PYTHON=…) and make; the rest they set up in .venv.
PYTHON ?= python3.11
BIN := .venv/bin
FAST := $(addprefix tests/,nn clip video datasets episodes test_files.py test_loops.py project/test_imports.py)

.PHONY: demo study test test-fast test-all check check-wheel docs format clean

# clip-anytorch has CLIP's vocabulary, for tests; the code beside it, which nothing imports, would need torchvision.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]' --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps clip-anytorch --constraint constraints.txt
	touch $@

demo: .venv/installed
	$(BIN)/clip-m2df demo

# Everything behind docs/results.md that has not been run yet, and the page; with QUICK=1 a small one, in minutes.
study: .venv/installed
	$(BIN)/python -m study run $(if $(QUICK),--quick)

# One thread a worker: threads of two processes would wait for each other's cores. A third of the time is --cov's.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --cov --cov-report term --cov-fail-under 90

# The parts by themselves, in about a minute, while one of them is being changed: no training, no command, no page.
test-fast: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 $(FAST)

# What takes longer: trainings to their end, several devices, every block of the pages, thousands of damaged files.
test-all: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal -m slow

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The package as its users get it: a wheel in an environment of its own, in which nothing else was installed.
check-wheel:
	rm -rf build/venv build/*.whl
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir build .
	build/venv/bin/python -m pip install --quiet build/*.whl --constraint constraints.txt
	build/venv/bin/python scripts/check_wheel.py

# The documentation site, in build/site.
docs: .venv/installed
	$(BIN)/python -m zensical build --clean --strict

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .coverage*
