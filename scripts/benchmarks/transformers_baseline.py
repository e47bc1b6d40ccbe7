"""Time `generate` of `transformers`, the baseline of the parts `cpu`, `gpu` and `peers`."""

import time
from typing import Any, cast

import torch
from transformers import Phi3ForCausalLM
from transformers.generation.streamers import BaseStreamer


class TokenTimes(BaseStreamer):
    """A streamer that records when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Record the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def time_generate(
    model: Phi3ForCausalLM, embeds: torch.Tensor, tokens: int, **options: Any
) -> tuple[float, float]:
    """Seconds to the first token, and from each token to the next.

    embeds: [1, positions, width]. options: further arguments of `generate`.
    """
    started = time.perf_counter()
    _, times = generate_ids(model, embeds, tokens, **options)
    return times[0] - started, (times[-1] - times[0]) / (tokens - 1)


def generate_ids(
    model: Phi3ForCausalLM, embeds: torch.Tensor, tokens: int, **options: Any
) -> tuple[list[int], list[float]]:
    """Greedy ids, and when each arrived, in `time.perf_counter` seconds.

    embeds: [1, positions, width]. options: further arguments of `generate`.
    """
    streamer = TokenTimes()
    with torch.inference_mode():
        output = cast(Any, model).generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=streamer,
            **options,
        )
    ids = output[0].tolist()
    return ids, streamer.times[-len(ids) :]  # the streamer gets the empty prompt first
