"""Teach the demo to answer in Italian, and measure it.

python -m scripts.demo_finetune make FOLDER         # 500 images and data.jsonl
xgenmm finetune demo FOLDER/data.jsonl -o OUTPUT ... # see weights/demo/README.md
python -m scripts.demo_finetune evaluate OUTPUT/adapter
"""

import argparse
import logging
from pathlib import Path

from scripts.demo_finetune.dataset import write_dataset
from scripts.demo_finetune.evaluate import evaluate


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo_finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write the images and questions")
    make.add_argument("folder", type=Path, metavar="FOLDER")
    measure = commands.add_parser("evaluate", help="print the accuracy without and with an adapter")
    measure.add_argument("adapter", type=Path, metavar="ADAPTER")
    measure.add_argument(
        "--scenes", type=int, default=500, help="for each of both languages (default: 500)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "make":
        write_dataset(arguments.folder)
    else:
        evaluate(arguments.adapter, arguments.scenes)


if __name__ == "__main__":
    main()
