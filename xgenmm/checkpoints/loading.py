"""Loading a checkpoint folder's parameters into a model.

They are in any number of `*.safetensors` files, with or without `model.safetensors.index.json`.
Nothing here uses the network, runs code from a folder, or unpickles.
"""

import io
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import AfterValidator, BaseModel, Field
from safetensors import SafetensorError, safe_open
from torch import nn

from xgenmm.checkpoints.manifest import format_size
from xgenmm.errors import CheckpointError, listed, printable
from xgenmm.files import open_file, read_json
from xgenmm.models import quantization

if TYPE_CHECKING:
    from xgenmm.checkpoints.adapter import Adapter

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
BUFFER_BYTES = 4 * 2**20
READERS = 4
MAX_HEADER_BYTES = 16 << 20  # of a released file: less than 0.2 MB
MAX_DIMENSIONS = 8

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# Checkpoints from training name the temporal encoder by its kind.
_TEMPORAL_ALIAS = re.compile(r"^(vlm\.vision_tokenizer)\.(?:gttm|ttm|tts)\.")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: `size` bytes of `dtype`, `offset` bytes into the file `path`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size: int


def parameter_files(folder: Path) -> list[Path]:
    """Return the folder's safetensors files: those its index names, or all if it has no index.

    Raises CheckpointError if there are none, or if files that the index names are missing.
    """
    listing = _weight_map(folder)
    if listing is None:
        files = sorted(folder.glob("*.safetensors"))
        if files:
            return files
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; pickled files are never read: {listed(pickled)}" if pickled else ""
        raise CheckpointError(f"parameters: {folder} has no *.safetensors file{hint}")
    names = sorted(set(listing.values()))
    missing = [name for name in names if not os.path.lexists(folder / name)]
    if missing:
        raise CheckpointError(
            f"parameters: {folder} lacks {listed(missing)}, listed in {INDEX}; "
            "download the checkpoint again"
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the folder by its released name, in the order of files and offsets.

    Reads the files' headers only. Raises CheckpointError, naming the file, if one is not a regular
    file, is truncated or corrupt, has an unsupported dtype, or contradicts the index or another
    file.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in parameter_files(folder):
        for tensor in read_header(path):
            if tensor.name in tensors:
                other = tensors[tensor.name].path.name
                raise CheckpointError(
                    f"parameters: {path}: {printable(tensor.name)} is also in {other}; remove one "
                    "of the two"
                )
            tensors[tensor.name] = tensor
    listing = _weight_map(folder)
    if listing is not None:
        found = {name: tensor.path.name for name, tensor in tensors.items()}
        names = {**listing, **found}
        wrong = sorted(name for name in names if listing.get(name) != found.get(name))
        if wrong:
            raise CheckpointError(
                f"parameters: {folder / INDEX} and the files disagree on where these are: "
                f"{listed(wrong)}"
            )
    return tensors


def new_buffer(*, pinned: bool = False) -> torch.Tensor:
    """Return a buffer for `read_tensor`; `pinned` makes copies to a GPU faster."""
    return torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned)


