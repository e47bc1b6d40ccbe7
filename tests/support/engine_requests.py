"""Engine requests without a model, for tests of single parts of the engine."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from xgenmm.config import ResamplerConfig
from xgenmm.engine.prompt_hashes import PromptHashes
from xgenmm.engine.request import ChoiceScore, EngineRequest, StopReason
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage

LATENTS = 4


class RecordingSink:
    """An `OutputSink` that records what it receives.

    end_id: the token that ends the answer, if any.
    """

    def __init__(self, end_id: int | None = None) -> None:
        self.cancelled = False
        self.end_id = end_id
        self.token_ids: list[int] = []
        self.ends: list[tuple[StopReason, Exception | None]] = []

    def token(self, token_id: int) -> StopReason | None:
        """Record a token."""
        self.token_ids.append(token_id)
        return "end" if token_id == self.end_id else None

    def chosen(self, index: int, scores: Sequence[ChoiceScore]) -> None:
        """Record an index as if it were a token."""
        self.token_ids.append(index)

    def end(self, reason: StopReason, error: Exception | None) -> None:
        """Record the end."""
        self.ends.append((reason, error))


def image(tiles: int, content: int = 0) -> TiledImage:
    """An image of `tiles` tiles; images of equal content have equal hashes."""
    return TiledImage(np.full((tiles, 2, 2, 3), content, dtype=np.uint8), tiles, 1, (2, 2))


def engine_request(
    text: int | Sequence[int] = 10,
    *images: TiledImage,
    sink: RecordingSink | None = None,
    max_tokens: int = 8,
    choices: Sequence[Sequence[int]] = (),
    **settings: Any,
) -> EngineRequest:
    """A request whose images come before its text, with `LATENTS` vision tokens per tile.

    text: token ids, or how many; texts given by their length begin alike.
    """
    ids = tuple(range(100, 100 + text)) if isinstance(text, int) else tuple(text)
    prompt = Prompt((0,) * len(images) + ids, tuple((index, 1) for index in range(len(images))))
    params = SamplingParams(max_new_tokens=max_tokens, **settings)
    hashes = PromptHashes.from_prompt(prompt, images, ResamplerConfig(num_latents=LATENTS))
    sink = sink or RecordingSink()
    return EngineRequest(prompt, images, hashes, params, max_tokens, sink, choices=choices)
