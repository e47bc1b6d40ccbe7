"""Make and measure the video demo, `weights/demo-video`.

    python -m scripts.demo_video train      # from weights/demo; resumes from build/train-demo-video
    python -m scripts.demo_video evaluate   # the table of weights/demo-video/README.md
    python -m scripts.demo_video curves     # the plot of losses and accuracies
    python -m scripts.demo_video examples   # the example clips and questions

The world is that of `scripts.demo_model`, in motion: `clip`, `sampling` and `questions`. The recipe
of the training is in `stages`.
"""

import argparse
import logging
from pathlib import Path

from scripts.demo_model.curves import plot_curves
from scripts.demo_video.checkpoint import DEMO_VIDEO
from scripts.demo_video.evaluate import evaluate
from scripts.demo_video.examples import write_examples
from scripts.demo_video.train import train

STATE = DEMO_VIDEO.parents[1] / "build" / "train-demo-video"


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo_video",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("train", "evaluate", "curves", "examples"))
    parser.add_argument(
        "--folder", type=Path, default=DEMO_VIDEO, help="checkpoint folder (weights/demo-video)"
    )
    parser.add_argument(
        "--state", type=Path, default=STATE, help="state of the training (build/train-demo-video)"
    )
    parser.add_argument(
        "--clips", type=int, default=300, help="clips to evaluate on (default: 300)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "train":
        train(arguments.folder, arguments.state)
    elif arguments.command == "evaluate":
        evaluate(arguments.folder, arguments.clips)
    elif arguments.command == "curves":
        plot_curves(arguments.folder, arguments.state)
    else:
        write_examples(arguments.folder)


if __name__ == "__main__":
    main()
