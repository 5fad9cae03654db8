# The front door. Bare `make` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.installed
LOCKS  := requirements
WHEELHOUSE := roles/llmrack_artifacts/files/wheelhouse.py
LAB    := $(BIN)/python tests/lab/lab.py

# Two files of tests at a time, each in a process of its own: most of their time is spent waiting for programs.
PARALLEL := --numprocesses=2 --dist=loadfile

export MODEL

.DEFAULT_GOAL := help
.PHONY: help setup model model-exam demo test test-fast lint format docs lock bench-node bench-gate bench-routing soak chaos lab-up lab-deploy lab-down lab-full clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMPS)/all ## the virtual environment .venv, with Ansible and all that tests need

demo: $(STAMPS)/run ## two nodes and a gate on this machine; ONCE=1 answers one question and stops
	@$(BIN)/llmgate demo $(if $(MODEL),--model "$$MODEL") $(if $(ONCE),--once) $(if $(QUESTION),--question "$(QUESTION)")

test: $(STAMPS)/all ## every test but what takes long; as root on Debian or Ubuntu the lab of real systemd hosts too
	@$(LAB) prepare || true
	@$(BIN)/python -m pytest $(PARALLEL) -m "not full"

test-fast: $(STAMPS)/all ## every test but the lab's
	@$(BIN)/python -m pytest $(PARALLEL) -m "not lab and not full"

lint: $(STAMPS)/all ## ruff, mypy, import-linter, ansible-lint, yamllint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/yamllint --strict .
	@PATH="$(CURDIR)/$(BIN):$$PATH" ANSIBLE_HOME="$(CURDIR)/.ansible" $(BIN)/ansible-lint --offline --profile production

format: $(STAMPS)/all ## let ruff format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(STAMPS)/run ## write docs/settings.md and docs/health.md from the tables in the code
	@$(BIN)/python -m tests.settings_page
	@$(BIN)/python -m tests.health_page

lock: ## resolve the dependencies anew (needs uv)
	@$(PYTHON) $(LOCKS)/lock.py

bench-node: $(STAMPS)/all ## llmnode beside its rivals, built from the pinned source; writes out/bench-node.json
	@$(BIN)/python -m tests.bench.node $(BENCH)

bench-gate: $(STAMPS)/all ## llmgate beside nginx and LiteLLM's proxy; writes out/bench-gate.json
	@$(BIN)/python -m tests.bench.gate $(BENCH)

bench-routing: $(STAMPS)/all ## routing policies beside each other, over four real nodes; writes out/bench-routing.json
	@$(BIN)/python -m tests.bench.routing $(BENCH)

soak: $(STAMPS)/all ## 2,000 mixed requests against one node, and what they leave behind: nothing
	@$(BIN)/python -m tests.soak.soak $(SOAK)

chaos: $(STAMPS)/all ## 200 streams while nodes are killed, stopped and drained and gates restarted: none is lost
	@$(BIN)/python -m tests.chaos.chaos $(CHAOS)

model: ## train the handbook model from scratch (PyTorch, in a virtual environment of its own), then examine it
	@test -x .venv-train/bin/python || $(PYTHON) -m venv .venv-train
	@.venv-train/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0
	@PYTHON="$(PYTHON)" sh $(LOCKS)/install.sh .venv-train node gate test
	@.venv-train/bin/python -m llmnode.handbook.train

model-exam: $(STAMPS)/run ## ask the handbook model its exam, through llmnode's engine
	@$(BIN)/python -m llmnode.handbook.exam $(MODEL)

lab-up: $(STAMPS)/all ## boot three systemd hosts in containers (root)
	@$(LAB) prepare
	@$(LAB) up

lab-deploy: $(STAMPS)/all ## deploy llmrack on the lab's hosts, over SSH
	@$(LAB) deploy

lab-full: $(STAMPS)/all ## every test on the lab's hosts, and all that take long (root)
	@$(LAB) prepare
	@$(BIN)/python -m pytest -m "lab or full"

lab-down: $(STAMPS)/all ## remove the lab's hosts
	@$(LAB) down

clean: ## remove what make made here; the cache of built wheels stays
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .ansible

# What it takes to run llmrack; `all` adds what tests, linters and playbooks need.
$(STAMPS)/run: $(LOCKS)/node.txt $(LOCKS)/gate.txt $(LOCKS)/test.txt $(LOCKS)/llama.txt pyproject.toml $(WHEELHOUSE)
	@PYTHON="$(PYTHON)" sh $(LOCKS)/install.sh $(VENV) node gate test
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/all: $(STAMPS)/run $(LOCKS)/deploy.txt $(LOCKS)/dev.txt
	@PYTHON="$(PYTHON)" sh $(LOCKS)/install.sh $(VENV) node gate test deploy dev
	@mkdir -p $(STAMPS) && touch $@
