"""Make and measure the demo checkpoint, `weights/demo`.

    python -m scripts.demo_model train      # from scratch; resumes from build/train-demo
    python -m scripts.demo_model evaluate   # the table of weights/demo/README.md
    python -m scripts.demo_model curves     # the plot of losses and accuracies
    python -m scripts.demo_model examples   # the example images and questions
    python -m scripts.demo_model lmms-eval  # the evaluation set as tasks of lmms-eval

The world is in `scene`, `sampling`, `drawing`, `questions` and `pairs`, and knows nothing of models
and tokens. The recipe of the training is in `stages`.
"""

import argparse
import logging
from pathlib import Path

from scripts.demo_model.checkpoint import DEMO
from scripts.demo_model.curves import plot_curves
from scripts.demo_model.evaluate import evaluate
from scripts.demo_model.examples import write_examples
from scripts.demo_model.lmms_eval_tasks import write_tasks
from scripts.demo_model.stages import STAGES
from scripts.demo_model.train import train

STATE = DEMO.parents[1] / "build" / "train-demo"
TASKS = DEMO.parents[1] / "build" / "lmms-eval"


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("train", "evaluate", "curves", "examples", "lmms-eval"))
    parser.add_argument(
        "--folder", type=Path, default=DEMO, help="checkpoint folder (default: weights/demo)"
    )
    parser.add_argument(
        "--state", type=Path, default=STATE, help="state of the training (build/train-demo)"
    )
    parser.add_argument(
        "--scenes", type=int, default=500, help="scenes to evaluate on (default: 500)"
    )
    parser.add_argument(
        "--tasks", type=Path, default=TASKS, help="folder of lmms-eval's tasks (build/lmms-eval)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "train":
        train(arguments.folder, arguments.state, STAGES)
    elif arguments.command == "evaluate":
        evaluate(arguments.folder, arguments.scenes)
    elif arguments.command == "curves":
        plot_curves(arguments.folder, arguments.state)
    elif arguments.command == "lmms-eval":
        write_tasks(arguments.folder, arguments.tasks, arguments.scenes)
    else:
        write_examples(arguments.folder)


if __name__ == "__main__":
    main()
