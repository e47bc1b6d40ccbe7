"""The known checkpoints by name, their folders on this machine, and their configurations.

Needs neither the network nor PyTorch.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from xgenmm.checkpoints.config_json import ConfigError, from_json
from xgenmm.config import VIDEO_32, VIDEO_128, XGenMMConfig
from xgenmm.errors import CheckpointError, printable
from xgenmm.files import read_json_object

CHECKOUT_WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
TEMPORAL_ENCODER = "vlm.vision_tokenizer.temporal_encoder."
MEMORY_UNIT = f"{TEMPORAL_ENCODER}ttm_unit."
CONVERTED = "-bf16"  # suffix of the folders that `xgenmm convert` writes


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
RepositoryId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]


@dataclass(frozen=True)
class FileRecord:
    """Expected contents of a checkpoint file: `size` in bytes, `sha256` in hexadecimal."""

    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


@dataclass(frozen=True)
class Release:
    """A known checkpoint.

    Attributes:
        name: the folder's name and the usual way to refer to it.
        repos: the hub repositories that publish it, the preferred one first; none for the demo,
            which is part of this repository.
        license: SPDX identifier of the weights' license.
        description: one line for `xgenmm list`.
        parameters: their number; None if unknown.
        files: records of files whose size and digest are known beforehand.
    """

    name: str
    repos: tuple[str, ...]
    license: str
    description: str
    parameters: int | None
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """All names that `find_release` accepts: its own and the repositories', with and without
        their owner."""
        return {self.name, *self.repos, *(repo.split("/")[-1] for repo in self.repos)}


def releases() -> dict[str, Release]:
    """Return the known checkpoints by name, from `releases.json` beside this module."""
    path = Path(__file__).with_name("releases.json")
    records = read_json_object(path)
    return {
        name: Release(
            name=name,
            repos=tuple(record["repos"]),
            license=record["license"],
            description=record["description"],
            parameters=record["parameters"],
            files={file: FileRecord(**known) for file, known in record["files"].items()},
        )
        for name, record in records.items()
    }


def find_release(name: str) -> Release:
    """Return the release with this name or alias; CheckpointError if there is none."""
    known = releases()
    for release in known.values():
        if name in release.names:
            return release
    raise CheckpointError(
        f"model: {printable(name)!r} is neither a folder nor a known checkpoint; known are "
        f"{', '.join(known)}"
    )


def weights_folder() -> Path:
    """Return the folder for downloads.

    XGENMM_HOME if it is set, else `weights` of the checkout that this module belongs to, else
    `xgenmm` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache).
    """
    chosen = os.environ.get("XGENMM_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if CHECKOUT_WEIGHTS.is_dir():
        return CHECKOUT_WEIGHTS
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "xgenmm"


def search_folders() -> list[Path]:
    """Return the folders to search for checkpoints, in order."""
    checkout = [CHECKOUT_WEIGHTS] if CHECKOUT_WEIGHTS.is_dir() else []
    return list(dict.fromkeys([weights_folder(), *checkout]))


def folders_on_disk(release: Release) -> list[Path]:
    """Return the release's complete folders, the preferred one first: converted, then original."""
    names = (f"{release.name}{CONVERTED}", release.name)
    found = (root / name for root in search_folders() for name in names)
    return [folder for folder in found if folder.is_dir()]


def resolve(name_or_folder: str | os.PathLike[str]) -> Path:
    """Return the folder of a checkpoint; an existing folder takes precedence over a name.

    Raises CheckpointError, without using the network, if there is no such checkpoint here; the
    message names the folders that were searched and the command that downloads it.
    """
    folder = Path(name_or_folder).expanduser()
    with suppress(OSError):  # no name of a file is that long
        if folder.is_dir():
            return folder
    release = find_release(os.fspath(name_or_folder))
    found = folders_on_disk(release)
    if found:
        return found[0]
    looked = f"{release.name} is not in {' or '.join(map(str, search_folders()))}"
    if not release.repos:
        raise CheckpointError(
            f"model: {looked}. It is part of the repository, not of the installed package: clone "
            f"the repository, then pass the path of its weights/{release.name} or set XGENMM_HOME "
            "to its weights folder"
        )
    raise CheckpointError(f"model: {looked}; download it with: xgenmm download {release.name}")


def read_config(folder: Path) -> XGenMMConfig:
    """Return the configuration of a checkpoint folder.

    If the folder has the name of a known checkpoint, that release supplies what its files do not
    state. Otherwise the names of its tensors, if it has any, tell a video model from an image
    model.

    Raises CheckpointError if a JSON file is missing or broken, is of another model, or has a value
    that is impossible or contradicts another, or if a parameter file is corrupt.
    """
    name = folder.resolve().name.removesuffix(CONVERTED)
    release = next((r.name for r in releases().values() if name in r.names), None)
    config = _read_object(folder / "config.json")
    preprocessor = _read_object(folder / "preprocessor_config.json")
    if release is None and any(folder.glob("*.safetensors")):
        release = _video_release(folder)
    try:
        return from_json(config, preprocessor, release)
    except ConfigError as error:
        raise CheckpointError(f"model: {folder}: {error}") from error


def _video_release(folder: Path) -> str | None:
    """Return the video release that a folder's tensors are named like; None for other models."""
    # Needs PyTorch, which takes seconds to import; the rest of this module does not.
    from xgenmm.checkpoints.loading import stored_tensors

    names = [name for name in stored_tensors(folder) if name.startswith(TEMPORAL_ENCODER)]
    if any(name.startswith(MEMORY_UNIT) for name in names):
        return VIDEO_128
    return VIDEO_32 if names else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"model: {path.parent} is not a checkpoint: it has no {path.name}"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model: {error}") from error
