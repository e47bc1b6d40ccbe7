"""The command `xgenmm`, also `python -m xgenmm`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from xgenmm.errors import CheckpointError


class Command(NamedTuple):
    """A sub-command: its line in `xgenmm --help`, and where its two functions are.

    `add_arguments` (argument parser -> None) adds its arguments, and may describe it instead of the
    module's DESCRIPTION; `run` (parsed arguments -> exit status) runs it.
    """

    help: str
    module: str
    add_arguments: str = "add_arguments"
    run: str = "run"


CHECKPOINTS = "xgenmm.checkpoints.program"
COMMANDS = {
    "list": Command(
        "show the known checkpoints and what is on this disk",
        *(CHECKPOINTS, "add_list_arguments", "run_list"),
    ),
    "download": Command(
        "download a checkpoint from the Hugging Face hub",
        *(CHECKPOINTS, "add_download_arguments", "run_download"),
    ),
    "convert": Command(
        "write a checkpoint in bfloat16: half the size, faster to load",
        *(CHECKPOINTS, "add_convert_arguments", "run_convert"),
    ),
    "verify": Command(
        "check the size and sha256 of a checkpoint's files",
        *(CHECKPOINTS, "add_verify_arguments", "run_verify"),
    ),
    "doctor": Command("check that this machine computes right and fast", "xgenmm.doctor"),
    "caption": Command("ask questions about every image of a dataset", "xgenmm.captioning.program"),
    "finetune": Command(
        "train a checkpoint on your own images and answers", "xgenmm.finetuning.program"
    ),
    "merge": Command(
        "write a whole checkpoint from an adapter",
        *("xgenmm.finetuning.program", "add_merge_arguments", "run_merge"),
    ),
    "parity": Command(
        "compare this implementation with golden data of the original", "xgenmm.evaluation.parity"
    ),
    "scores": Command(
        "compare results of lmms-eval with the published ones", "xgenmm.evaluation.scores"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `xgenmm` with these arguments (the process's by default); return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="xgenmm",
        description="xGen-MM (BLIP-3): ask questions about images.",
        epilog="example: xgenmm list\n`xgenmm COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=command.help, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in arguments[:1]:  # import what this command needs and nothing else
            module = import_module(command.module)
            getattr(module, command.add_arguments)(subparser)
            subparser.description = subparser.description or module.DESCRIPTION
            subparser.set_defaults(run=getattr(module, command.run))
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (CheckpointError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command resumes\n")
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
