"""Questions of the demo's world, each answer derived a second time from the question's words."""

import math
import random
import re
from collections import Counter
from pathlib import Path

from scripts.demo_model.evaluation_set import evaluation_set
from scripts.demo_model.fonts import held_out_fonts
from scripts.demo_model.pairs import sample_pair
from scripts.demo_model.placement import lies
from scripts.demo_model.questions import questions, sample_questions
from scripts.demo_model.scene import COLORS, KINDS, Box, Scene, Shape
from scripts.demo_model.wordings import QA, QUESTION_KINDS, WORDINGS, vocabulary

COLOR = f"(?P<color>{'|'.join(COLORS)})"
KIND = f"(?P<kind>{'|'.join(KINDS)})"


def center(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def named(scene: Scene, words: str) -> list[Shape]:
    """The shapes that a phrase such as `red circles` or `anything blue` names."""
    words = words.removeprefix("a ").removeprefix("an ")
    color = next((c for c in COLORS if c in words.split()), None)
    kind = next((k for k in KINDS if k in words), None)
    return [s for s in scene.shapes if color in (None, s.color) and kind in (None, s.kind)]


def slots(wordings: str, question: str) -> dict[str, str]:
    """The slots of the wording that the question uses, by name."""
    matches = []
    for wording in WORDINGS[wordings]:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(wording))
        if match := re.fullmatch(pattern, question):
            matches.append(match.groupdict())
    assert matches, question
    # "Is there {a_thing}?" also fits "Is there a star in the image?": the shortest filler is right.
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
        # `places` leaves out what lies near a diagonal.
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


def test_answers_about_one_image_are_right(scenes: list[Scene]) -> None:
    rng = random.Random(18)
    asked: Counter[str] = Counter()
    for scene in scenes:
        for qa in sample_questions(scene, rng, 8):
            check_answer(scene, qa)
            asked[qa.kind] += 1
    assert set(asked) == set(QUESTION_KINDS) - {"pair"}
    assert min(asked.values()) > 100


def same_content(first: Scene, second: Scene) -> bool:
    words = [scene.sign.word if scene.sign else None for scene in (first, second)]
    names = [Counter(shape.name for shape in scene.shapes) for scene in (first, second)]
    return names[0] == names[1] and words[0] == words[1]


def test_answers_about_two_images_are_right(fonts: list[Path]) -> None:
    rng = random.Random(19)
    answers: Counter[str] = Counter()
    for _ in range(600):
        first, second, asked = sample_pair(rng, fonts, 1.0)
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


def test_existence_questions_are_balanced_and_their_negatives_are_hard(scenes: list[Scene]) -> None:
    rng = random.Random(20)
    answers: Counter[str] = Counter()
    hard = noes = 0
    for scene in scenes * 3:
        (qa,) = questions(scene, rng, ("existence",))
        answers[qa.answer] += 1
        match = re.search(f"{COLOR} {KIND}", qa.question)
        if qa.answer == "no" and match:
            noes += 1
            hard += bool(named(scene, match["color"])) or bool(named(scene, match["kind"]))
    assert 0.85 < answers["yes"] / answers["no"] < 1.18
    assert hard > 0.7 * noes


def test_every_kind_has_at_least_four_wordings(scenes: list[Scene]) -> None:
    for wordings in WORDINGS.values():
        assert len(set(wordings)) >= 4
    rng = random.Random(21)
    openings: dict[str, set[str]] = {}
    for scene in scenes:
        for qa in questions(scene, rng):
            openings.setdefault(qa.kind, set()).add(qa.question[:9])
    assert all(len(seen) >= 3 for seen in openings.values())


def test_sampled_questions_differ_and_follow_the_weights(scenes: list[Scene]) -> None:
    rng = random.Random(22)
    for scene in scenes[:50]:
        asked = sample_questions(scene, rng, 6)
        assert len(asked) == len({qa.question for qa in asked}) == 6
        only = sample_questions(scene, rng, 4, {"count": 1.0, "sign": 0.0})
        assert {qa.kind for qa in only} == {"count"}


def test_lies_is_undecided_on_the_diagonal() -> None:
    reference = (40.0, 40.0, 60.0, 60.0)
    assert lies((0, 42, 20, 62), "left", reference, 100) is True
    assert lies((0, 42, 20, 62), "right", reference, 100) is False
    assert lies((0, 42, 20, 62), "above", reference, 100) is False
    assert lies((0, 0, 20, 20), "left", reference, 100) is None
    assert lies((0, 0, 20, 20), "above", reference, 100) is None
    assert lies((0, 0, 20, 20), "below", reference, 100) is False


def test_vocabulary_contains_every_word_of_questions_and_answers(scenes: list[Scene]) -> None:
    lines = vocabulary()
    words = {word for line in lines for word in re.findall(r"\w+|[^\w\s]", line)}
    rng = random.Random(23)
    for scene in scenes[:100]:
        for qa in questions(scene, rng):
            text = f"{qa.question} {qa.answer}"
            if scene.sign is not None:
                text = text.replace(scene.sign.word, " ".join(scene.sign.word))
            assert set(re.findall(r"\w+|[^\w\s]", text)) <= words


def test_evaluation_set_has_all_kinds_and_only_held_out_fonts() -> None:
    fonts = held_out_fonts()
    assert len(fonts) >= 20
    cases = evaluation_set(1, fonts, 100)
    counts = Counter(case.kind for case in cases)
    # The full set of 500 scenes has at least 300 of each.
    assert set(counts) == set(QUESTION_KINDS)
    assert min(counts.values()) >= 60
    assert {len(case.images) for case in cases if case.kind == "pair"} == {2}
    for case in cases:
        if case.kind != "pair":
            check_answer(case.scenes[0], QA(case.kind, case.question, case.answer))
        for scene in case.scenes:
            assert scene.sign is None or scene.sign.font in fonts
