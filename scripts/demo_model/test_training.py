"""The training of the demo checkpoint: its labels and packed rows, and a run that resumes."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import xgenmm
from scripts.demo_model import training, world
from xgenmm.engine.reference import generate
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.models.xgenmm import XGenMM

FONTS = world.held_out_fonts()
TINY = tuple(replace(stage, steps=2, images=4) for stage in training.STAGES)


def scene_with_sign(seed: int) -> world.Scene:
    return world.sample_scene(random.Random(seed), FONTS, level=1.0, with_sign=True)


def test_labels_say_what_the_tiles_show() -> None:
    scene = scene_with_sign(2)
    image = training.show(scene, random.Random(0))
    assert image.cover.shape == image.center.shape
    assert image.cover.shape[0] == image.tiles.pixels.shape[0]
    assert scene.sign is not None
    # Every thing has its centre in the whole image's tile, but for those that share a cell.
    things = len(scene.shapes) + len(scene.sign.word)
    assert things - 2 <= int((image.center[0] > 0).sum()) <= things
    assert set(image.cover[0].unique().tolist()) <= set(range(world.NUM_CLASSES))


def test_a_band_names_what_any_column_shows() -> None:
    side = training.SIDE
    cells = torch.zeros(3, side, side, dtype=torch.long)  # the whole, then two columns
    cells[0, 0, 0], cells[1, 0, 5], cells[2, 0, 5] = 7, 8, 9
    sets = training.banded(cells, columns=2, rows=1)
    assert sets[0, 0].tolist() == [7, 0, 0]
    # Row 0 of the canvas: columns 0 to 11 of the first tile, then those of the second.
    assert sets[1, 5].tolist() == [8, 9, 0]
    assert sets[1, side + 5].tolist() == [8, 9, 0]
    assert int((sets[1:] > 0).sum()) == 4


def test_packed_questions_are_answered_as_each_alone(tmp_path: Path) -> None:
    training.write_folder(tmp_path)
    tokens = training.demo_tokens(tmp_path)
    torch.manual_seed(1)
    model = XGenMM(training.CONFIG).eval().requires_grad_(False)
    training.initialize(model)
    engine = xgenmm.Engine(model, tokens)
    rng = random.Random(5)
    scenes = (scene_with_sign(3), scene_with_sign(4))
    images = [training.show(scene, random.Random(0)) for scene in scenes]
    vision = model.encode([image.tiles for image in images])

    # The first token of the model's own greedy answer is by definition right.
    asked = []
    for scene, tokens_of_image in zip(scenes, vision, strict=True):
        own = []
        for qa in world.sample_questions(scene, rng, 4):
            prompt = engine.prompt(xgenmm.Request(qa.question, [world.draw(scene)]))
            embeds = model.merge_multimodal_embeddings(prompt, [tokens_of_image])
            ids = list(generate(model, embeds, SamplingParams(), 1, ()))
            own.append((qa, ids[0]))
        asked.append(own)
    examples = [([p], [qa for qa, _ in own]) for p, own in zip(images, asked, strict=True)]
    rows = training.pack(tokens, examples)
    first = {
        (row, branch): int(((rows.branch[row] == branch) & (rows.labels[row] >= 0)).nonzero()[0])
        for row, own in enumerate(asked)
        for branch in range(1, len(own) + 1)
    }
    labels = torch.full_like(rows.labels, -100)
    for (row, branch), place in first.items():
        labels[row, place] = asked[row][branch - 1][1]
    _, right = training.answer_loss(model, vision, replace(rows, labels=labels))
    assert all(all(values) for values in right.values())


def test_pairs_of_few_images_train_the_decoder_alone(tmp_path: Path) -> None:
    training.write_folder(tmp_path)
    stage = replace(training.STAGES[-1], images=8)
    assert stage.families
    batches = training.Batches(stage, FONTS, training.demo_tokens(tmp_path), seed=1)
    images, rows = batches[0]
    assert rows is not None
    assert len(images) == 8
    assert set(rows.shown) <= set(range(8))
    assert len(rows.shown) == 2 * (6 * 2 + 2)  # of each family six pairs and two alone
    torch.manual_seed(1)
    model, heads = XGenMM(training.CONFIG), training.Heads()
    parts, _ = training.losses(model, heads, stage.name, images, rows)
    assert parts.keys() == training.LOSS_WEIGHTS[stage.name].keys()
    parts["answer"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lang_model" in name)


def test_training_resumes_and_writes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = tmp_path / "demo", tmp_path / "state"
    save, saves = training.save, 0

    def stop_after_three(*given: Any) -> None:
        nonlocal saves
        save(*given)
        saves += 1
        if saves == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        training.train(folder, state, TINY)
    assert not (folder / "model.safetensors").exists()
    training.train(folder, state, TINY)

    history = json.loads((state / "history.json").read_text())
    assert [entry["stage"] for entry in history] == [stage.name for stage in TINY]
    engine = xgenmm.load(folder)
    assert engine.config == replace(training.CONFIG, demo=True)
    assert sum(p.numel() for p in engine.model.parameters()) == 6_149_507
    image = world.draw(scene_with_sign(6))
    limits = SamplingParams(max_new_tokens=3)
    answer = engine.stream(xgenmm.Request("What does the sign say?", [image], sampling=limits))
    list(answer)
    assert answer.usage.output_tokens > 0
