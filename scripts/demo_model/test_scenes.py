"""Scenes and pairs of the demo's world: their limits, images, labels and fonts."""

import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.demo_model.drawing import draw
from scripts.demo_model.evaluation_set import evaluation_set
from scripts.demo_model.fonts import find_fonts, held_out_fonts, split_fonts
from scripts.demo_model.label_map import FIRST_LETTER_CLASS, NUM_CLASSES, SIGN_CLASS, label_map
from scripts.demo_model.pairs import ask_difference, ask_pair, ask_same, sample_family, sample_pair
from scripts.demo_model.questions import sample_questions
from scripts.demo_model.sampling import sample_background, sample_scene
from scripts.demo_model.scene import COLORS, KINDS, Box, Scene, Shape
from scripts.demo_model.shapes import sample_shade
from scripts.demo_model.wordings import QA


def center(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def disjoint(a: Box, b: Box) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def assert_within_bounds(scene: Scene) -> None:
    assert min(scene.width, scene.height) >= 64
    assert max(scene.width, scene.height) <= min(640, 3 * scene.short)
    assert 1 <= len(scene.shapes) <= 4
    boxes = [shape.box for shape in scene.shapes]
    for x0, y0, x1, y1 in boxes:
        assert min(x1 - x0, y1 - y0) >= scene.short / 8
        assert max(x1 - x0, y1 - y0) <= scene.short * 0.46
    if scene.sign is not None:
        boxes.append(scene.sign.box)
        assert re.fullmatch("[A-Z]{3,5}", scene.sign.word)
        assert len(scene.sign.letters) == len(scene.sign.word)
        x0, y0, x1, y1 = scene.sign.box
        for letter in scene.sign.letters:
            assert x0 < letter[0] < letter[2] < x1
            assert y0 < letter[1] < letter[3] < y1
        lefts = [letter[0] for letter in scene.sign.letters]
        assert lefts == sorted(lefts)
    for i, box in enumerate(boxes):
        assert min(box) >= 0
        assert box[2] <= scene.width
        assert box[3] <= scene.height
        assert all(disjoint(box, other) for other in boxes[:i])


def test_scenes_stay_within_the_bounds(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert_within_bounds(scene)


def test_pairs_stay_within_the_bounds(fonts: list[Path]) -> None:
    rng = random.Random(12)
    for _ in range(300):
        first, second, asked = sample_pair(rng, fonts, 1.0)
        assert_within_bounds(first)
        assert_within_bounds(second)
        assert 1 <= len(asked) <= 3


def test_sample_pair_follows_the_options_related_and_wordings(
    fonts: list[Path],
) -> None:
    def asked(**options: Any) -> list[list[QA]]:
        rng = random.Random(21)
        return [sample_pair(rng, fonts, 1.0, 8, **options)[2] for _ in range(200)]

    def same(pairs: list[list[QA]]) -> list[list[QA]]:
        found = [[qa for qa in pair if qa.answer in ("yes", "no")] for pair in pairs]
        return [pair for pair in found if pair]

    usual, often = same(asked()), same(asked(related=0.75, wordings=4))
    assert len(often) > 1.2 * len(usual)
    assert {len(pair) for pair in usual} == {1}
    assert max(len(pair) for pair in often) == 4
    assert all(len({qa.answer for qa in pair}) == 1 for pair in often)


def test_family_is_two_scenes_that_differ_in_one_thing(fonts: list[Path]) -> None:
    rng = random.Random(22)
    for _ in range(100):
        (scene, resized), (edited, edited_resized) = sample_family(rng, fonts, 1.0)
        for one in (scene, resized, edited, edited_resized):
            assert_within_bounds(one)
        assert [qa.answer for qa in ask_difference(scene, resized)] == ["nothing"] * 2
        assert [qa.answer for qa in ask_difference(edited_resized, edited)] == ["nothing"] * 2
        first, second = (qa.answer for qa in ask_difference(scene, edited))
        names = [shape.name for shape in scene.shapes]
        assert first in names or (scene.sign is not None and first == scene.sign.word)
        assert first != second
        asked = ask_pair(rng, scene, edited, 5, 2)
        assert asked[0].answer == "no"
        assert "yes" not in {qa.answer for qa in asked}
        assert {qa.answer for qa in ask_same(rng, "yes", 3)} == {"yes"}


def test_level_sets_the_difficulty_of_scenes(fonts: list[Path]) -> None:
    rng = random.Random(13)
    easy = [sample_scene(rng, fonts, level=0) for _ in range(100)]
    full = [sample_scene(rng, fonts, level=1) for _ in range(300)]
    assert max(len(scene.shapes) for scene in easy) == 2
    assert max(max(s.width, s.height) / s.short for s in easy) <= 1.3
    assert Counter(len(scene.shapes) for scene in full).keys() == {1, 2, 3, 4}
    assert max(s.width / s.height for s in full) > 2.7
    assert min(s.width / s.height for s in full) < 0.37


def test_with_sign_decides_whether_there_is_a_sign(fonts: list[Path]) -> None:
    rng = random.Random(14)
    for wanted in (True, False):
        for _ in range(20):
            scene = sample_scene(rng, fonts, level=1, with_sign=wanted)
            assert (scene.sign is not None) == wanted


def test_equal_seeds_give_equal_scenes_questions_and_pixels(fonts: list[Path]) -> None:
    def build(seed: int) -> tuple[Scene, list[QA], bytes, tuple[Scene, Scene, list[QA]]]:
        rng = random.Random(seed)
        scene = sample_scene(rng, fonts, level=1, with_sign=True)
        asked = sample_questions(scene, rng, 6)
        return scene, asked, draw(scene).tobytes(), sample_pair(rng, fonts, 1)

    assert build(5) == build(5)
    assert build(5) != build(6)
    assert evaluation_set(3, fonts, 20) == evaluation_set(3, fonts, 20)


def test_image_shows_each_shape_in_its_shade_and_box(scenes: list[Scene]) -> None:
    for scene in scenes[:60]:
        image = draw(scene)
        assert image.mode == "RGB"
        assert image.size == (scene.width, scene.height)
        for shape in scene.shapes:
            x, y = center(shape.box)
            assert image.getpixel((int(x), int(y))) == shape.shade
        drawn = (np.asarray(image) != scene.background).any(axis=2)
        boxes = [shape.box for shape in scene.shapes] + ([scene.sign.box] if scene.sign else [])
        for x0, y0, x1, y1 in boxes:
            drawn[
                math.floor(y0) - 1 : math.ceil(y1) + 1, math.floor(x0) - 1 : math.ceil(x1) + 1
            ] = 0
        assert not drawn.any()


def test_sign_letters_are_drawn_in_their_boxes(fonts: list[Path]) -> None:
    rng = random.Random(15)
    for _ in range(40):
        scene = sample_scene(rng, fonts, level=1, with_sign=True)
        assert scene.sign is not None
        gray = np.asarray(draw(scene).convert("L")).astype(int)
        for x0, y0, x1, y1 in scene.sign.letters:
            # The ink is dark; thin letters of small images are grey.
            assert gray[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)].min() < 160
        height = max(b[3] for b in scene.sign.letters) - min(b[1] for b in scene.sign.letters)
        assert height >= 0.1 * scene.short


def test_shades_of_different_names_stay_apart() -> None:
    rng = random.Random(16)
    drawn = {c: np.array([sample_shade(rng, c) for _ in range(200)]) for c in COLORS}
    for a in COLORS:
        for b in COLORS:
            if a < b:
                apart = np.linalg.norm(drawn[a][:, None] - drawn[b][None], axis=2)
                assert apart.min() > 35, (a, b)
    backgrounds = np.array([sample_background(rng) for _ in range(200)])
    for color, shades in drawn.items():
        assert np.linalg.norm(shades[:, None] - backgrounds[None], axis=2).min() > 60, color


def square(box: Box) -> Shape:
    return Shape("square", "green", box, 0.0, (0, 160, 0))


def test_label_map_gives_the_class_of_each_cell() -> None:
    label = 1 + 7 + 1
    scene = Scene(80, 40, (255, 255, 255), (square((10, 10, 30, 30)),), None)
    expected = np.zeros((4, 8), dtype=np.int64)
    expected[1:3, 1:3] = label
    np.testing.assert_array_equal(label_map(scene, 4, 8), expected)
    # A region larger than the image: 20 pixels of background above and below.
    padded = label_map(scene, 8, 8, (0, -20, 80, 60))
    np.testing.assert_array_equal(padded, np.pad(expected, ((2, 2), (0, 0))))
    # A cell counts if a quarter of it is covered.
    thin = Scene(80, 40, (255, 255, 255), (square((10, 10, 35, 35)),), None)
    assert (label_map(thin, 4, 8)[1:4, 1:4] == label).sum() == 9


def test_label_map_agrees_with_the_image(scenes: list[Scene]) -> None:
    for scene in scenes[:40]:
        labels = label_map(scene, scene.height, scene.width, oversample=1)
        wanted = set(labels.ravel().tolist()) - {0}
        for shape in scene.shapes:
            label = 1 + KINDS.index(shape.kind) * 7 + COLORS.index(shape.color)
            assert label in wanted
        image = np.asarray(draw(scene))
        shape_pixels = (labels > 0) & (labels < FIRST_LETTER_CLASS)
        shades = np.array([shape.shade for shape in scene.shapes])
        painted = (image[:, :, None] == shades).all(axis=3).any(axis=2)
        # Ink may have the shade of a black shape.
        painted &= labels < FIRST_LETTER_CLASS
        union = (shape_pixels | painted).sum()
        # Edges are blends of two colours, so small shapes have few pixels of their exact shade.
        assert (shape_pixels & painted).sum() > (0.9 if scene.short > 200 else 0.5) * union


def test_label_map_spells_the_sign(fonts: list[Path]) -> None:
    rng = random.Random(17)
    scene = sample_scene(rng, fonts, level=0, with_sign=True)
    assert scene.sign is not None
    labels = label_map(scene, scene.height, scene.width)
    for letter, box in zip(scene.sign.word, scene.sign.letters, strict=True):
        x, y = center(box)
        assert labels[int(y), int(x)] == FIRST_LETTER_CLASS + ord(letter) - ord("A")
    x0, y0, _, _ = scene.sign.box
    assert labels[int(y0) + 2, int(x0) + 2] == SIGN_CLASS == NUM_CLASSES - 1


def test_fonts_are_split_by_family(fonts: list[Path]) -> None:
    held_out = held_out_fonts()
    assert split_fonts([*held_out, *fonts]) == (fonts, held_out)
    stems = {path.stem for path in fonts}
    assert {"DejaVuSans", "DejaVuSerif-Bold"} <= stems
    assert not {"cmsy10", "cmmi10", "STIXSizOneSymReg", "DejaVuSans-Oblique"} & stems


def test_error_for_a_file_that_is_not_a_font_names_it(tmp_path: Path) -> None:
    path = tmp_path / "broken.ttf"
    path.write_bytes(b"no font")
    assert find_fonts([tmp_path]) == []
    with pytest.raises(ValueError, match=r"broken\.ttf"):
        split_fonts([path])
