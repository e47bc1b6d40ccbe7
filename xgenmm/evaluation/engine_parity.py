"""Golden cases through the engine, all at once, beside neighbours with other settings.

`xgenmm.evaluation.parity` checks one case at a time without the engine; this checks that batching
changes nothing.
"""

import json
import random
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xgenmm.engine.pool import SchedulerPool
from xgenmm.engine.prefix_cache import PromptHashes
from xgenmm.engine.reference import generate
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.engine.scheduler import EngineRequest, StopReason
from xgenmm.evaluation.parity import golden_model, golden_prompt
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage, tile_image

MAX_NUM_SEQS = 16


@dataclass
class Collected:
    """A `OutputSink` that keeps the ids and never ends an answer by itself."""

    cancelled: bool = False
    ids: list[int] = field(default_factory=list)
    error: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def token(self, token: int) -> StopReason | None:
        """Keep it."""
        self.ids.append(token)
        return None

    def chosen(self, number: int, probabilities: Sequence[float]) -> None:
        """Keep the number as if it were a token."""
        self.ids.append(number)

    def end(self, reason: StopReason, error: Exception | None) -> None:
        """Let `result` return."""
        self.error = error
        self.ended.set()

    def result(self) -> list[int]:
        """The ids, once all are there. Raises what failed the job."""
        self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.ids


@dataclass(frozen=True)
class Compared:
    """One job of the golden part: the ids it should have, and those it got beside the others."""

    name: str
    golden: bool
    expected: list[int]
    found: list[int]


def check_engine(folder: Path, seed: int) -> list[Compared]:
    """All jobs of a golden folder at once, in an order that `seed` decides.

    Beside those with known ids each case has neighbours of other settings, whose expected ids are
    what `generate` gives each alone.
    """
    description = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    model, rng = golden_model(folder, description), random.Random(seed)
    end_ids = frozenset({description["text"]["eos_token_id"]})
    planned: list[tuple[str, bool, list[int], EngineRequest, Collected]] = []
    for case in description["cases"]:
        prompt = golden_prompt(description, case["input_ids"])
        images = [read_image(folder / file) for file in case["images"]]
        tile = model.config.vision.image_size
        tiles = [tile_image(shown, model.config.tiling, tile) for shown in images]
        for stage, settings in _golden_settings(case, rng):
            ids = case.get(stage) or _generate_alone(model, prompt, tiles, settings, end_ids)
            collected = Collected()
            planned.append(
                (
                    f"{folder.name}/{case['name']}: {settings}",
                    stage in case,
                    ids,
                    _engine_request(model, prompt, tiles, settings, collected),
                    collected,
                )
            )
    rng.shuffle(planned)
    pool = SchedulerPool(model, end_ids, slots=MAX_NUM_SEQS, cache_bytes=64 << 20)
    for *_, job, _ in planned:
        pool.submit(job)
    compared = [
        Compared(name, known, ids, collected.result()) for name, known, ids, _, collected in planned
    ]
    pool.close()
    pool.join()
    return compared


def _golden_settings(
    case: Mapping[str, Any], rng: random.Random
) -> Iterator[tuple[str, SamplingParams]]:
    """(stage, settings) of the case's known ids, and of three neighbours with other settings."""
    for stage, beams, penalty in (
        ("greedy_ids", 1, 1.0),
        ("greedy_repetition_penalty_2_ids", 1, 2.0),
        ("beam3_ids", 3, 1.0),
    ):
        if stage in case:
            yield (
                stage,
                SamplingParams(len(case[stage]), num_beams=beams, repetition_penalty=penalty),
            )
    yield "", SamplingParams(rng.randint(1, 40), temperature=rng.uniform(0.3, 2), seed=1)
    yield "", SamplingParams(rng.randint(1, 40), repetition_penalty=rng.uniform(1.1, 3))
    yield "", SamplingParams(rng.randint(1, 12), num_beams=2, repetition_penalty=1.5)


def _engine_request(
    model: XGenMM,
    prompt: Prompt,
    tiles: Sequence[TiledImage],
    settings: SamplingParams,
    receiver: Collected,
) -> EngineRequest:
    resampler = model.config.resampler
    instructed = resampler.text_tokens > 0
    return EngineRequest(
        prompt=prompt,
        images=tiles,
        keys=PromptHashes.of(prompt, tiles, resampler.num_latents, instructed=instructed),
        params=settings,
        limit=settings.max_new_tokens,
        receiver=receiver,
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
