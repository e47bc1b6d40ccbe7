"""Which frames of a clip the video models see."""

import numpy as np

EXACT_TOTAL = 16
"""Shortest clip for which the authors' formula gives 8 frames in order."""


def frame_indices(total: int, num_frames: int) -> list[int]:
    """Indices, ascending, of the frames to take from a clip of `total` frames.

    The authors' inference script leaves out half of `num_frames` at either end:
    `linspace(num_frames // 2, total - num_frames // 2, num_frames)`, truncated. In clips with fewer
    than 16 frames or fewer than two for each frame taken, their formula repeats frames, runs
    backwards or leaves the clip; there the indices are uniform from the first frame to the last.

    Raises ValueError if either number is not positive.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"total is {total} and num_frames is {num_frames}; both must be positive")
    margin = num_frames // 2
    first, last = margin, total - margin
    if total < max(EXACT_TOTAL, 2 * num_frames):
        first, last = 0, total - 1
    # NumPy's linspace: the same rounding of floats as in the script.
    return [int(index) for index in np.linspace(first, last, num_frames, dtype=int)]
