# Verbs for people and for CI. `make` alone lists them. All that is needed before is Python >= 3.11.

# The first Python that is new enough; `make PYTHON=/path/to/python3 …` to choose.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; exit; fi; done; echo python3)
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
# of the environment that the target lies in
PIP = $(@D)/bin/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)

.PHONY: help install train test trackers peers bench notebooks check format clean
.DEFAULT_GOAL := help

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  ARGS="…"      more arguments for vitrail train, vitrail bench or pytest: make train ARGS="vit-12 --data tiny-imagenet"'
	@echo '  PIP_ARGS="…"  more arguments for pip, such as an index that has torch without CUDA, which is far smaller'
	@echo '  PYTHON=…      the Python (>= 3.11) to make the environment with'

install: .venv/installed ## make the environment: the program, in .venv

train: .venv/installed ## make the environment, train the recipe digits (under a minute), say how well it does
	@$(BIN)/vitrail train $(ARGS)

test: .venv/installed-dev ## make the environment and run the tests
	@$(BIN)/pytest --numprocesses auto --dist loadfile $(ARGS)

trackers: .venv-trackers/installed ## test --track with Weights & Biases and a real MLflow server, in an environment of its own
	@.venv-trackers/bin/pytest tests/test_track.py $(ARGS)

peers: .venv-bench/installed ## test import and export against timm and transformers themselves, in the environment of bench
	@.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) pytest beartype
	@.venv-bench/bin/python -m pytest tests/test_peers.py tests/test_exchange.py $(ARGS)

bench: .venv-bench/installed ## measure speed beside timm, vit-pytorch, transformers and torchvision → docs/speed.md
	@.venv-bench/bin/vitrail bench --output docs/speed.md $(ARGS)

notebooks: .venv/installed-dev ## run the notebooks, and keep in them what they show
	@$(BIN)/python tests/notebooks.py $(ARGS)

check: .venv/installed-dev ## format, lint and strict types, as CI does; nothing is changed
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: .venv/installed-dev ## put the code in its format, and mend what ruff can mend
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

clean: ## remove the environments and all caches of tools; runs/ is left alone
	rm -rf .venv .venv-bench .venv-trackers .mypy_cache .pytest_cache .ruff_cache build dist
	find vitrail tests -name __pycache__ -type d -prune -exec rm -rf {} +

define environment
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. Vitrail needs Python 3.11 or later; name one with: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) --version); Vitrail needs 3.11 or later. Name one with: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make environments; on Debian and Ubuntu, install the package python3-venv."; exit 1; }
	@echo "Making the environment in $(@D) (torch is large: some minutes the first time) …"
	@$(PYTHON) -m venv --clear $(@D)
endef

# An environment is made anew when what it is made from has changed.
.venv/installed: pyproject.toml constraints.txt
	$(environment)
	@$(PIP) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(PIP) --editable '.[dev]'
	@touch $@

# Their own: half a gigabyte that most have no use for.
.venv-trackers/installed: pyproject.toml constraints.txt
	$(environment)
	@$(PIP) --editable '.[dev,wandb,mlflow]'
	@touch $@

# One of its own: what is compared with is nothing that Vitrail needs.
.venv-bench/installed: pyproject.toml constraints.txt
	$(environment)
	@$(PIP) --editable '.[bench]'
	@touch $@
