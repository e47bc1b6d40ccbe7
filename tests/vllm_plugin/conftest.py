"""Tests of the vLLM plugin, for `make test-vllm`: they need an environment of their own."""

import importlib.util
import os

# Where vLLM is not installed, as in `make test`, there is nothing here to collect.
collect_ignore_glob = ["*"]
if importlib.util.find_spec("vllm"):
    collect_ignore_glob = []
    # Read when vLLM is imported: engines in this process, on all cores, with a small cache.
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",  # GB
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
    )
