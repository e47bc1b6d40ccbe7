"""Plot a training run."""

import json
from collections import defaultdict
from pathlib import Path


def plot_curves(folder: Path, state: Path) -> None:
    """Plot losses and accuracies over the training time as `training.png` in `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    history = json.loads((state / "history.json").read_text())
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True)
    for axes, key in ((upper, "loss"), (lower, "right")):
        lines: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for entry in history:
            for name, value in entry[key].items():
                lines[name][0].append(entry["seconds"] / 60)
                lines[name][1].append(value)
        for name, (minutes, values) in lines.items():
            axes.plot(minutes, values, label=name, linewidth=1.2)
        axes.legend(loc="best", fontsize=8, ncols=2)
        axes.grid(alpha=0.3)
    starts = {entry["stage"]: entry["seconds"] / 60 for entry in reversed(history)}
    for stage, start in starts.items():
        for axes in (upper, lower):
            axes.axvline(start, color="grey", linestyle=":", linewidth=0.8)
        upper.text(
            start, 1.02, stage, transform=upper.get_xaxis_transform(), fontsize=8, rotation=45
        )
    upper.set_ylabel("training loss")
    upper.set_yscale("log")
    lower.set_ylabel("share of right answers")
    lower.set_ylim(0, 1)
    lower.set_xlabel("minutes of training")
    figure.tight_layout()
    figure.savefig(folder / "training.png", dpi=80)
