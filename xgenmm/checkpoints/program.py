"""The commands `xgenmm list`, `download`, `convert` and `verify`."""

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from xgenmm.checkpoints.manifest import format_size, verify
from xgenmm.checkpoints.registry import (
    FileRecord,
    find_release,
    folders_on_disk,
    releases,
    resolve,
    weights_folder,
)
from xgenmm.checkpoints.staging import PARTIAL

EXAMPLE = "xgen-mm-phi3-mini-instruct-interleave-r-v1.5"


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `xgenmm list`, which has no arguments."""
    parser.description = """\
Show the known checkpoints: license, number of parameters, and what is on this disk. The folders
searched are XGENMM_HOME, if it is set, and weights/ of the checkout; without either, the user's
cache folder.

    xgenmm list
    XGENMM_HOME=/data/weights xgenmm list
"""


def add_download_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `xgenmm download` and add its arguments."""
    parser.description = f"""\
Download a checkpoint from the Hugging Face hub and verify every file. An interrupted download is
resumed by the same command. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honored.

    xgenmm download {EXAMPLE}
"""
    parser.add_argument("name", metavar="NAME", help="a name that `xgenmm list` shows")


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `xgenmm convert` and add its arguments."""
    parser.description = f"""\
Write a checkpoint in bfloat16 beside it, as NAME-bf16: half the size of float32, and faster to
load. From then on, NAME-bf16 is loaded instead of NAME. An interrupted conversion is resumed by the
same command.

    xgenmm convert {EXAMPLE}
"""
    _add_name(parser)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `xgenmm verify` and add its arguments."""
    parser.description = """\
Check size and sha256 of every file of a checkpoint against its manifest.

    xgenmm verify demo
"""
    _add_name(parser)


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME|FOLDER", help="a checkpoint on this disk")


def _log_to_stdout() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("xgenmm.checkpoints").setLevel(logging.INFO)


def run_list(options: argparse.Namespace) -> int:
    """Run `xgenmm list`."""
    known = releases()
    width = max(map(len, known)) + 2
    print(f"{'name':<{width}}{'license':<15}{'parameters':<13}on this disk")
    for release in known.values():
        count = f"{release.parameters / 1e9:.2f} billion" if release.parameters else "-"
        found = [f"{path.name} ({_folder_size(path)})" for path in folders_on_disk(release)]
        found += [
            f"{path.name} (unfinished, {_folder_size(path)})"
            for path in sorted(weights_folder().glob(f"{release.name}*{PARTIAL}"))
        ]
        print(f"{release.name:<{width}}{release.license:<15}{count:<13}{', '.join(found) or '-'}")
        print(f"    {release.description}")
    print(f"downloads go to {weights_folder()} (set XGENMM_HOME to use another folder)")
    return 0


# Imports within functions: the hub's client and PyTorch would delay the other commands.


def run_download(options: argparse.Namespace) -> int:
    """Run `xgenmm download`."""
    from xgenmm.checkpoints.download import download

    _log_to_stdout()
    download(find_release(options.name), weights_folder())
    return 0


def run_convert(options: argparse.Namespace) -> int:
    """Run `xgenmm convert`."""
    _log_to_stdout()
    source = _original_folder(options.name)
    from xgenmm.checkpoints.convert import convert

    convert(source)
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Run `xgenmm verify`, for all folders of a name."""
    _log_to_stdout()
    folders = [resolve(options.name)]
    if not Path(options.name).is_dir():
        folders = folders_on_disk(find_release(options.name))
    passed = [verify(folder, _known_records(folder)) for folder in folders]
    return 0 if all(passed) else 1


def _original_folder(name: str) -> Path:
    """Return the folder to convert: an existing one, or the one a release was downloaded to."""
    if Path(name).is_dir():
        return Path(name)
    release = find_release(name)
    originals = [path for path in folders_on_disk(release) if path.name == release.name]
    return originals[0] if originals else resolve(name)


def _known_records(folder: Path) -> Mapping[str, FileRecord]:
    """Return the records in releases.json of a folder with a release's name."""
    release = releases().get(folder.resolve().name)
    return release.files if release else {}


def _folder_size(folder: Path) -> str:
    return format_size(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))
