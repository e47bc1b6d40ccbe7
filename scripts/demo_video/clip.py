"""What a clip of the demo's world consists of: shapes, at most one event each, a background.

Times go from 0, the first frame that the model sees, to 1, the last one.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from scripts.demo_model.scene import Rgb, Scene, Shape

MOVES, APPEARS, DISAPPEARS, TURNS = "moves", "appears", "disappears", "turns"
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
REVERSED = {MOVES: MOVES, APPEARS: DISAPPEARS, DISAPPEARS: APPEARS, TURNS: TURNS}


@dataclass(frozen=True)
class Event:
    """What happens to a shape.

    Attributes:
        kind: one of `MOVES`, `APPEARS`, `DISAPPEARS` and `TURNS`.
        start, end: a shape moves from `start` to `end`; anything else happens halfway.
        direction, shift: of a movement; `shift` in pixels.
        color, shade: into which a shape turns.
    """

    kind: str
    start: float
    end: float
    direction: str = ""
    shift: tuple[float, float] = (0.0, 0.0)
    color: str = ""
    shade: Rgb = (0, 0, 0)

    @property
    def halfway(self) -> float:
        """The time between `start` and `end`."""
        return (self.start + self.end) / 2


@dataclass(frozen=True)
class Actor:
    """A shape, as it is before its event, and the event."""

    shape: Shape
    event: Event | None = None

    def at(self, time: float) -> Shape | None:
        """The shape at this time, None where it is not visible."""
        event, shape = self.event, self.shape
        if event is None:
            return shape
        happened = time >= event.halfway
        if event.kind == MOVES:
            progress = min(1.0, max(0.0, (time - event.start) / (event.end - event.start)))
            return moved(shape, progress * event.shift[0], progress * event.shift[1])
        if event.kind == TURNS:
            return replace(shape, color=event.color, shade=event.shade) if happened else shape
        return shape if happened == (event.kind == APPEARS) else None

    def reversed(self) -> "Actor":
        """The same, seen backwards."""
        event, shape = self.event, self.shape
        if event is None:
            return self
        backwards = replace(
            event,
            kind=REVERSED[event.kind],
            start=1 - event.end,
            end=1 - event.start,
            direction=OPPOSITE.get(event.direction, ""),
            shift=(-event.shift[0], -event.shift[1]),
            color=shape.color if event.kind == TURNS else "",
            shade=shape.shade,
        )
        if event.kind == TURNS:
            shape = replace(shape, color=event.color, shade=event.shade)
        return Actor(moved(shape, *event.shift), backwards)


@dataclass(frozen=True)
class Clip:
    """Everything that a clip shows. No two shapes share a name at any time."""

    width: int
    height: int
    background: Rgb
    actors: tuple[Actor, ...]

    def scene(self, time: float) -> Scene:
        """What the clip shows at this time."""
        shapes = (actor.at(time) for actor in self.actors)
        seen = tuple(shape for shape in shapes if shape is not None)
        return Scene(self.width, self.height, self.background, seen, None)

    def scenes(self, count: int) -> list[Scene]:
        """What `count` frames show, from the first to the last."""
        return [self.scene(i / (count - 1)) for i in range(count)]

    def reversed(self) -> "Clip":
        """The same, seen backwards."""
        return replace(self, actors=tuple(actor.reversed() for actor in self.actors))

    @cached_property
    def events(self) -> list[tuple[Shape, Event]]:
        """The shapes that have an event, in the order of the events, which do not overlap."""
        found = [(actor.shape, actor.event) for actor in self.actors if actor.event is not None]
        found.sort(key=lambda pair: pair[1].start)
        assert all(a.end <= b.start for (_, a), (_, b) in pairwise(found))
        return found


def moved(shape: Shape, dx: float, dy: float) -> Shape:
    """The shape, moved by so many pixels."""
    x0, y0, x1, y1 = shape.box
    return replace(shape, box=(x0 + dx, y0 + dy, x1 + dx, y1 + dy))
