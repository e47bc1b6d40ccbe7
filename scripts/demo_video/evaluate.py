"""Measure a checkpoint of the video demo: exact match on clips that it was not trained on."""

import io
import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from PIL import Image

import xgenmm
from scripts.demo_model.checkpoint import TILE
from scripts.demo_model.wordings import QA
from scripts.demo_video.clip import Clip
from scripts.demo_video.evaluation_set import EVALUATION_SEED, evaluation_set
from scripts.demo_video.questions import QUESTION_KINDS
from scripts.demo_video.video_files import write_video
from xgenmm import SamplingParams
from xgenmm.engine.reference import generate
from xgenmm.preprocessing.prompts import request_prompt
from xgenmm.preprocessing.tiling import tile_image

logger = logging.getLogger(__name__)

GOALS: Mapping[str, float] = {
    "direction": 0.9,
    "appearance": 0.9,
    "color": 0.9,
    "order": 0.8,
    "count": 0.9,
}
MOST_REVERSED = 0.6  # of right answers with the frames reversed, where order matters


def evaluate(folder: Path, clips: int) -> None:
    """Print a table of exact match by kind; for right answers with the frames reversed as well."""
    engine = xgenmm.load(folder)
    right: dict[str, list[bool]] = defaultdict(list)
    backwards: dict[str, list[bool]] = defaultdict(list)
    rng = random.Random(EVALUATION_SEED)
    for number, (clip, asked) in enumerate(evaluation_set(EVALUATION_SEED, clips), 1):
        frames = encoded_frames(clip, rng.randint(24, 60))
        for results, shown in ((right, frames), (backwards, frames[::-1])):
            for qa, answer in zip(asked, answers(engine, shown, asked), strict=True):
                results[qa.kind].append(answer.lower() == qa.answer.lower())
        if number % 100 == 0:
            logger.info("%d of %d clips", number, clips)
    print("| question | asked | right | goal | right with reversed frames | goal |")
    print("|---|---|---|---|---|---|")
    for kind in QUESTION_KINDS:
        asked_count = len(right[kind])
        share, reversed_share = (sum(r[kind]) / asked_count for r in (right, backwards))
        most = "" if kind == "count" else f"at most {MOST_REVERSED:.0%}"
        print(
            f"| {kind} | {asked_count} | {share:.1%} | {GOALS[kind]:.0%} "
            f"| {reversed_share:.1%} | {most} |"
        )


def encoded_frames(clip: Clip, count: int) -> Sequence[Image.Image]:
    """The frames that the model sees of the clip as an H.264 file of `count` frames."""
    file = io.BytesIO()
    write_video(clip, file, count)
    return xgenmm.read_video(file.getvalue()).frames


def answers(
    engine: xgenmm.Engine, frames: Sequence[Image.Image], asked: Sequence[QA]
) -> Iterator[str]:
    """The greedy answers to questions about the same clip, which is encoded once."""
    vision = engine.model.encode([tile_image(f, engine.config.tiling, TILE) for f in frames])
    for qa in asked:
        prompt = request_prompt(engine.tokenizer, engine.config, qa.question, images=1)
        embeds = engine.model.merge_multimodal_embeddings(prompt, vision)
        ids = generate(engine.model, embeds, SamplingParams(), 32, engine.end_ids)
        yield engine.tokenizer.decode(list(takewhile(lambda t: t not in engine.end_ids, ids)))
