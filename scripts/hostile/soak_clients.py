"""The clients of the soak: normal and hostile requests, and those that cancel or leave."""

import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.hostile.normal_requests import NormalRequest
from scripts.hostile.protocol_cases import LONG, POST
from scripts.hostile.requests import Case, Reply, leave, post, problem, request

HOSTILE_SHARE = 0.3
SLOW_WEIGHT = 0.05  # relative to other hostile requests

RIGHT = "answered right"
ENDED = "cancelled or left by the client"
HANDLED = "hostile, handled as expected"
KILLED = "failed because of a kill"
UNEXPECTED = "unexpected"


@dataclass(frozen=True)
class Attempt:
    """A request of a client: how to send it, what is wrong with a reply, and what it counts as."""

    name: str
    send: Callable[[str], Reply]
    problem: Callable[[Reply], str]
    counts_as: str


@dataclass(frozen=True)
class Mix:
    """What clients choose from."""

    normal: Sequence[NormalRequest]
    hostile: Sequence[Case]
    slow: Sequence[Case]

    def draw(self, rng: random.Random) -> Attempt:
        """A random request."""
        if rng.random() < HOSTILE_SHARE:
            slow_weight = SLOW_WEIGHT * len(self.slow)
            is_slow = rng.random() * (len(self.hostile) + slow_weight) < slow_weight
            case = rng.choice(self.slow if is_slow else self.hostile)
            return Attempt(
                f"{case.group}, {case.name}",
                case.send,
                lambda reply: problem(case, reply),
                HANDLED,
            )
        normal, behavior = rng.choice(self.normal), rng.random()
        if behavior < 0.06:
            return Attempt("cancelled", cancelled, _nothing_wrong, ENDED)
        if behavior < 0.12:
            return Attempt("left", left, _nothing_wrong, ENDED)
        accept = "text/event-stream" if behavior < 0.2 else "application/json"
        return Attempt(
            normal.body[-100:].decode(),
            lambda url: post(url, normal.body, headers={"Accept": accept}),
            normal.problem,
            RIGHT,
        )


def cancelled(url: str) -> Reply:
    """Start a long answer, wait a moment and cancel it. Raises OSError if that does not work."""
    path = f"/predictions/{uuid.uuid4()}"
    while (started := request(url, "PUT", path, LONG, {"Prefer": "respond-async"})).status == 409:
        time.sleep(0.01)
    if started.status != 202:
        raise OSError(f"a prediction does not start: {started}")
    reply = request(url, "POST", f"{path}/cancel")
    if reply.status not in (200, 404):  # it may have ended
        raise OSError(f"a prediction cannot be cancelled: {reply}")
    return reply


def left(url: str) -> Reply:
    """Ask for a long answer and close the connection."""
    return leave(url, POST + b"Content-Length: %d\r\n\r\n" % len(LONG), LONG)


def _nothing_wrong(reply: Reply) -> str:
    return ""
