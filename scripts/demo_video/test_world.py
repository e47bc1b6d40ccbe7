"""The video demo's world: what happens in clips, and what is asked about it."""

import random
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from PIL import ImageChops, ImageStat

import xgenmm
from scripts.demo_model.drawing import draw
from scripts.demo_model.scene import Shape
from scripts.demo_model.shapes import overlap
from scripts.demo_video.clip import MOVES, TURNS, Actor, Clip, Event
from scripts.demo_video.questions import QUESTION_KINDS, ask_all, questions, sample_questions
from scripts.demo_video.sampling import sample_clip
from scripts.demo_video.video_files import write_video

STAR = Shape("star", "red", (10, 80, 40, 110), 0.0, (255, 0, 0))
CIRCLE = Shape("circle", "blue", (60, 20, 90, 50), 0.0, (0, 0, 255))
CLIP = Clip(
    160,
    120,
    (255, 255, 255),
    (
        Actor(STAR, Event(MOVES, 0.1, 0.5, "right", (100.0, 0.0))),
        Actor(CIRCLE, Event("disappears", 0.6, 0.8)),
    ),
)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    rng = random.Random(5)
    return [sample_clip(rng) for _ in range(200)]


def answers(clip: Clip, form: str) -> set[str]:
    return {qa.answer for qa in ask_all(clip, form)}


def test_answers_follow_from_the_events() -> None:
    assert answers(CLIP, "direction") == {"right"}
    assert answers(CLIP, "disappears") == {"blue circle"}
    assert answers(CLIP, "appears") == {"nothing"}
    assert answers(CLIP, "first") == {"the red star moves"}
    assert answers(CLIP, "last") == {"the blue circle disappears"}
    assert answers(CLIP, "start") == {"2"}
    assert answers(CLIP, "end") == {"1"}
    assert answers(CLIP, "change") == answers(CLIP, "into") == set()


def test_a_reversed_clip_has_the_reversed_answers() -> None:
    turning = Actor(STAR, Event(TURNS, 0.1, 0.3, color="green", shade=(0, 255, 0)))
    backwards = replace(CLIP, actors=(turning, CLIP.actors[1])).reversed()
    assert answers(backwards, "appears") == {"blue circle"}
    assert answers(backwards, "change") == {"the green star turns red"}
    assert answers(backwards, "first") == {"the blue circle appears"}
    assert answers(backwards, "end") == {"2"}
    assert answers(CLIP.reversed(), "direction") == {"left"}


def test_a_reversed_clip_shows_the_same_scenes_backwards(clips: list[Clip]) -> None:
    for clip in clips[:50]:
        for a, b in zip(clip.scenes(7), reversed(clip.reversed().scenes(7)), strict=True):
            assert [shape.name for shape in a.shapes] == [shape.name for shape in b.shapes]
            for one, other in zip(a.shapes, b.shapes, strict=True):
                assert one.box == pytest.approx(other.box)


def test_shapes_keep_apart_inside_the_frame(clips: list[Clip]) -> None:
    for clip in clips:
        for scene in clip.scenes(9):
            for shape in scene.shapes:
                assert min(shape.box) >= 0
                assert shape.box[2] <= clip.width
                assert shape.box[3] <= clip.height
            for one, other in combinations(scene.shapes, 2):
                assert not overlap(one.box, other.box, 1.0)
                assert one.name != other.name


def test_events_are_apart_in_eight_frames(clips: list[Clip]) -> None:
    for clip in clips:
        halfway = [event.halfway for _, event in clip.events]
        assert all(b - a > 1 / 7 for a, b in pairwise(halfway))


def test_every_kind_of_question_is_asked(clips: list[Clip]) -> None:
    rng = random.Random(1)
    assert {qa.kind for clip in clips for qa in questions(clip, rng)} == set(QUESTION_KINDS)
    for clip in clips:
        asked = sample_questions(clip, rng, 8)
        assert 1 <= len(set(asked)) == len(asked) <= 8


def test_a_video_file_shows_the_clip_from_the_first_seen_frame_to_the_last(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(CLIP, path, 40)
    video = xgenmm.read_video(path)
    assert video.total == 40
    for frame, time in ((video.frames[0], 0.0), (video.frames[-1], 1.0)):
        difference = ImageChops.difference(frame, draw(CLIP.scene(time)))
        assert max(ImageStat.Stat(difference).mean) < 4  # the codec blurs edges and colors
