# Every target makes the virtual environment when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: study test test-ray lint format docs bench clean

study: $(STAMP)  ## Run the paper's claims on this machine and write results/report.html
	$(BIN)/onsphere study --out results

# Bytecode is kept, for the many processes that the tests start.
test: $(STAMP)  ## The test suite: everything but what is slow or needs a GPU
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu"

test-ray: $(STAMP)  ## Studies on a Ray cluster of two machines, played by this one; installs Ray
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	$(BIN)/python -m pytest -q tests/studies/engine/test_ray_engine.py

lint: $(STAMP)  ## Style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## These pages: build/docs/index.html; a warning stops the build
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html -d build/doctrees docs build/docs

bench: $(STAMP)  ## Measure against peers, side by side (see benchmarks/)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build results

KERNEL := $(wildcard src/onsphere/optim/kernels/cpu/*.[ch])

$(STAMP): pyproject.toml setup.py constraints.txt $(KERNEL)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)
