# Every command works from a fresh clone: each target that needs the virtual environment makes it first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DURATION ?= 60
SOURCE ?= sim
CAPTURE ?=
SPEED ?= 1
ARGS ?=

PARTS ?= matrix,kills,freeze,broker,cluster,scale

.PHONY: help setup demo test test-only test-unit lint format bench storm chaos soak containers lock clean

help: ## what there is to run
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(STAMP) ## the virtual environment with every dependency, by hash, and .venv/bin/orderflow

$(STAMP): infra/requirements/run.txt infra/requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "orderflow needs Python 3.11 or newer, and %s is %s: set PYTHON=/path/to/python3.11" % (sys.executable, sys.version.split()[0]))'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing dependencies into $(VENV) (a minute on a fresh machine)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r infra/requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: setup ## the whole pipeline offline: broker, simulated exchange, every service, live view, lake (DURATION=60 SOURCE=sim CAPTURE=)
	@$(BIN)/orderflow run --source $(SOURCE) --duration $(DURATION) --speed $(SPEED) $(if $(CAPTURE),--capture $(CAPTURE)) $(ARGS)

test: lint ## lint, types and every test
	@$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-only: setup ## some tests alone: ARGS="tests/unit/test_config.py -k wrong"
	@$(BIN)/python -m pytest $(ARGS)

test-unit: setup ## the quick tests alone: no broker, no capture
	@$(BIN)/python -m pytest tests/unit tests/property $(ARGS)

lint: setup ## ruff, mypy (strict) and the rule that keeps clocks and I/O out of the core
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tests/lint_pure_core.py

format: setup ## put the code in the project's style
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: setup ## measured rates of every stage, as a table and as JSON
	@$(BIN)/python -m tests.bench $(ARGS)

chaos: setup ## kill anything, lose nothing: crash points, kills, brokers, scaling; a verifier from outside (SEED= ROUNDS=20 PARTS=)
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) --rounds $(or $(ROUNDS),20) --only $(PARTS) $(ARGS)

soak: setup ## 2,000 frames a second for MINUTES=30: memory, lag, latency of every service
	@$(BIN)/python -m tests.chaos --only soak --minutes $(or $(MINUTES),30) $(ARGS)

containers: setup ## docker-compose.yml from a fresh copy: up, kills, scale, down and up, judged from outside (needs a Docker engine)
	@$(BIN)/python -m pytest -m containers -rs tests/containers $(ARGS)

storm: setup ## the exchange's faults against the recorder, on virtual time (SEED=1 ROUNDS=100 MINUTES=10 ACTIVITY=4 JOBS=2 KINDS=drop,kill)
	@$(BIN)/python -m tests.storm --seed $(or $(SEED),1) --rounds $(or $(ROUNDS),100) --minutes $(or $(MINUTES),10) --jobs $(or $(JOBS),2) --activity $(or $(ACTIVITY),4) --kinds "$(KINDS)"

lock: setup ## resolve the dependencies anew and pin them with hashes
	@cd infra/requirements && ../../$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate run.in -o run.txt
	@cd infra/requirements && ../../$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -c run.txt dev.in -o dev.txt
	@cd infra/requirements && ../../$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -c run.txt services.in -o services.txt

clean: ## remove the virtual environment and every run
	@rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache build
