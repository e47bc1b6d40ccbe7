"""Measure what a fine-tuned demo has learned and what it has forgotten."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import xgenmm
from scripts.demo_finetune.italian import italian_questions
from scripts.demo_model.checkpoint import DEMO
from scripts.demo_model.evaluate import exact_matches
from scripts.demo_model.evaluation_set import Case, evaluation_groups
from scripts.demo_model.fonts import held_out_fonts
from scripts.demo_model.sampling import sample_scene
from scripts.demo_model.wordings import QUESTION_KINDS

EVALUATION_SEED = "held-out italian"  # not the seed of the data set


def italian_groups(n: int) -> list[list[Case]]:
    """Questions to be answered in Italian, by scene.

    The `n` scenes are sampled as in the demo's own evaluation.
    """
    rng, fonts, groups = random.Random(EVALUATION_SEED), held_out_fonts(), []
    for i in range(n):
        scene = sample_scene(rng, fonts, level=1.0, with_sign=i % 5 < 3)
        asked = italian_questions(scene, rng, 4)
        groups.append([Case((scene,), qa.kind, qa.question, qa.answer) for qa in asked])
    return [group for group in groups if group]


def evaluate(adapter: Path, scenes: int) -> None:
    """Print tables of exact match by kind, without and with an adapter.

    scenes: how many are asked about in each language.
    """
    sets = {
        "new: answers in Italian": italian_groups(scenes),
        "old: the demo's own evaluation": evaluation_groups(scenes),
    }
    engines = [xgenmm.load(DEMO), xgenmm.load(DEMO, adapter=adapter)]
    for title, groups in sets.items():
        before, after = (exact_matches(engine, groups) for engine in engines)
        print(f"\n| {title} | asked | before | after |\n|---|---|---|---|")
        for kind in QUESTION_KINDS:
            if kind in before:
                _print_row(kind, before[kind], after[kind])
        _print_row("**all**", _all(before), _all(after))


def _all(right: Mapping[str, Sequence[bool]]) -> list[bool]:
    return [one for results in right.values() for one in results]


def _print_row(name: str, before: Sequence[bool], after: Sequence[bool]) -> None:
    shares = " | ".join(f"{sum(right) / len(right):.1%}" for right in (before, after))
    print(f"| {name} | {len(before)} | {shares} |", flush=True)
