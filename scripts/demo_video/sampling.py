"""Sample clips of the demo's world; equal seeds give equal clips in any process."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from scripts.demo_model.sampling import sample_background
from scripts.demo_model.scene import COLORS, KINDS, Box, Shape, bounds
from scripts.demo_model.shapes import overlap, place_shape, sample_shade
from scripts.demo_video.clip import (
    APPEARS,
    DIRECTIONS,
    DISAPPEARS,
    MOVES,
    TURNS,
    Actor,
    Clip,
    Event,
    moved,
)

LONGEST = (160, 320)  # limits of a frame's longer side in pixels
MAX_ASPECT = 16 / 9
SIZES = (0.22, 0.38)  # limits of a shape's longer side, as a share of the frame's shorter side
DISTANCES = (0.3, 0.6)  # limits of a movement, as a share of the frame's side


def sample_clip(rng: random.Random, most_events: int = 3) -> Clip:
    """Sample a clip of 1 to 4 shapes and 1 to `most_events` events, one after the other."""
    while True:
        clip = _try_clip(rng, most_events)
        if clip is not None:
            return clip


def _try_clip(rng: random.Random, most_events: int) -> Clip | None:
    """A clip, or None if the shapes that were sampled do not fit the frame."""
    width, height = _sample_size(rng)
    count = rng.choices((1, 2, 3, 4), (1, 3, 4, 4))[0]
    num_events = min(count, most_events, rng.choices((1, 2, 3), (2, 5, 5))[0])
    # At most one shape each appears, disappears or changes color, so that questions on it are
    # unambiguous. What moves is placed first, because it needs the most room.
    kinds = rng.sample((MOVES, MOVES, APPEARS, DISAPPEARS, TURNS), num_events)
    kinds.sort(key=lambda kind: kind != MOVES)
    segments = _sample_segments(rng, num_events)
    rng.shuffle(segments)
    few = rng.sample(KINDS, 2) if rng.random() < 0.3 else KINDS
    taken: list[Box] = []
    names: set[str] = set()
    actors: list[Actor] = []
    for i in range(count):
        kind = kinds[i] if i < num_events else None
        start, end = segments[i] if i < num_events else (0.0, 0.0)
        actor = _sample_actor(rng, (width, height), rng.choice(few), taken, kind == MOVES)
        if actor is None:
            return None
        colors = rng.sample([c for c in COLORS if f"{c} {actor.shape.kind}" not in names], 2)
        shape = replace(actor.shape, color=colors[0], shade=sample_shade(rng, colors[0]))
        event = actor.event
        if kind == TURNS:
            event = Event(TURNS, start, end, color=colors[1], shade=sample_shade(rng, colors[1]))
            names.add(f"{colors[1]} {shape.kind}")
        elif kind == MOVES and event is not None:
            event = replace(event, start=start, end=end)
        elif kind is not None:
            event = Event(kind, start, end)
        names.add(shape.name)
        actors.append(Actor(shape, event))
    rng.shuffle(actors)
    return Clip(width, height, sample_background(rng), tuple(actors))


def _sample_size(rng: random.Random) -> tuple[int, int]:
    """Sample width and height: even, as video codecs want them, and mostly landscape."""
    long = rng.randint(LONGEST[0] // 2, LONGEST[1] // 2) * 2
    short = round(long / math.exp(rng.uniform(0, math.log(MAX_ASPECT))) / 2) * 2
    return (long, short) if rng.random() < 0.75 else (short, long)


def _sample_segments(rng: random.Random, count: int) -> list[tuple[float, float]]:
    """Sample `count` intervals of time, one after the other.

    What happens halfway through two of them is further apart than two of eight frames.
    """
    segments = []
    for i in range(count):
        margin = (rng.uniform(0, 0.3) / count, rng.uniform(0, 0.3) / count)
        if count == 1:
            # Halfway may then be at any time: one of the margins is larger.
            margin = rng.choice(
                ((rng.uniform(0, 0.6), margin[1]), (margin[0], rng.uniform(0, 0.6)))
            )
        segments.append((i / count + margin[0], (i + 1) / count - margin[1]))
    return segments


def _sample_actor(
    rng: random.Random, size: tuple[int, int], kind: str, taken: list[Box], moves: bool
) -> Actor | None:
    """A shape without color in a free place, or None; with a movement without times if `moves`.

    The room that it takes is added to `taken`.
    """
    short = min(size)
    for _ in range(20):
        shape = place_shape(rng, kind, rng.uniform(*SIZES), *size, taken)
        if shape is None or _extent(shape) < 0.95 * SIZES[0] * short:
            continue
        if not moves:
            taken.append(shape.box)
            return Actor(shape)
        direction, (x, y) = rng.choice(list(DIRECTIONS.items()))
        distance = rng.uniform(*DISTANCES) * (size[0] if x else size[1])
        drift = rng.uniform(-0.1, 0.1) * distance
        shift = (x * distance + y * drift, y * distance + x * drift)
        target = moved(shape, *shift).box
        room = bounds([shape.box, target])
        if _inside(target, size) and not _meets(room, taken, short):
            taken.append(room)
            return Actor(shape, Event(MOVES, 0.0, 1.0, direction, shift))
    return None


def _extent(shape: Shape) -> float:
    return max(shape.box[2] - shape.box[0], shape.box[3] - shape.box[1])


def _inside(box: Box, size: tuple[int, int]) -> bool:
    return min(box) >= 1 and box[2] <= size[0] - 1 and box[3] <= size[1] - 1


def _meets(box: Box, taken: Sequence[Box], short: int) -> bool:
    return any(overlap(box, other, max(2.0, 0.04 * short)) for other in taken)
