"""The demo world: its bounds, its pictures, and every answer worked out a second time."""

import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from scripts.demo_model import world
from scripts.demo_model.world import QA, Box, Scene, Shape

COLOR = f"(?P<color>{'|'.join(world.COLORS)})"
KIND = f"(?P<kind>{'|'.join(world.KINDS)})"


@pytest.fixture(scope="module")
def fonts() -> list[Path]:
    found = world.find_fonts([Path(matplotlib.get_data_path()) / "fonts" / "ttf"])
    return world.split_fonts(found)[0]


@pytest.fixture(scope="module")
def scenes(fonts: list[Path]) -> list[Scene]:
    rng = random.Random(11)
    return [world.sample_scene(rng, fonts, level=i % 5 / 4) for i in range(400)]


def center(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def disjoint(a: Box, b: Box) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


# Scenes and pictures


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
        first, second, asked = world.sample_pair(rng, fonts, 1.0)
        assert_within_bounds(first)
        assert_within_bounds(second)
        assert 1 <= len(asked) <= 3


def test_pairs_may_be_related_more_often_and_asked_in_more_words(fonts: list[Path]) -> None:
    def asked(**options: Any) -> list[list[QA]]:
        rng = random.Random(21)
        return [world.sample_pair(rng, fonts, 1.0, 8, **options)[2] for _ in range(200)]

    def same(pairs: list[list[QA]]) -> list[list[QA]]:
        found = [[qa for qa in pair if qa.answer in ("yes", "no")] for pair in pairs]
        return [pair for pair in found if pair]

    usual, often = same(asked()), same(asked(related=0.75, wordings=4))
    assert len(often) > 1.2 * len(usual)
    assert {len(pair) for pair in usual} == {1}
    assert max(len(pair) for pair in often) == 4
    assert all(len({qa.answer for qa in pair}) == 1 for pair in often)


def test_a_family_is_two_scenes_that_differ_in_one_thing(fonts: list[Path]) -> None:
    rng = random.Random(22)
    for _ in range(100):
        (scene, resized), (edited, edited_resized) = world.sample_family(rng, fonts, 1.0)
        for one in (scene, resized, edited, edited_resized):
            assert_within_bounds(one)
        assert [qa.answer for qa in world.ask_difference(scene, resized)] == ["nothing"] * 2
        assert [qa.answer for qa in world.ask_difference(edited_resized, edited)] == ["nothing"] * 2
        first, second = (qa.answer for qa in world.ask_difference(scene, edited))
        names = [shape.name for shape in scene.shapes]
        assert first in names or (scene.sign is not None and first == scene.sign.word)
        assert first != second
        asked = world.ask_pair(rng, scene, edited, 5, 2)
        assert asked[0].answer == "no"
        assert "yes" not in {qa.answer for qa in asked}
        assert {qa.answer for qa in world.ask_same(rng, "yes", 3)} == {"yes"}


def test_level_orders_the_world_from_easy_to_hard(fonts: list[Path]) -> None:
    rng = random.Random(13)
    easy = [world.sample_scene(rng, fonts, level=0) for _ in range(100)]
    full = [world.sample_scene(rng, fonts, level=1) for _ in range(300)]
    assert max(len(scene.shapes) for scene in easy) == 2
    assert max(max(s.width, s.height) / s.short for s in easy) <= 1.3
    assert Counter(len(scene.shapes) for scene in full).keys() == {1, 2, 3, 4}
    assert max(s.width / s.height for s in full) > 2.7
    assert min(s.width / s.height for s in full) < 0.37


def test_with_sign_is_obeyed(fonts: list[Path]) -> None:
    rng = random.Random(14)
    for wanted in (True, False):
        for _ in range(20):
            scene = world.sample_scene(rng, fonts, level=1, with_sign=wanted)
            assert (scene.sign is not None) == wanted


def test_equal_seeds_give_equal_worlds(fonts: list[Path]) -> None:
    def build(seed: int) -> tuple[Scene, list[QA], bytes, tuple[Scene, Scene, list[QA]]]:
        rng = random.Random(seed)
        scene = world.sample_scene(rng, fonts, level=1, with_sign=True)
        asked = world.sample_questions(scene, rng, 6)
        return scene, asked, world.draw(scene).tobytes(), world.sample_pair(rng, fonts, 1)

    assert build(5) == build(5)
    assert build(5) != build(6)
    assert world.evaluation_set(3, fonts, 20) == world.evaluation_set(3, fonts, 20)


def test_image_shows_the_shades_where_the_shapes_are(scenes: list[Scene]) -> None:
    for scene in scenes[:60]:
        image = world.draw(scene)
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
        scene = world.sample_scene(rng, fonts, level=1, with_sign=True)
        assert scene.sign is not None
        gray = np.asarray(world.draw(scene).convert("L")).astype(int)
        for x0, y0, x1, y1 in scene.sign.letters:
            # Dark ink inside; some letters in small pictures are thin and gray.
            assert gray[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)].min() < 160
        height = max(b[3] for b in scene.sign.letters) - min(b[1] for b in scene.sign.letters)
        assert height >= 0.1 * scene.short


