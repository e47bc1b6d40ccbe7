"""Loading a checkpoint folder's parameters into a model.

They are in any number of `*.safetensors` files, with or without `model.safetensors.index.json`.
Nothing here uses the network, runs code from a folder, or unpickles.
"""

import io
import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from xgenmm.errors import CheckpointError
from xgenmm.files import read_json_object
from xgenmm.models import quantization

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
BUFFER_BYTES = 4 * 2**20
READERS = 4

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
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if files:
            return files
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; pickled files are never read: {', '.join(pickled)}" if pickled else ""
        raise CheckpointError(f"parameters: {folder} has no *.safetensors file{hint}")
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"parameters: {folder} lacks {', '.join(missing)}, listed in {INDEX}; "
            "download the checkpoint again"
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the folder by name, in the order of files and offsets.

    Reads the files' headers only. Raises CheckpointError, naming the file, if one is truncated or
    corrupt, has an unsupported dtype, or contradicts the index or another file.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in parameter_files(folder):
        for tensor in _read_header(path):
            if tensor.name in tensors:
                other = tensors[tensor.name].path.name
                raise CheckpointError(
                    f"parameters: {path}: {tensor.name} is also in {other}; remove one of the two"
                )
            tensors[tensor.name] = tensor
    index = folder / INDEX
    if index.is_file():
        found = {name: tensor.path.name for name, tensor in tensors.items()}
        listed = _weight_map(index)
        wrong = sorted(name for name in {**listed, **found} if listed.get(name) != found.get(name))
        if wrong:
            raise CheckpointError(
                f"parameters: {index} and the files disagree on where these are: {', '.join(wrong)}"
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
) -> None:
    """Replace a model's parameters and persistent buffers by those of a checkpoint folder.

    The model, which may be on the meta device, must have the released parameter names. Floating
    point tensors are cast to `dtype` while they are read and moved straight to `device`; peak host
    memory is the result, if it stays on the host, plus about READERS * BUFFER_BYTES. `quantize`, a
    key of `quantization.QUANTIZATIONS`, quantizes the decoder's linear layers while they are read.

    Raises CheckpointError that names every missing, unexpected, mis-shaped and mis-typed tensor, or
    the truncated or corrupt file; the model is then unchanged.
    """
    stored = stored_tensors(folder)
    wanted = model.state_dict()
    _check_fit(folder, stored, wanted)
    device = torch.device(device)
    logger.info("reading %s", folder)
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(READERS):
        buffers.put(new_buffer(pinned=device.type == "cuda"))

    def read(tensor: StoredTensor) -> dict[str, torch.Tensor]:
        target = dtype if tensor.dtype.is_floating_point else tensor.dtype
        buffer = buffers.get()
        try:
            values = read_tensor(tensor, buffer, target, device)
        finally:
            buffers.put(buffer)
        return quantization.quantized_state(tensor.name, values, quantize)

    state: dict[str, torch.Tensor] = {}
    with ThreadPoolExecutor(READERS) as pool:
        # On an error, leaving `map` cancels the reads that have not started.
        for tensors in pool.map(read, stored.values()):
            state |= tensors
    if quantize is not None:
        quantization.quantize_linear_layers(model, quantize)
    model.load_state_dict(state, assign=True)


def _weight_map(index: Path) -> dict[str, str]:
    """Return {tensor name: file name} of an index file; file names must be in the same folder."""
    try:
        files = read_json_object(index)["weight_map"]
        names = set(files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"parameters: {index} is not an index (JSON with a weight_map): {error!r}"
        ) from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"parameters: {index} names {name!r}; only *.safetensors files beside it are read"
            )
    return dict(files)


def _read_header(path: Path) -> list[StoredTensor]:
    """Return a safetensors file's tensors in the order of their offsets.

    The library checks that they fill the file without gaps, so sizes give the offsets.
    """
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            names = file.offset_keys()
            slices = [file.get_slice(name) for name in names]
            dtypes = [part.get_dtype() for part in slices]
            shapes = [tuple(part.get_shape()) for part in slices]
    except SafetensorError as error:
        raise CheckpointError(
            f"parameters: {path} is truncated or corrupt ({error}); delete it and download it again"
        ) from error
    unsupported = sorted(set(dtypes) - _DTYPES.keys())
    if unsupported:
        raise CheckpointError(
            f"parameters: {path} has tensors of type {', '.join(unsupported)}; supported are "
            "float32, bfloat16 and float16 checkpoints"
        )
    with path.open("rb") as opened:
        offset = 8 + int.from_bytes(opened.read(8), "little")  # after the header and its length
    tensors = []
    for name, code, shape in zip(names, dtypes, shapes, strict=True):
        dtype = _DTYPES[code]
        size = math.prod(shape) * dtype.itemsize
        tensors.append(StoredTensor(name, path, dtype, shape, offset, size))
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
        f"\n  {kind} ({len(found)}): {'; '.join(found)}"
        for kind, found in problems.items()
        if found
    ]
    if lines:
        raise CheckpointError(f"parameters: {folder} does not fit the model:{''.join(lines)}")


def _same_kind(stored: torch.dtype, wanted: torch.dtype) -> bool:
    return stored == wanted or (stored.is_floating_point and wanted.is_floating_point)
