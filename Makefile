# Two commands on a fresh machine: `make demo` and `make test`. Both make and reuse .venv.
PYTHON ?= python3
TORCH_ARGS ?=
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test faults lint types wheel clean

demo: $(READY)
	$(BIN)/patchdiffusion train glyphs $(or $(DEMO),--out demo)
	@echo "now look at samples/ and report.html in that folder"

test: $(READY)
	$(BIN)/pytest -n 2 -m "not slow and not fault and not gpu" $(TESTS)

faults: $(READY)
	$(BIN)/pytest -n 2 -m "fault and not slow" tests/faults

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/pyright

wheel: $(READY)
	$(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir dist .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt $(TORCH_ARGS) "torch>=2.6"
	$(BIN)/pip install --quiet -c constraints.txt "hatchling>=1.27" "editables>=0.5"
	$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv demo dist build .pytest_cache .ruff_cache
