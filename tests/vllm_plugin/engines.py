"""vLLM's engine in this process, shut down after use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

FLOAT32 = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8}


@contextmanager
def vllm_engine(folder: Path, **options: Any) -> Iterator[LLM]:
    """An engine for a checkpoint folder, in float32 and without prefix caching."""
    llm = LLM(str(folder), enable_prefix_caching=False, **{**FLOAT32, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