def test_shades_of_different_names_stay_apart() -> None:
    rng = random.Random(16)
    drawn = {c: np.array([world._shade(rng, c) for _ in range(200)]) for c in world.COLORS}
    for a in world.COLORS:
        for b in world.COLORS:
            if a < b:
                apart = np.linalg.norm(drawn[a][:, None] - drawn[b][None], axis=2)
                assert apart.min() > 35, (a, b)
    backgrounds = np.array([world._background(rng) for _ in range(200)])
    for color, shades in drawn.items():
        assert np.linalg.norm(shades[:, None] - backgrounds[None], axis=2).min() > 60, color


# Dense labels


def square(box: Box) -> Shape:
    return Shape("square", "green", box, 0.0, (0, 160, 0))


def test_label_map_names_what_stands_in_each_cell() -> None:
    label = 1 + 7 + 1
    scene = Scene(80, 40, (255, 255, 255), (square((10, 10, 30, 30)),), None)
    expected = np.zeros((4, 8), dtype=np.int64)
    expected[1:3, 1:3] = label
    np.testing.assert_array_equal(world.label_map(scene, 4, 8), expected)
    # A region that reaches beyond the picture: 20 pixels of nothing above and below.
    padded = world.label_map(scene, 8, 8, (0, -20, 80, 60))
    np.testing.assert_array_equal(padded, np.pad(expected, ((2, 2), (0, 0))))
    # A quarter of a cell is enough.
    thin = Scene(80, 40, (255, 255, 255), (square((10, 10, 35, 35)),), None)
    assert (world.label_map(thin, 4, 8)[1:4, 1:4] == label).sum() == 9


def test_label_map_agrees_with_the_image(scenes: list[Scene]) -> None:
    for scene in scenes[:40]:
        labels = world.label_map(scene, scene.height, scene.width, oversample=1)
        wanted = set(labels.ravel().tolist()) - {0}
        for shape in scene.shapes:
            label = 1 + world.KINDS.index(shape.kind) * 7 + world.COLORS.index(shape.color)
            assert label in wanted
        image = np.asarray(world.draw(scene))
        shape_pixels = (labels > 0) & (labels < world.FIRST_LETTER_CLASS)
        shades = np.array([shape.shade for shape in scene.shapes])
        painted = (image[:, :, None] == shades).all(axis=3).any(axis=2)
        # Black ink may equal a black shape's shade.
        painted &= labels < world.FIRST_LETTER_CLASS
        union = (shape_pixels | painted).sum()
        # Edges are blends of two colours, so the smaller the shapes, the less is exact.
        assert (shape_pixels & painted).sum() > (0.9 if scene.short > 200 else 0.5) * union


def test_label_map_spells_the_sign(fonts: list[Path]) -> None:
    rng = random.Random(17)
    scene = world.sample_scene(rng, fonts, level=0, with_sign=True)
    assert scene.sign is not None
    labels = world.label_map(scene, scene.height, scene.width)
    for letter, box in zip(scene.sign.word, scene.sign.letters, strict=True):
        x, y = center(box)
        assert labels[int(y), int(x)] == world.FIRST_LETTER_CLASS + ord(letter) - ord("A")
    x0, y0, _, _ = scene.sign.box
    assert labels[int(y0) + 2, int(x0) + 2] == world.SIGN_CLASS == world.NUM_CLASSES - 1


# Answers, worked out a second time from the question's words


def named(scene: Scene, words: str) -> list[Shape]:
    """The shapes that a phrase such as `red circles` or `anything blue` names."""
    words = words.removeprefix("a ").removeprefix("an ")
    color = next((c for c in world.COLORS if c in words.split()), None)
    kind = next((k for k in world.KINDS if k in words), None)
    return [s for s in scene.shapes if color in (None, s.color) and kind in (None, s.kind)]


