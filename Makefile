# The project's commands; `make` lists them. Each makes .venv from requirements.lock where that is missing or older.
PYTHON ?= python3
TECHNIQUE ?= lora
DATA ?=
PORT ?= 5000
EXPERIMENT := $(shell sed -n 's/^experiment: *\([^ #]*\).*/\1/p' params.yaml)
BIN := .venv/bin
VENV := .venv/requirements.lock
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

# dvc.lock says what this clone made, and DVC refuses one that git ignores: the empty ones that are tracked are changed without git asking.
# To keep yours in git: git update-index --no-skip-worktree <them>, then git add.
OWN_LOCKS := git ls-files -z -- '*dvc.lock' | xargs -0 -r git update-index --skip-worktree

.PHONY: help try repro adopt sweep ui server test test-slow test-gpu lint lock

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile | awk -F': ' '{printf "make %-10s %s\n", $$1, $$2}'

try: $(VENV) ## from a file of rows to an answer: make try DATA=reviews.csv
	@test -n "$(DATA)" || { echo "which file? make try DATA=reviews.csv"; exit 2; }
	@$(BIN)/python -m pipeline try "$(DATA)"

# What DVC says of these names no fix.
CHOSEN := test -f experiments/$(EXPERIMENT)/dvc.yaml || { echo "error: params.yaml names the experiment $(EXPERIMENT), which has no stages; alignscope try $(EXPERIMENT) --plan writes experiments/$(EXPERIMENT)/dvc.yaml from experiments/$(EXPERIMENT).yaml" >&2; exit 2; }; \
  grep -q '^experiment: *$(EXPERIMENT) *\(\#.*\)*$$' experiments/$(EXPERIMENT)/params.yaml || { echo "error: experiments/$(EXPERIMENT)/params.yaml is of another experiment; set experiment: $(EXPERIMENT) there" >&2; exit 2; }

repro: $(VENV) ## bring the experiment that params.yaml names up to date, print its table
	@$(CHOSEN)
	@$(OWN_LOCKS)
	@$(BIN)/dvc repro
	@cat report/$(EXPERIMENT)/table.md
	@echo "report: report/$(EXPERIMENT)/index.html"

adopt: $(VENV) ## take the results of `python -m pipeline.cells` into DVC as they are
	@$(CHOSEN)
	@$(OWN_LOCKS)
	@$(BIN)/dvc repro --quiet experiments/$(EXPERIMENT)/dvc.yaml:plan
	@$(BIN)/python -m pipeline.plan experiments=$(EXPERIMENT) adopt=true
	@$(BIN)/dvc commit --force --quiet experiments/$(EXPERIMENT)/dvc.yaml:train
	@if $(BIN)/dvc stage list --name-only experiments/$(EXPERIMENT)/dvc.yaml | grep -q train_after; then \
	  $(BIN)/dvc commit --force --quiet experiments/$(EXPERIMENT)/dvc.yaml:train_after; fi
	@echo "adopted; make repro writes the report"

sweep: $(VENV) ## search the rank of TECHNIQUE (lora) and confirm the best on test
	@$(BIN)/python -m pipeline.sweep experiments=$(EXPERIMENT) technique=$(TECHNIQUE)

ui: $(VENV) ## MLflow's pages on http://127.0.0.1:PORT (5000)
	@echo "the experiments: http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning (the note of one links to its runs with accuracy, time, memory and r first)"
	@$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(PORT) --workers 1

server: $(VENV) ## an MLflow server with users on 127.0.0.1:PORT, over the database that MLFLOW_BACKEND_STORE_URI names (docs/scale.md)
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_AUTH_CONFIG_PATH=$${MLFLOW_AUTH_CONFIG_PATH:-conf/tracking/basic_auth.ini} $(BIN)/mlflow server --app-name basic-auth --host 127.0.0.1 --port $(PORT) --artifacts-destination mlartifacts

test: $(VENV) ## the fast tests, minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal -m "not slow and not gpu"

test-slow: $(VENV) ## the slow tests, some of which fetch from the package registry
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile -m "slow and not gpu"

test-gpu: $(VENV) ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu

lint: $(VENV) ## ruff, mypy, codespell
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/codespell

lock: $(VENV) ## pin the newest versions that pyproject.toml allows (where pip finds torch's CPU build)
	@CUSTOM_COMPILE_COMMAND="make lock  (pip-compile --extra dev --allow-unsafe pyproject.toml requirements.in)" $(BIN)/pip-compile --upgrade --quiet --extra dev --allow-unsafe --strip-extras --annotation-style line \
	  --no-emit-options --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --output-file requirements.lock pyproject.toml requirements.in
	@sed -i.bak 's/^\(torch==[0-9.]*\)+cpu/\1/' requirements.lock && rm requirements.lock.bak

$(VENV): requirements.lock
	@if cmp -s $< $@; then touch $@; else \
	  $(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else "alignscope needs Python 3.11 or 3.12, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % v)' && \
	  echo "installing the packages of $< into .venv; takes minutes, the log is .venv/install.log" && \
	  $(PYTHON) -m venv --clear .venv && \
	  { $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r $< > .venv/install.log 2>&1 || \
	    { tail -n 20 .venv/install.log; echo "the installation failed; see .venv/install.log, then run make again"; exit 1; }; } && \
	  $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable . >> .venv/install.log 2>&1 && \
	  cp $< $@; fi
