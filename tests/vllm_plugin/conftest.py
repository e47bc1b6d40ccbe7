"""Settings for the tests of the vLLM plugin, for `make test-vllm` and its own environment."""

import importlib.util
import os

# Without vLLM, as in `make test`, no test is collected here.
collect_ignore_glob = ["*"]
if importlib.util.find_spec("vllm"):
    collect_ignore_glob = []
    # vLLM reads these when imported: engines in this process, on all cores, with a small cache.
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",  # GB
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
    )
