"""How one request samples its tokens, and the allowed range of each setting."""

from dataclasses import dataclass

from xgenmm.errors import InputError

MOST_BEAMS = 8
"""Maximum beams of one request; each needs a row of the batch."""

LIMITS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 2048),
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 100_000),
    "num_beams": (1, MOST_BEAMS),
    "repetition_penalty": (0.5, 3.0),
    "seed": (0, 2**63 - 1),
}
"""Inclusive range of each setting."""

MAX_STOP_SEQUENCES = 16


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples its tokens. Raises `InputError` for a value out of range.

    temperature: 0 always takes the most likely token; `top_p` and `top_k` then have no effect.
    top_p: sample from the smallest set of tokens whose probability reaches this; 1 is off, and 0
        leaves the most likely token, so it sets `temperature` to 0.
    top_k: sample from this many most likely tokens; 0 is off.
    num_beams: width of the beam search; 1 is off; more needs temperature 0.
    repetition_penalty: above 1 makes tokens that were already generated less likely; 1 is off.
    stop_sequences: the answer ends before the first of these texts; none may be empty.
    seed: the same request with the same seed gives the same tokens; None is random.
    """

    max_new_tokens: int = 768
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    stop_sequences: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "num_beams"):
            _check_number(name, getattr(self, name), integer=True)
        for name in ("temperature", "top_p", "repetition_penalty"):
            _check_number(name, getattr(self, name), integer=False)
        if self.seed is not None:
            _check_number("seed", self.seed, integer=True)
        if self.top_p == 0:
            object.__setattr__(self, "temperature", 0.0)
        if self.num_beams > 1 and self.temperature > 0:
            raise InputError(
                "num_beams",
                f"{self.num_beams} beams search for the most likely answer and cannot be combined "
                f"with a temperature of {self.temperature}; set temperature to 0 or num_beams to 1",
            )
        object.__setattr__(self, "stop_sequences", _checked_stops(self.stop_sequences))


def _check_number(name: str, value: object, *, integer: bool) -> None:
    low, high = LIMITS[name]
    types = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
        expected = "whole number" if integer else "number"
        raise InputError(name, f"must be a {expected} from {low} to {high}, not {value!r}")


def _checked_stops(stops: object) -> tuple[str, ...]:
    if not isinstance(stops, list | tuple):
        raise InputError("stop_sequences", f"must be a list of texts, not {stops!r}")
    if len(stops) > MAX_STOP_SEQUENCES:
        raise InputError(
            "stop_sequences", f"{len(stops)} texts given; at most {MAX_STOP_SEQUENCES} are allowed"
        )
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise InputError("stop_sequences", f"each must be a non-empty text, not {stop!r}")
    return tuple(stops)
