# Two commands set up everything on a fresh machine:
#   make quickstart   environment, corpus, tokens, a distributed run, export, generated text
#   make test         the whole test suite
# PYTHON chooses the interpreter the environment is made with.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint environment clean
.DELETE_ON_ERROR:

quickstart: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart.sh

# A file's tests stay together, since they share what is dear to set up. One thread a process: threads that wait for one
# another on busy cores take many times the work.
test: $(STAMP)
	@echo "== running the tests"
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	  --numprocesses logical --maxprocesses 4 --dist loadfile

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/mypy minicpm_megatron tools

environment: $(STAMP)

$(STAMP): requirements.txt setup.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	  || { echo "error: $(PYTHON) is not Python 3.11 or 3.12; install one of them, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "== making the environment in $(VENV) with $(PYTHON) (a few minutes, several hundred MB)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' requirements.txt)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs/quickstart