def read_tensor(
    tensor: StoredTensor,
    buffer: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Read a tensor through `buffer` into a new one of another dtype on another device.

    Besides the result, this takes no host memory but the buffer. (`safe_open` would read a whole
    tensor at a time, or map the file, whose touched pages count as memory of this process.)
    """
    values = torch.empty(tensor.shape, dtype=dtype, device=device)
    flat, start = values.view(-1), 0
    with tensor.path.open("rb") as file:
        for run in _read_runs(tensor, file, buffer):
            # Moved before the cast: a GPU casts faster than the host.
            flat[start : start + len(run)].copy_(run.to(device))
            start += len(run)
    return values


def _read_runs(
    tensor: StoredTensor, file: io.BufferedReader, buffer: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yield the tensor's values as flat views of `buffer`, each valid until the next."""
    file.seek(tensor.offset)
    window = buffer.numpy().data
    left = tensor.size
    while left:
        count = min(left, len(window))
        if file.readinto(window[:count]) != count:
            raise CheckpointError(f"parameters: {tensor.path} was truncated while it was read")
        yield buffer[:count].view(tensor.dtype)
        left -= count


def load_parameters(
    model: nn.Module,
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize: str | None = None,
    adapter: "Adapter | None" = None,
) -> None:
    """Replace a model's parameters and persistent buffers by those of a checkpoint folder.

    The model, which may be on the meta device, must have the released parameter names. Floating
    point tensors are cast to `dtype` while they are read and moved straight to `device`; peak host
    memory is the result, if it stays on the host, plus about READERS * BUFFER_BYTES. `quantize`, a
    key of `quantization.QUANTIZATIONS`, quantizes the decoder's linear layers while they are read.
    `adapter`, which must be the folder's, is merged first, in float32.

    Raises CheckpointError that lists missing, unexpected, mis-shaped and mis-typed tensors, names
    the truncated or corrupt file, or says that there is too little memory; the model is then
    unchanged.
    """
    stored = stored_tensors(folder)
    wanted = model.state_dict()
    _check_fit(folder, stored, wanted)
    device = torch.device(device)
    _check_memory(stored.values(), device, dtype, quantize)
    logger.info("reading %s", folder)
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(READERS):
        buffers.put(new_buffer(pinned=device.type == "cuda"))

    def read(tensor: StoredTensor) -> dict[str, torch.Tensor]:
        buffer, wanted_dtype = buffers.get(), _target_dtype(tensor, dtype)
        merged = adapter is not None and tensor.name in adapter.names
        try:
            values = read_tensor(tensor, buffer, torch.float32 if merged else wanted_dtype, device)
        finally:
            buffers.put(buffer)
        if adapter is not None and merged:
            values = adapter.merge(tensor.name, values).to(wanted_dtype)
        return quantization.quantized_state(tensor.name, values, quantize)

    state: dict[str, torch.Tensor] = {}
    with ThreadPoolExecutor(READERS) as pool:
        # On an error, leaving `map` cancels the reads that have not started.
        for tensors in pool.map(read, stored.values()):
            state |= tensors
    if quantize is not None:
        quantization.quantize_linear_layers(model, quantize)
    model.load_state_dict(state, assign=True)


def _file_name(name: str) -> str:
    """Refuse the name of a file that is not a safetensors file in the index's folder."""
    if not re.fullmatch(r"[\w. -]{1,200}\.safetensors", name):
        raise ValueError("should be a *.safetensors file beside the index")
    return name


class _Index(BaseModel):
    """An index: which file each tensor is in."""

    weight_map: Annotated[
        dict[str, Annotated[str, AfterValidator(_file_name)]], Field(min_length=1)
    ]


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Return {tensor name: file name} of a folder's index, or None if it has no index."""
    if not os.path.lexists(folder / INDEX):
        return None
    with _file_errors():
        files = read_json(folder / INDEX, _Index).weight_map
    return {_released_name(name): file for name, file in files.items()}


def _released_name(name: str) -> str:
    """Return a tensor's released name; checkpoints from training have others for some."""
    return _TEMPORAL_ALIAS.sub(r"\1.temporal_encoder.", name)


@contextmanager
def _file_errors() -> Iterator[None]:
    """Turn an error that `xgenmm.files` raises into a CheckpointError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise CheckpointError(f"parameters: {error}") from error


def read_header(path: Path) -> list[StoredTensor]:
    """Return a safetensors file's tensors in the order of their offsets.

    The library checks that they fill the file without gaps, so sizes give the offsets.
    """
    with _file_errors(), open_file(path) as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
    try:
        if header_bytes > MAX_HEADER_BYTES:
            raise SafetensorError(f"its header has {header_bytes:,} bytes")
        with safe_open(path, framework="pt", backend="pread") as file:
            names = file.offset_keys()
            slices = [file.get_slice(name) for name in names]
            dtypes = [part.get_dtype() for part in slices]
            shapes = [tuple(part.get_shape()) for part in slices]
        if any(len(shape) > MAX_DIMENSIONS or max(shape, default=0) >= 2**63 for shape in shapes):
            raise SafetensorError("the shape of a tensor is impossible")
    except SafetensorError as error:
        raise CheckpointError(
            f"parameters: {path} is truncated or corrupt ({printable(error)}); delete it and "
            "download it again"
        ) from error
    unsupported = sorted(set(dtypes) - _DTYPES.keys())
    if unsupported:
        raise CheckpointError(
            f"parameters: {path} has tensors of type {listed(unsupported)}; supported are "
            "float32, bfloat16 and float16 checkpoints"
        )
    offset = 8 + header_bytes
    tensors = []
    for name, code, shape in zip(names, dtypes, shapes, strict=True):
        dtype = _DTYPES[code]
        size = math.prod(shape) * dtype.itemsize
        tensors.append(StoredTensor(_released_name(name), path, dtype, shape, offset, size))
        offset += size
    return tensors


def _check_fit(
    folder: Path, stored: Mapping[str, StoredTensor], wanted: Mapping[str, torch.Tensor]
) -> None:
    """Raise one CheckpointError that names all tensors in which folder and model differ."""
    both = sorted(stored.keys() & wanted.keys())
    problems = {
        "missing": [f"{n} {list(wanted[n].shape)}" for n in sorted(wanted.keys() - stored.keys())],
        "unexpected": [
            f"{n} {list(stored[n].shape)}" for n in sorted(stored.keys() - wanted.keys())
        ],
        "mis-shaped": [
            f"{n} {list(stored[n].shape)}, must be {list(wanted[n].shape)}"
            for n in both
            if stored[n].shape != wanted[n].shape
        ],
        "mis-typed": [
            f"{n} {stored[n].dtype}, must be like {wanted[n].dtype}"
            for n in both
            if not _same_kind(stored[n].dtype, wanted[n].dtype)
        ],
    }
    lines = [
        f"\n  {kind} ({len(found)}): {listed(found, '; ')}"
        for kind, found in problems.items()
        if found
    ]
    if lines:
        raise CheckpointError(
            f"parameters: the *.safetensors files of {folder} do not fit the model:{''.join(lines)}"
        )


def _check_memory(
    tensors: Iterable[StoredTensor], device: torch.device, dtype: torch.dtype, quantize: str | None
) -> None:
    """Raise CheckpointError if the parameters as they are loaded exceed the available memory."""
    needed = 0
    for tensor in tensors:
        values = torch.empty(tensor.shape, dtype=_target_dtype(tensor, dtype), device="meta")
        state = quantization.quantized_state(tensor.name, values, quantize)
        needed += sum(part.nbytes for part in state.values())
    available = available_bytes(device)
    if available is not None and needed > available:
        raise CheckpointError(
            f"parameters: they take {format_size(needed)} as {quantize or dtype}, but only "
            f"{format_size(available)} of memory are available on {device}; choose a smaller dtype "
            "or quantize, or use a larger machine"
        )


def _target_dtype(tensor: StoredTensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.dtype.is_floating_point else tensor.dtype


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that can be had on a device, swap included; None if it is unknown."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch holds in reserve counts as available
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes["MemAvailable"] + sizes["SwapFree"]


def _same_kind(stored: torch.dtype, wanted: torch.dtype) -> bool:
    return stored == wanted or (stored.is_floating_point and wanted.is_floating_point)
