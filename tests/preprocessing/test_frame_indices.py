"""The frames taken from a clip: the authors' choice, and a usable one for short clips."""

import pytest

from xgenmm.preprocessing.frame_indices import frame_indices


@pytest.mark.parametrize(
    ("total", "num_frames", "expected"),
    [
        (16, 8, [4, 5, 6, 7, 8, 9, 10, 12]),
        (100, 8, [4, 17, 30, 43, 56, 69, 82, 96]),
        (301, 8, [4, 45, 87, 129, 171, 213, 255, 297]),
        (33, 16, [8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 22, 23, 25]),
        (64, 7, [3, 12, 22, 32, 41, 51, 61]),
        (100, 4, [2, 34, 66, 98]),
        (64, 1, [0]),
    ],
)
def test_longer_clips_as_in_the_authors_script(
    total: int, num_frames: int, expected: list[int]
) -> None:
    assert frame_indices(total, num_frames) == expected


@pytest.mark.parametrize(
    ("total", "num_frames", "expected"),
    [
        (15, 8, [0, 2, 4, 6, 8, 10, 12, 14]),
        (8, 8, list(range(8))),
        (64, 64, list(range(64))),
        (5, 8, [0, 0, 1, 1, 2, 2, 3, 4]),
        (1, 1, [0]),
    ],
)
def test_short_clips_are_covered_in_order(total: int, num_frames: int, expected: list[int]) -> None:
    assert frame_indices(total, num_frames) == expected


def test_indices_ascend_within_the_clip() -> None:
    for total in range(1, 200):
        for num_frames in range(1, 65):
            indices = frame_indices(total, num_frames)
            assert indices == sorted(indices)
            assert 0 <= indices[0] <= indices[-1] < total
            assert len(set(indices)) == num_frames or num_frames > total // 2


def test_nothing_to_choose_is_an_error() -> None:
    with pytest.raises(ValueError, match="total is 0 and num_frames is 8; both must be positive"):
        frame_indices(0, 8)
