"""Stop sequences in streamed text, against a plain search."""

import random

from xgenmm.engine.stop_strings import StopStringChecker


def cut_by_search(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        complete = [len(stop) for stop in stops if text.endswith(stop, 0, end)]
        if complete:
            return text[: end - max(complete)], True
    return text, False


def held_by_search(text: str, stops: list[str]) -> int:
    """Length of the longest tail of a text that begins a stop sequence."""
    fronts = [stop[:size] for stop in stops for size in range(1, len(stop))]
    return max((len(front) for front in fronts if text.endswith(front)), default=0)


def test_streamed_text_equals_a_plain_search() -> None:
    source = random.Random(0)

    def random_text(low: int, high: int) -> str:
        return "".join(source.choices("abc"[: source.choice((2, 3))], k=source.randint(low, high)))

    for _ in range(1000):
        stops = [random_text(1, 7) for _ in range(source.randint(0, 4))]
        text = random_text(0, 60)
        checker, given, passed = StopStringChecker(stops), 0, ""
        while given < len(text):
            size = source.randint(0, 5)
            passed += checker.push(text[given : given + size])
            given = min(given + size, len(text))
            expected, stopped = cut_by_search(text[:given], stops)
            assert checker.stopped == stopped
            held = 0 if stopped else held_by_search(expected, stops)
            assert passed == expected[: len(expected) - held], "no less and no more is held back"
        assert (passed + checker.flush(), checker.stopped) == cut_by_search(text, stops)
        assert checker.flush() == ""


def test_text_that_may_begin_a_stop_sequence_is_held_back() -> None:
    checker = StopStringChecker(["\n\n", "User:"])
    assert [
        checker.push(piece) for piece in ("A cat.", "\n", "Us", "e a", "\n", "\nMore", "x")
    ] == [
        "A cat.",
        "",
        "\n",
        "Use a",
        "",
        "",
        "",
    ]
    assert checker.stopped
    assert checker.flush() == ""


def test_text_ends_at_the_first_complete_stop_sequence() -> None:
    checker = StopStringChecker(["abcd", "bc"])
    assert checker.push("xabcd") == "xa"
    both = StopStringChecker(["c", "bc"])
    assert both.push("abc") == "a"


def test_long_stop_sequence_does_not_slow_down_streaming() -> None:
    """It almost matches at every position of a long text, the worst case of a naive search."""
    checker = StopStringChecker(["a" * 20_000 + "b"])
    passed = "".join(checker.push("a") for _ in range(100_000))
    assert len(passed) == 80_000
    assert checker.push("b") == ""
    assert checker.stopped
