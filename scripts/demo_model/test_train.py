"""The training of the demo checkpoint: labels, packed rows, and a run that is resumed."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import xgenmm
from scripts.demo_model import train as training
from scripts.demo_model.batches import Batches
from scripts.demo_model.checkpoint import CONFIG, SIDE, demo_tokenizer, write_folder
from scripts.demo_model.drawing import draw
from scripts.demo_model.fonts import held_out_fonts
from scripts.demo_model.label_map import NUM_CLASSES
from scripts.demo_model.labelled_images import band_labels, render
from scripts.demo_model.losses import Heads, answer_loss, compute_losses
from scripts.demo_model.packing import IGNORED, pack
from scripts.demo_model.questions import sample_questions
from scripts.demo_model.sampling import sample_scene
from scripts.demo_model.scene import Scene
from scripts.demo_model.stages import LOSS_WEIGHTS, STAGES
from xgenmm import SamplingParams
from xgenmm.engine.reference import generate
from xgenmm.models.xgenmm import XGenMM

FONTS = held_out_fonts()
TINY = tuple(replace(stage, steps=2, images=4) for stage in STAGES)


def scene_with_sign(seed: int) -> Scene:
    return sample_scene(random.Random(seed), FONTS, level=1.0, with_sign=True)


def test_labels_describe_the_tiles() -> None:
    scene = scene_with_sign(2)
    image = render(scene, random.Random(0))
    assert image.cover.shape == image.center.shape
    assert image.cover.shape[0] == image.tiles.pixels.shape[0]
    assert scene.sign is not None
    # The first tile shows the whole image, so every centre is in it; two may share a cell.
    things = len(scene.shapes) + len(scene.sign.word)
    assert things - 2 <= int((image.center[0] > 0).sum()) <= things
    assert set(image.cover[0].unique().tolist()) <= set(range(NUM_CLASSES))


def test_band_labels_combine_the_columns_of_tiles() -> None:
    cells = torch.zeros(3, SIDE, SIDE, dtype=torch.long)  # the whole image, then two columns
    cells[0, 0, 0], cells[1, 0, 5], cells[2, 0, 5] = 7, 8, 9
    sets = band_labels(cells, columns=2, rows=1)
    assert sets[0, 0].tolist() == [7, 0, 0]
    # Row 0 of the canvas: columns 0 to 11 of the first tile, then those of the second.
    assert sets[1, 5].tolist() == [8, 9, 0]
    assert sets[1, SIDE + 5].tolist() == [8, 9, 0]
    assert int((sets[1:] > 0).sum()) == 4


def test_packed_questions_get_the_first_token_of_each_alone(tmp_path: Path) -> None:
    write_folder(tmp_path)
    tokenizer = demo_tokenizer(tmp_path)
    torch.manual_seed(1)
    model = XGenMM(CONFIG).eval().requires_grad_(False)
    training.initialize(model)
    engine = xgenmm.Engine(model, tokenizer)
    rng = random.Random(5)
    scenes = (scene_with_sign(3), scene_with_sign(4))
    images = [render(scene, random.Random(0)) for scene in scenes]
    vision = model.encode([image.tiles for image in images])

    # Label each question with the first token that the model generates for it alone.
    asked = []
    for scene, image_tokens in zip(scenes, vision, strict=True):
        pairs = []
        for qa in sample_questions(scene, rng, 4):
            prompt = engine.prompt(xgenmm.Request(qa.question, [draw(scene)]))
            embeds = model.merge_multimodal_embeddings(prompt, [image_tokens])
            ids = list(generate(model, embeds, SamplingParams(), 1, ()))
            pairs.append((qa, ids[0]))
        asked.append(pairs)
    examples = [([p], [qa for qa, _ in pairs]) for p, pairs in zip(images, asked, strict=True)]
    rows = pack(tokenizer, examples)
    first = {
        (row, branch): int(((rows.branch[row] == branch) & (rows.labels[row] >= 0)).nonzero()[0])
        for row, pairs in enumerate(asked)
        for branch in range(1, len(pairs) + 1)
    }
    labels = torch.full_like(rows.labels, IGNORED)
    for (row, branch), place in first.items():
        labels[row, place] = asked[row][branch - 1][1]
    _, right = answer_loss(model, vision, replace(rows, labels=labels))
    assert all(all(values) for values in right.values())


def test_stages_with_families_train_only_the_decoder(tmp_path: Path) -> None:
    write_folder(tmp_path)
    stage = replace(STAGES[-1], images=8)
    assert stage.families
    batches = Batches(stage, FONTS, demo_tokenizer(tmp_path), seed=1)
    images, rows = batches[0]
    assert rows is not None
    assert len(images) == 8
    assert set(rows.shown) <= set(range(8))
    assert len(rows.shown) == 2 * (6 * 2 + 2)  # six pairs and two single images of each family
    torch.manual_seed(1)
    model, heads = XGenMM(CONFIG), Heads()
    weights = LOSS_WEIGHTS[stage.name]
    losses, _ = compute_losses(model, heads, weights, images, rows)
    assert losses.keys() == weights.keys()
    losses["answer"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lang_model" in name)


def test_training_resumes_and_writes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = tmp_path / "demo", tmp_path / "state"
    save, saves = training.save, 0

    def stop_after_three(
        run: training.Run[Heads], optimizers: Sequence[torch.optim.Optimizer], folder: Path
    ) -> None:
        nonlocal saves
        save(run, optimizers, folder)
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
    assert engine.config == replace(CONFIG, demo=True)
    assert sum(p.numel() for p in engine.model.parameters()) == 6_149_507
    image = draw(scene_with_sign(6))
    limits = SamplingParams(max_new_tokens=3)
    answer = engine.stream(xgenmm.Request("What does the sign say?", [image], sampling=limits))
    list(answer)
    assert answer.usage.output_tokens > 0
