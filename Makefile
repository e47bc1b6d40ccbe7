# A newcomer needs `make predict` and `make test`; both make .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
ENVIRONMENT := .venv/.ready
TEST_ENVIRONMENT := .venv/.ready-for-tests
VLLM_ENVIRONMENT := .venv-vllm/.ready
EVAL_ENVIRONMENT := .venv-eval/.ready
MAKE_ENV = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "$(PYTHON) is missing or older than Python 3.11; name another with PYTHON=..." >&2; exit 1; }; \
	$(PYTHON) -m scripts.make_env

# Passed through the environment, so that quotes in them are safe.
export IMAGE VIDEO QUESTION MODEL PORT

.PHONY: help predict test test-vllm test-eval lint lock serve clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

predict: $(ENVIRONMENT) ## answer a question: make predict IMAGE=cat.jpg QUESTION="What is it?" MODEL=demo, or VIDEO=clip.mp4
	@$(BIN)/python -m scripts.ask --image "$$IMAGE" --video "$$VIDEO" --question "$$QUESTION" --model "$$MODEL"

test: $(TEST_ENVIRONMENT) ## run all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not alone"
	@$(BIN)/python -m pytest -m alone

test-vllm: $(VLLM_ENVIRONMENT) ## test the vLLM plugin, in .venv-vllm
	@.venv-vllm/bin/python -m pytest tests/vllm_plugin

test-eval: $(EVAL_ENVIRONMENT) $(TEST_ENVIRONMENT) ## compare lmms-eval with the own evaluation, in .venv-eval
	@$(BIN)/python -m scripts.demo_model lmms-eval --scenes 40
	@.venv-eval/bin/python -m pytest tests/lmms_eval --log-cli-level=INFO

lint: $(TEST_ENVIRONMENT) ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

lock: $(ENVIRONMENT) ## pin all dependencies; to upgrade them: make lock LOCK=--upgrade
	@$(BIN)/python -m scripts.lock $(LOCK)

serve: $(ENVIRONMENT) ## run the HTTP server: make serve MODEL=demo PORT=5000
	@XGENMM_MODEL="$$MODEL" scripts/serve

clean: ## remove environments and caches; keep weights
	rm -rf .venv .venv-vllm .venv-eval .cog build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Both are the same folder: the second adds what only tests need.
$(ENVIRONMENT): requirements.txt
	@$(MAKE_ENV) .venv -r requirements.txt
	@touch $@

$(TEST_ENVIRONMENT): requirements-dev.txt
	@$(MAKE_ENV) .venv -r requirements-dev.txt
	@touch $(ENVIRONMENT) $@

# The requirements pin torch's build for CPUs, which only PyTorch's own index has:
# PIP_EXTRA_INDEX_URL=... make test-vllm
$(VLLM_ENVIRONMENT): requirements-vllm.txt
	@$(MAKE_ENV) .venv-vllm --no-deps -r requirements-vllm.txt
	@touch $@

$(EVAL_ENVIRONMENT): requirements-eval.txt
	@$(MAKE_ENV) .venv-eval -r requirements-eval.txt
	@touch $@

$(ENVIRONMENT) $(TEST_ENVIRONMENT) $(VLLM_ENVIRONMENT) $(EVAL_ENVIRONMENT): pyproject.toml scripts/make_env.py
