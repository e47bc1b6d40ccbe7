"""Losses as a plot and for TensorBoard, if the libraries for it are installed."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


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
    axes.legend()
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png")
    partial.replace(path)


def tensorboard_writer(folder: Path) -> Any | None:
    """Return a writer of event files in `folder`; None if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
