# make run        sets everything up and trains the tiny model on this machine
# make test       sets everything up and runs the tests that each change has to pass
# make test-full  runs every test; ONLY= names a part of them
PYTHON ?= python3.11
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
export OMP_NUM_THREADS := 1
# Packages are compiled as they are imported, once: all of them take as long as the rest of the set-up.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/pip install -q --no-deps --no-compile

.PHONY: setup run test tests test-full bench check format clean

setup: .venv/ready

# torch's CPU build: from the configured index where it has one, else from PyTorch's own.
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make: found $$($(PYTHON) --version), expected Python 3.11: set PYTHON=" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) "$$(grep '^torch==' requirements.lock)" 2>/dev/null \
		|| $(PIP_INSTALL) --index-url $(TORCH_INDEX) "$$(grep '^torch==' requirements.lock)"
	$(PIP_INSTALL) -r requirements.lock
	$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

run: setup
	$(BIN)/python launch/cluster.py --layout local

# The checks run beside the tests; what they say is shown at the end, where they fail.
test: setup
	@$(MAKE) --no-print-directory check > .venv/check.log 2>&1 & check=$$!; \
		$(MAKE) --no-print-directory tests; tests=$$?; \
		wait $$check || { cat .venv/check.log; exit 1; }; exit $$tests

# WORKERS processes run the tests side by side.
WORKERS ?= 2
tests: setup
	$(BIN)/python -m pytest -m "not full" -n $(WORKERS)

# ONLY is one of pytest's markers (pyproject.toml), or an expression of them; `faults` writes docs/reliability.md's table.
ONLY ?=
test-full: setup
	$(BIN)/python -m pytest $(if $(ONLY),-m "$(ONLY)",--cov) \
		--hypothesis-profile new-examples --reliability=docs/reliability.md

bench: setup
	$(BIN)/python -m tests.bench --all --write docs/benchmarks.md

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .cache runs
