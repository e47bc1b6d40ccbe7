"""Losses as a plot and for TensorBoard, if the libraries for it are installed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Writer = Callable[[str, float, int], object]
"""Takes the name of a curve, a value, and the step."""


def draw_losses(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the losses of a log, by step, as a PNG file; without matplotlib, do nothing."""
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 4.5))).subplots()
    for key, label in (("loss", "training"), ("validation_loss", "validation")):
        points = [(line["step"], line[key]) for line in log if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="loss")
    if axes.lines:
        axes.legend()
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png")
    partial.replace(path)


@contextmanager
def tensorboard_writer(folder: Path, first: int, *, enabled: bool) -> Iterator[Writer]:
    """Yield a writer of event files in `folder`, which does nothing without TensorBoard.

    first: steps made before; what an earlier process wrote about later ones is discarded.
    """
    if not enabled or find_spec("tensorboard") is None:
        yield lambda name, value, step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1) as writer:
        yield writer.add_scalar