def slots(wordings: str, question: str) -> dict[str, str]:
    """The fillers of the wording that the question is an instance of."""
    matches = []
    for wording in world.WORDINGS[wordings]:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(wording))
        if match := re.fullmatch(pattern, question):
            matches.append(match.groupdict())
    assert matches, question
    # "Is there {a_thing}?" also fits "Is there a star in the image?": the shortest filler is it.
    return min(matches, key=lambda found: sum(map(len, found.values())))


def check_place(scene: Scene, question: str, answer: str) -> None:
    found = re.search(r"\b(left of|right of|above|over|below|under) the (.+)[.?]$", question)
    assert found
    things = [(shape.name, shape.box) for shape in scene.shapes]
    if scene.sign is not None:
        things.append(("sign", scene.sign.box))
    references = [t for t in things if t[0].endswith(found[2])]
    assert len(references) == 1
    origin = references[0][1]
    bearing = {"right": 0, "below": 90, "under": 90, "left": 180, "above": 270, "over": 270}[
        found[1].removesuffix(" of")
    ]
    there = []
    for name, box in things:
        if box == origin:
            continue
        (x, y), (ox, oy) = center(box), center(origin)
        turn = (math.degrees(math.atan2(y - oy, x - ox)) - bearing + 180) % 360 - 180
        # Nothing that is asked about lies on a diagonal.
        assert abs(turn) < 39 or abs(turn) > 63
        if abs(turn) < 39:
            assert math.hypot(x - ox, y - oy) >= 0.1 * scene.short
            there.append(name)
    assert there == ([] if answer == "nothing" else [answer])


def check_answer(scene: Scene, qa: QA) -> None:
    question, answer = qa.question, qa.answer
    if qa.kind == "caption":
        order = sorted(scene.shapes, key=lambda s: center(s.box)[0])
        text = answer.partition(", with a sign that says ")[0]
        assert re.findall(rf"\b{COLOR} {KIND}\b", text) == [(s.color, s.kind) for s in order]
        assert text.count(" a ") + text.count(" an ") == len(order) - 1
        assert answer[0] == "A"
        assert answer[-1] == "."
        assert (scene.sign is not None) == ("sign" in answer)
        assert scene.sign is None or answer.endswith(f"says {scene.sign.word}.")
    elif qa.kind == "count":
        assert answer == str(len(named(scene, slots("count", question)["things"])))
    elif qa.kind == "color":
        (shape,) = named(scene, slots("color", question)["thing"])
        assert answer == shape.color
    elif qa.kind == "shape":
        (shape,) = named(scene, slots("shape", question)["color"])
        assert answer == shape.kind
    elif qa.kind == "existence":
        thing = slots("existence", question)["a_thing"]
        there = scene.sign is not None if "sign" in thing else bool(named(scene, thing))
        assert answer == ("yes" if there else "no")
    elif qa.kind == "place":
        check_place(scene, question, answer)
    else:
        assert qa.kind == "sign"
        assert scene.sign is not None
        assert answer == scene.sign.word


def test_answers_to_questions_on_one_image(scenes: list[Scene]) -> None:
    rng = random.Random(18)
    asked: Counter[str] = Counter()
    for scene in scenes:
        for qa in world.sample_questions(scene, rng, 8):
            check_answer(scene, qa)
            asked[qa.kind] += 1
    assert set(asked) == set(world.QUESTION_KINDS) - {"pair"}
    assert min(asked.values()) > 100


def same_content(first: Scene, second: Scene) -> bool:
    words = [scene.sign.word if scene.sign else None for scene in (first, second)]
    names = [Counter(shape.name for shape in scene.shapes) for scene in (first, second)]
    return names[0] == names[1] and words[0] == words[1]


def test_answers_to_questions_on_two_images(fonts: list[Path]) -> None:
    rng = random.Random(19)
    answers: Counter[str] = Counter()
    for _ in range(600):
        first, second, asked = world.sample_pair(rng, fonts, 1.0)
        for qa in asked:
            assert qa.kind == "pair"
            answers[qa.answer] += 1
            if qa.answer in ("yes", "no"):
                assert (qa.answer == "yes") == same_content(first, second)
                continue
            wordings = next(w for w in ("more", "fewer", "has") if fits(f"pair {w}", qa.question))
            thing = "".join(slots(f"pair {wordings}", qa.question).values())
            if thing == "a sign":
                counts = [int(scene.sign is not None) for scene in (first, second)]
            else:
                counts = [len(named(scene, thing)) for scene in (first, second)]
            if wordings == "fewer":
                counts = [-count for count in counts]
            assert counts[0] != counts[1]
            assert qa.answer == ("first" if counts[0] > counts[1] else "second")
            if wordings == "has":
                assert min(counts) == 0
    assert set(answers) == {"yes", "no", "first", "second"}
    assert 0.75 < answers["yes"] / answers["no"] < 1.33
    assert 0.8 < answers["first"] / answers["second"] < 1.25


