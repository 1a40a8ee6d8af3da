# Everything a person types. `make` alone prints this list.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help demo run test compose-test chaos overload soak hostile audit bench check format lock clean

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.installed-local ## install, start everything, transcribe the sample, print it, stop
	@$(BIN)/python -m local demo

run: $(VENV)/.installed-local ## start the whole service on 127.0.0.1:${PORT:-8000}; Ctrl-C stops it
	@exec $(BIN)/python -m local run

test: $(VENV)/.installed-dev ## install and run the tests
	@$(BIN)/python -m tests.run

compose-test: $(VENV)/.installed-dev ## build, start, scale and break the Compose stack (Docker, port 80)
	@$(BIN)/python -m pytest tests/compose -m compose -s

chaos: $(VENV)/.installed-dev ## break the running service for SECONDS (300), in an order of SEED (Linux, root)
	@$(BIN)/python -m pytest tests/chaos/test_chaos.py tests/chaos/test_resume.py -m chaos -s

overload: $(VENV)/.installed-dev ## one of three callers sends ten times too much, for SECONDS (120; Linux)
	@$(BIN)/python -m pytest tests/chaos/test_overload.py -m chaos -s

soak: $(VENV)/.installed-dev ## steady load for MINUTES (20): memory and descriptors must stay flat
	@$(BIN)/python -m pytest tests/chaos/test_soak.py -m chaos -s

bench: $(VENV)/.installed-dev ## measure ratios against faster-whisper; writes the README's table (minutes)
	@$(BIN)/python -m bench

hostile: $(VENV)/.installed-dev ## hostile files and fuzzing, with a table in docs/hostile-media.md (minutes)
	@$(BIN)/python -m tests.hostile --fuzz 25

check: $(VENV)/.installed-dev ## lint, types and import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

audit: $(VENV)/.installed-dev ## ask whether what requirements/*.txt pins has known flaws (needs pypi.org)
	@$(BIN)/pip-audit --strict --progress-spinner off --disable-pip --require-hashes \
		-r requirements/dev.txt -r requirements/cuda.txt

format: $(VENV)/.installed-dev ## rewrite the code as the linter wants it
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: $(VENV)/.installed-dev ## compile requirements/*.txt from pyproject.toml (needs the package index)
	@$(LOCK) pyproject.toml --all-extras --group dev -o requirements/dev.txt
	@$(LOCK) pyproject.toml --extra api -c requirements/dev.txt -o requirements/api.txt
	@$(LOCK) pyproject.toml --extra worker -c requirements/dev.txt -o requirements/worker.txt
	@$(LOCK) pyproject.toml --extra monitor -c requirements/dev.txt -o requirements/monitor.txt
	@$(LOCK) --group cuda -o requirements/cuda.txt
	@$(LOCK) pyproject.toml --extra api --extra worker --extra client --extra local -c requirements/dev.txt \
		-o requirements/local.txt

clean: ## remove the virtual environment and caches (keeps .data)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed; {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3 -m venv failed: install your system's python3-venv package"; exit 1; }

# One stamp per lock file: a second `make` needs neither the network nor time.
$(VENV)/.installed-%: requirements/%.txt | $(BIN)/python
	@echo "Installing requirements/$*.txt (first time only)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@
