"""Golden cases through the engine, all at once, together with requests with other settings.

`xgenmm.evaluation.parity` checks one case at a time without the engine; this checks that batching
does not change the results.
"""

import random
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xgenmm.config import BLOCK_SIZE
from xgenmm.engine.core import EngineCore
from xgenmm.engine.engine_thread import EngineThread
from xgenmm.engine.prompt_hashes import PromptHashes
from xgenmm.engine.reference import generate
from xgenmm.engine.request import ChoiceScore, EngineRequest, StopReason
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.engine.scheduler import SchedulerConfig
from xgenmm.evaluation.golden import (
    golden_generations,
    golden_images,
    golden_model,
    golden_prompt,
)
from xgenmm.files import read_json_object
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage, tile_image

MAX_NUM_SEQS = 16
NUM_BLOCKS = 1024
IMAGE_BYTES = 8 << 20


@dataclass
class CollectingSink:
    """An `OutputSink` that collects token ids and never ends an answer."""

    cancelled: bool = False
    ids: list[int] = field(default_factory=list)
    error: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def token(self, token_id: int) -> StopReason | None:
        """Collect a token id."""
        self.ids.append(token_id)
        return None

    def chosen(self, index: int, scores: Sequence[ChoiceScore]) -> None:
        """Collect the index of the choice as if it were a token id."""
        self.ids.append(index)

    def end(self, reason: StopReason, error: Exception | None) -> None:
        """Let `result` return."""
        self.error = error
        self.ended.set()

    def result(self) -> list[int]:
        """Wait for all ids. Raises the error of a failed request."""
        self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.ids


@dataclass(frozen=True)
class Comparison:
    """The expected token ids of one request, and those generated in a batch with the others.

    golden: whether the expected ids come from the golden data.
    """

    name: str
    golden: bool
    expected: list[int]
    found: list[int]


def check_engine(
    folder: Path, seed: int, *, few_blocks: bool = False
) -> tuple[list[Comparison], int]:
    """Run all requests of a golden folder at once, shuffled by `seed`.

    Each case gets three more requests with other settings. Their expected ids are those of
    `reference.generate`.

    few_blocks: whether the KV cache holds little more than the largest request, so that requests
        are preempted; returns how often.
    """
    description = read_json_object(folder / "cases.json")
    model, rng = golden_model(folder, description), random.Random(seed)
    end_ids = frozenset({description["text"]["eos_token_id"]})
    planned: list[tuple[str, bool, list[int], CollectingSink]] = []
    requests: list[EngineRequest] = []
    for case in description["cases"]:
        prompt = golden_prompt(description, case["input_ids"])
        images = golden_images(folder, case)
        tile = model.config.vision.image_size
        tiles = [tile_image(image, model.config.tiling, tile) for image in images]
        for stage, settings in _golden_settings(case, rng):
            ids = case.get(stage) or _generate_alone(model, prompt, tiles, settings, end_ids)
            sink = CollectingSink()
            name = f"{folder.name}/{case['name']}: {settings}"
            planned.append((name, stage in case, ids, sink))
            requests.append(_engine_request(model, prompt, tiles, settings, sink))
    rng.shuffle(requests)
    num_blocks = max(map(_largest_need, requests)) + 1 if few_blocks else NUM_BLOCKS
    core = EngineCore.build(
        model,
        end_ids,
        SchedulerConfig(),
        max_num_seqs=MAX_NUM_SEQS,
        num_blocks=num_blocks,
        image_bytes=IMAGE_BYTES,
    )
    thread = EngineThread(core)
    for request in requests:
        thread.submit(request)
    compared = [Comparison(name, golden, ids, sink.result()) for name, golden, ids, sink in planned]
    thread.close()
    thread.join()
    return compared, core.scheduler.num_preemptions


def _golden_settings(
    case: Mapping[str, Any], rng: random.Random
) -> Iterator[tuple[str, SamplingParams]]:
    """(stage, settings) of the case's golden ids, and of three requests with other settings."""
    yield from golden_generations(case)
    yield "", SamplingParams(rng.randint(1, 40), temperature=rng.uniform(0.3, 2), seed=1)
    yield "", SamplingParams(rng.randint(1, 40), repetition_penalty=rng.uniform(1.1, 3))
    yield "", SamplingParams(rng.randint(1, 12), num_beams=2, repetition_penalty=1.5)


def _largest_need(request: EngineRequest) -> int:
    """The most blocks that a request may take: its beams share no more than the prompt."""
    shared = request.num_prompt_tokens // BLOCK_SIZE
    total = -(-(request.num_prompt_tokens + request.max_tokens) // BLOCK_SIZE)
    return shared + request.num_seqs * (total - shared)


def _engine_request(
    model: XGenMM,
    prompt: Prompt,
    tiles: Sequence[TiledImage],
    settings: SamplingParams,
    sink: CollectingSink,
) -> EngineRequest:
    return EngineRequest(
        prompt=prompt,
        images=tiles,
        hashes=PromptHashes.from_prompt(
            prompt, tiles, model.config.resampler, model.config.clip_tokens
        ),
        params=settings,
        max_tokens=settings.max_new_tokens,
        sink=sink,
    )


@torch.inference_mode()
def _generate_alone(
    model: XGenMM,
    prompt: Prompt,
    tiles: Sequence[TiledImage],
    settings: SamplingParams,
    end_ids: Collection[int],
) -> list[int]:
    embeds = model.merge_multimodal_embeddings(prompt, model.encode(tiles, prompt))
    return list(generate(model, embeds, settings, settings.max_new_tokens, end_ids))
