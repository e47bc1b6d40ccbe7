"""Measure a checkpoint of the demo: exact match on scenes and fonts that it was not trained on."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

import xgenmm
from scripts.demo_model.checkpoint import TILE
from scripts.demo_model.evaluation_set import Case, evaluation_groups
from scripts.demo_model.wordings import QUESTION_KINDS
from xgenmm import SamplingParams
from xgenmm.engine.reference import generate
from xgenmm.preprocessing.tiling import tile_image

logger = logging.getLogger(__name__)

GOALS: Mapping[str, float] = {
    "color": 0.97,
    "shape": 0.97,
    "existence": 0.97,
    "count": 0.95,
    "place": 0.92,
    "pair": 0.90,
    "sign": 0.80,
}


def evaluate(folder: Path, scenes: int) -> None:
    """Print a table of exact match by kind."""
    right = measure(folder, scenes)
    print("| question | asked | right | goal |\n|---|---|---|---|")
    for kind in QUESTION_KINDS:
        share = sum(right[kind]) / len(right[kind])
        goal = f"{GOALS[kind]:.0%}" if kind in GOALS else ""
        print(f"| {kind} | {len(right[kind])} | {share:.1%} | {goal} |")


def measure(folder: Path, scenes: int) -> dict[str, list[bool]]:
    """Ask the evaluation set of this many scenes; which answers are right, by kind."""
    return exact_matches(xgenmm.load(folder), evaluation_groups(scenes))


def exact_matches(engine: xgenmm.Engine, groups: Sequence[Sequence[Case]]) -> dict[str, list[bool]]:
    """Whether each greedy answer is the expected one, ignoring case, by kind of question.

    groups: cases of the same scene or pair.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for number, group in enumerate(groups, 1):
        for case, answer in zip(group, _answers(engine, group), strict=True):
            right[case.kind].append(answer.lower() == case.answer.lower())
        if number % 100 == 0:
            logger.info("%d of %d images and pairs", number, len(groups))
    return dict(right)


def _answers(engine: xgenmm.Engine, cases: Sequence[Case]) -> Iterator[str]:
    """The greedy answers to questions about the same images, which are encoded once."""
    images = cases[0].images
    tiles = [tile_image(image, engine.config.tiling, TILE) for image in images]
    vision = engine.model.encode(tiles)
    for case in cases:
        prompt = engine.prompt(xgenmm.Request(case.question, images))
        embeds = engine.model.merge_multimodal_embeddings(prompt, vision)
        ids = generate(engine.model, embeds, SamplingParams(), 64, engine.end_ids)
        yield engine.tokenizer.decode(list(takewhile(lambda t: t not in engine.end_ids, ids)))
