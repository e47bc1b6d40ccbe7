"""Adapters as files: what peft writes, in a folder or in a tar that a stranger made.

Of a tar only the two files of an adapter are read; nothing else of it reaches the disk.
"""

import gzip
import io
import math
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Annotated, Literal

from pydantic import BaseModel, Field

from xgenmm.errors import CheckpointError, printable
from xgenmm.files import MAX_BYTES, TarReader, is_plain, open_file, read_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_TAR_BYTES = 4 << 30
"""Of a tar, decompressed. Rank 256 and the whole resampler take 2.1 GB in float32."""

MAX_MEMBERS = 1000
_PIECE = 1 << 20
_GZIP = b"\x1f\x8b"

# These change nothing about what is added to the weights. Whatever else is in the file, of this
# version of peft or a later one, must be off.
_WITHOUT_EFFECT = frozenset(
    {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules"}
    | {"exclude_modules", "lora_dropout", "modules_to_save", "layers_to_transform"}
    | {"layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config"}
    | {"lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
)
# Other values change the base's weights too, so the adapter does not fit the original ones.
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")


class AdapterConfig(BaseModel, strict=True, extra="allow"):
    """What is read of `adapter_config.json`."""

    peft_type: Literal["LORA"] = "LORA"
    base_model_name_or_path: str | None = None
    r: Annotated[int, Field(ge=1)] | None = None
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)] | None = None
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    init_lora_weights: bool | str = True

    @property
    def scale(self) -> float:
        """The factor of LoRA's product. Raises ValueError if the file does not state it."""
        if self.r is None or self.lora_alpha is None:
            raise ValueError(f"{CONFIG_FILE}: r or lora_alpha is missing")
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read an adapter's configuration.

    Raises OSError or ValueError, as `read_json` does, and ValueError for a feature of peft that
    `Adapter` does not have.
    """
    path = folder / CONFIG_FILE
    config = read_json(path, AdapterConfig)
    features = {
        name: value
        for name, value in (config.model_extra or {}).items()
        if name not in _WITHOUT_EFFECT and value not in (None, False, "", [], {})
    }
    if config.init_lora_weights not in _INITIALIZATIONS:
        features["init_lora_weights"] = config.init_lora_weights
    for name, value in features.items():
        raise ValueError(
            f"{path}: {printable(name)} is {printable(value)}, which is not supported; only plain "
            "LoRA is: leave it off, or merge the adapter with peft"
        )
    return config


@contextmanager
def adapter_folder(path: Path) -> Iterator[Path]:
    """Yield the folder of an adapter that is a folder, a tar or a tar.gz.

    That of a tar is temporary; its adapter is at the top or in the folder there. Turns OSError and
    ValueError, also of the block, into a CheckpointError that names the adapter.
    """
    with TemporaryDirectory(prefix="xgenmm-") as temporary:
        try:
            folder = path
            if not path.is_dir():
                folder = Path(temporary)
                _unpack(path, folder)
            _check_complete(folder)
            yield folder
        except (OSError, ValueError) as error:
            message = str(error).replace(temporary, str(path)).removeprefix("parameters: ")
            raise CheckpointError(f"adapter: {message}") from error


def _check_complete(folder: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not os.path.lexists(folder / name):
            pickled = (folder / "adapter_model.bin").exists()
            hint = "; pickled files are never read: save it as safetensors" if pickled else ""
            raise ValueError(f"{folder} is not an adapter: it has no {name}{hint}")


def _unpack(path: Path, folder: Path) -> None:
    """Write the two files of a tar's adapter into an empty folder.

    Raises OSError or ValueError that names the tar.
    """
    with open_file(path) as file:
        compressed = file.peek(len(_GZIP)).startswith(_GZIP)
    tar = folder / "tar" if compressed else path
    try:
        if compressed:
            with gzip.open(path) as source:
                if _copy(source, tar, MAX_TAR_BYTES + 1) > MAX_TAR_BYTES:
                    raise ValueError(f"it has more than {MAX_TAR_BYTES:,} bytes")
        with TarReader(io.FileIO(tar)) as reader:
            members = _find(reader)
        for name, member in members.items():
            with tar.open("rb") as content:
                content.seek(member.offset_data)
                if _copy(content, folder / name, member.size) < member.size:
                    raise ValueError("it is cut short")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # tarfile raises many kinds on damaged headers
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        reason = printable(error)
        raise ValueError(f"{path} is damaged, or neither a folder nor a tar ({reason})") from error
    if compressed:
        tar.unlink()


def _find(reader: TarReader) -> dict[str, tarfile.TarInfo]:
    """Return the members of a tar that are an adapter's files, by their names.

    Raises ValueError if they are not there once, in one place, as plain files of a possible size.
    """
    found: dict[str, list[tarfile.TarInfo]] = {CONFIG_FILE: [], WEIGHTS_FILE: []}
    for number, member in enumerate(reader.members()):
        if number == MAX_MEMBERS:
            raise ValueError(f"it has more than {MAX_MEMBERS} files")
        place = PurePosixPath(member.name)
        if len(place.parts) <= 2 and place.name in found:
            found[place.name].append(member)
    for name, members in found.items():
        if len(members) != 1:
            problem = f"more than one {name}" if members else f"no {name}"
            raise ValueError(f"it has {problem} at its top or in the folder there")
    files = {name: members[0] for name, members in found.items()}
    for name, member in files.items():
        limit = MAX_BYTES if name == CONFIG_FILE else MAX_TAR_BYTES
        if not is_plain(member):
            raise ValueError(f"{name} is a link, sparse or not a file")
        if member.size > limit:
            raise ValueError(f"{name} has {member.size:,} bytes, more than {limit:,}")
    if len({PurePosixPath(member.name).parent for member in files.values()}) != 1:
        raise ValueError(f"{CONFIG_FILE} and {WEIGHTS_FILE} are not in the same folder")
    return files


def _copy(source: IO[bytes] | gzip.GzipFile, target: Path, size: int) -> int:
    """Copy at most `size` bytes into a new file; return how many there were."""
    copied = 0
    with target.open("xb") as file:
        while piece := source.read(min(_PIECE, size - copied)):
            copied += file.write(piece)
    return copied