def fits(wordings: str, question: str) -> bool:
    try:
        slots(wordings, question)
    except AssertionError:
        return False
    return True


def test_existence_is_balanced_and_its_noes_are_hard(scenes: list[Scene]) -> None:
    rng = random.Random(20)
    answers: Counter[str] = Counter()
    hard = noes = 0
    for scene in scenes * 3:
        (qa,) = world.questions(scene, rng, ("existence",))
        answers[qa.answer] += 1
        match = re.search(f"{COLOR} {KIND}", qa.question)
        if qa.answer == "no" and match:
            noes += 1
            hard += bool(named(scene, match["color"])) or bool(named(scene, match["kind"]))
    assert 0.85 < answers["yes"] / answers["no"] < 1.18
    assert hard > 0.7 * noes


def test_every_kind_has_at_least_four_wordings(scenes: list[Scene]) -> None:
    for wordings in world.WORDINGS.values():
        assert len(set(wordings)) >= 4
    rng = random.Random(21)
    openings: dict[str, set[str]] = {}
    for scene in scenes:
        for qa in world.questions(scene, rng):
            openings.setdefault(qa.kind, set()).add(qa.question[:9])
    assert all(len(seen) >= 3 for seen in openings.values())


def test_sampled_questions_differ_and_follow_the_weights(scenes: list[Scene]) -> None:
    rng = random.Random(22)
    for scene in scenes[:50]:
        asked = world.sample_questions(scene, rng, 6)
        assert len(asked) == len({qa.question for qa in asked}) == 6
        only = world.sample_questions(scene, rng, 4, {"count": 1.0, "sign": 0.0})
        assert {qa.kind for qa in only} == {"count"}


def test_place_rule_leaves_out_the_diagonal() -> None:
    reference = (40.0, 40.0, 60.0, 60.0)
    assert world.lies((0, 42, 20, 62), "left", reference, 100) is True
    assert world.lies((0, 42, 20, 62), "right", reference, 100) is False
    assert world.lies((0, 42, 20, 62), "above", reference, 100) is False
    assert world.lies((0, 0, 20, 20), "left", reference, 100) is None
    assert world.lies((0, 0, 20, 20), "above", reference, 100) is None
    assert world.lies((0, 0, 20, 20), "below", reference, 100) is False


# The whole


def test_vocabulary_holds_every_word_that_is_asked_or_answered(scenes: list[Scene]) -> None:
    lines = world.vocabulary()
    words = {word for line in lines for word in re.findall(r"\w+|[^\w\s]", line)}
    rng = random.Random(23)
    for scene in scenes[:100]:
        for qa in world.questions(scene, rng):
            text = f"{qa.question} {qa.answer}"
            if scene.sign is not None:
                text = text.replace(scene.sign.word, " ".join(scene.sign.word))
            assert set(re.findall(r"\w+|[^\w\s]", text)) <= words


def test_evaluation_set_on_held_out_fonts() -> None:
    fonts = world.held_out_fonts()
    assert len(fonts) >= 20
    cases = world.evaluation_set(1, fonts, 100)
    counts = Counter(case.kind for case in cases)
    # At least 300 of each in the full set of 500 scenes.
    assert set(counts) == set(world.QUESTION_KINDS)
    assert min(counts.values()) >= 60
    assert {len(case.images) for case in cases if case.kind == "pair"} == {2}
    for case in cases:
        if case.kind != "pair":
            check_answer(case.scenes[0], QA(case.kind, case.question, case.answer))
        for scene in case.scenes:
            assert scene.sign is None or scene.sign.font in fonts


def test_fonts_are_split_by_family(fonts: list[Path]) -> None:
    held_out = world.held_out_fonts()
    assert world.split_fonts([*held_out, *fonts]) == (fonts, held_out)
    stems = {path.stem for path in fonts}
    assert {"DejaVuSans", "DejaVuSerif-Bold"} <= stems
    assert not {"cmsy10", "cmmi10", "STIXSizOneSymReg", "DejaVuSans-Oblique"} & stems


def test_a_file_that_is_no_font_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.ttf"
    path.write_bytes(b"no font")
    assert world.find_fonts([tmp_path]) == []
    with pytest.raises(ValueError, match=r"broken\.ttf"):
        world.split_fonts([path])
