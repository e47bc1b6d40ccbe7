"""Checkpoints by name: those that this project knows, their folders on this disk, their sizes.

Nothing here touches the network, and nothing needs PyTorch.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xgenmm.config import ConfigError, XGenMMConfig, from_json
from xgenmm.errors import CheckpointError

REPOSITORY_WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


@dataclass(frozen=True)
class FileRecord:
    """What one file of a checkpoint must be: `size` in bytes, `sha256` in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Release:
    """One checkpoint that this project knows by name.

    `repos` are the hub repositories that publish it, the preferred one first, and none for what is
    shipped with the code. `parameters` is None where nobody counted; `files` holds the files of
    which a record exists.
    """

    name: str
    repos: tuple[str, ...]
    licence: str
    description: str
    parameters: int | None
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Everything a person may call it: the name, the repositories, with and without owner."""
        return {self.name, *self.repos, *(repo.split("/")[-1] for repo in self.repos)}


def releases() -> dict[str, Release]:
    """Return the known checkpoints by name, from `releases.json` beside this module."""
    path = Path(__file__).with_name("releases.json")
    records = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Release(
            name=name,
            repos=tuple(record["repos"]),
            licence=record["licence"],
            description=record["description"],
            parameters=record["parameters"],
            files={file: FileRecord(**known) for file, known in record["files"].items()},
        )
        for name, record in records.items()
    }


def find_release(name: str) -> Release:
    """Return the release called `name` (or one of its aliases); CheckpointError otherwise."""
    known = releases()
    for release in known.values():
        if name in release.names:
            return release
    raise CheckpointError(
        f"model: {name!r} is neither a folder nor a known checkpoint; known are {', '.join(known)}"
    )


def weights_folder() -> Path:
    """Return where checkpoints are kept.

    The environment variable XGENMM_WEIGHTS if it is set, else the repository's `weights`, else
    `~/.cache/xgenmm` for an installed package.
    """
    chosen = os.environ.get("XGENMM_WEIGHTS")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if REPOSITORY_WEIGHTS.is_dir():
        return REPOSITORY_WEIGHTS
    return Path.home() / ".cache" / "xgenmm"


def folders_on_disk(release: Release) -> list[Path]:
    """Return the release's complete folders, the one to load first: converted, then as released."""
    roots = dict.fromkeys((weights_folder(), REPOSITORY_WEIGHTS))
    names = (f"{release.name}-bf16", release.name)
    return [root / name for root in roots for name in names if (root / name).is_dir()]


def resolve(name_or_folder: str | os.PathLike[str]) -> Path:
    """Return the checkpoint folder that a person means; a folder that exists wins over a name.

    Raises CheckpointError at once, without the network, if it is not on this disk; the message
    says what to type.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    release = find_release(os.fspath(name_or_folder))
    found = folders_on_disk(release)
    if found:
        return found[0]
    if not release.repos:
        raise CheckpointError(
            f"model: {release.name} is shipped with the code, but {REPOSITORY_WEIGHTS} lacks it; "
            f"bring it back with: git checkout weights/{release.name}"
        )
    raise CheckpointError(
        f"model: {release.name} is not on this disk (looked in {weights_folder()}); "
        f"get it with: python -m xgenmm.checkpoints.download download {release.name}"
    )


def read_config(folder: Path) -> XGenMMConfig:
    """Return the configuration of a checkpoint folder.

    The folder's name, if it is a known checkpoint's, fills what the released files leave open.
    Raises CheckpointError if `config.json` is missing, broken, or of another model.
    """
    name = folder.resolve().name.removesuffix("-bf16")
    release = next((r.name for r in releases().values() if name in r.names), None)
    config = _read_object(folder / "config.json")
    preprocessor = _read_object(folder / "preprocessor_config.json")
    try:
        return from_json(config, preprocessor, release)
    except ConfigError as error:
        raise CheckpointError(f"model: {folder}: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; CheckpointError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"model: {path.parent} is no checkpoint: it lacks {path.name}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"model: {path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"model: {path} holds {type(content).__name__}, not an object")
    return content
