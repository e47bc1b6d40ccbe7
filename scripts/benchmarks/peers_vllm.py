"""vLLM's side of the part `peers`, run with the interpreter of vLLM's environment.

    python -m scripts.benchmarks.peers_vllm CHECKPOINT MAX_TOKENS MAX_NUM_SEQS CACHE_GB STOP_ID...

Each line of standard input is a JSON list of (image file, question), which are asked at once. The
answer is one line of JSON: `seconds` until all are answered, and for each question in order its
`first_tokens`, seconds to the first token, and its `ids`. The first line of output, `{}`, says that
the model is loaded.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # all cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    """Answer batches of questions until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints must not get between the answers
    folder, max_tokens, max_num_seqs, cache_gb, *stop_ids = sys.argv[1:]
    # vLLM reads these when it is imported.
    os.environ.update(ENVIRONMENT, VLLM_CPU_KVCACHE_SPACE=cache_gb)
    from vllm import LLM, SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=int(max_tokens), stop_token_ids=[int(i) for i in stop_ids]
    )
    llm = LLM(folder, dtype="float32", max_num_seqs=int(max_num_seqs), disable_log_stats=False)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_ask(llm, params, json.loads(line))), file=answers, flush=True)
    llm.llm_engine.engine_core.shutdown()


def _ask(llm: Any, params: Any, questions: list[tuple[str, str]]) -> dict[str, Any]:
    conversations = []
    for file, question in questions:
        image = {"type": "image_pil", "image_pil": _open(Path(file))}
        content = [image, {"type": "text", "text": question}]
        conversations.append([{"role": "user", "content": content}])
    started = time.time()  # the clock of `arrival_time`
    outputs = llm.chat(conversations, params, use_tqdm=False)
    seconds = time.time() - started
    metrics = [output.metrics for output in outputs]
    return {
        "seconds": seconds,
        "first_tokens": [m.arrival_time + m.first_token_latency - started for m in metrics],
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
    }


def _open(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


if __name__ == "__main__":
    main()
