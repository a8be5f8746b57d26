# Two commands set up everything on a fresh machine:
#   make quickstart   environment, corpus, tokens, a distributed run, export, generated text
#   make test         the whole test suite, on the CPU even where there is a GPU
#   make check        ruff, mypy --strict and the fast tests: what to run before each commit
#   make docs         the documentation as a site in site/; a broken link fails
#   make test-gpu     those tests that compute on the device, on one GPU
# PYTHON names the interpreter that the environment is made with; without it the first Python 3.12 that runs is taken.
# TORCH_INDEX names a package index for torch alone, for its CPU build:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu

# The python3.12 on PATH can be a version manager's shim that only prints an error, so that its own installs are tried, too.
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3.12 \
  $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) \
  $(wildcard $(HOME)/.asdf/installs/python/3.12*/bin/python3.12) \
  $(wildcard $(HOME)/.local/share/mise/installs/python/3.12*/bin/python3.12) \
  $(wildcard $(HOME)/.local/share/uv/python/cpython-3.12*/bin/python3.12) \
  python3 python)
IS_312 := import sys; sys.exit(sys.version_info[:2] != (3, 12))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart check test test-fast test-gpu lint docs environment clean
.DELETE_ON_ERROR:

quickstart: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart.sh

# A file's tests stay together, since they share what is dear to set up, and files run in the order of tests/conftest.py.
# One thread a process: threads that wait for one another on busy cores take many times the work.
test: $(STAMP)
	@echo "== running the tests"
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	  --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# One process: tests that measure memory, or fill it, want the GPU alone.
test-gpu: $(STAMP)
	@echo "== running the tests that compute on the device"
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest --device cuda -rs

# Types and tests at the same time.
check: $(STAMP)
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint test-fast

# tests/fast.txt lists the fast tests; tests that start no jobs of several processes, for the most part.
test-fast: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	  --numprocesses logical --maxprocesses 4 --dist loadfile @tests/fast.txt

# mypy is strict by pyproject.toml
lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet . && $(BIN)/mypy minicpm_megatron tools

docs: $(STAMP)
	@$(PIP_INSTALL) --no-build-isolation -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

environment: $(STAMP)

PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(STAMP): requirements.txt setup.py
	@for python in $(PYTHONS); do \
	  if "$$python" -c '$(IS_312)' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: no Python 3.12 runs here (tried: $(PYTHONS)); install it, or name it: make PYTHON=/path/to/python3.12" >&2; \
	  exit 2; \
	fi; \
	echo "== making the environment in $(VENV) with $$found (about three minutes and 5.6 GB with torch's CUDA build)"; \
	$(BIN)/python -c '$(IS_312)' 2>/dev/null || "$$found" -m venv --clear $(VENV)
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$$(sed -n 's/^torch==//p' requirements.txt)
	@$(PIP_INSTALL) -r requirements.txt
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs/quickstart site
