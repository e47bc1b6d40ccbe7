"""A checkpoint: from its folder into a model.

A checkpoint folder holds `config.json`, parameters in any number of `*.safetensors` files (with or
without `model.safetensors.index.json`), and the tokenizer's and the preprocessor's files. Nothing
here touches the network, runs code from a folder, or unpickles.
"""

import io
import json
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from xgenmm.errors import CheckpointError
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
    """Where one tensor lies: `size` bytes of `dtype`, `offset` bytes into the file `path`."""

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
        raise CheckpointError(f"parameters: {folder} holds no *.safetensors file{hint}")
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"parameters: {folder} lacks {', '.join(missing)}, which {INDEX} names; "
            "download the checkpoint again"
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the folder by name, in the order in which it lies on disk.

    Reads the files' headers only. Raises CheckpointError, naming the file, if one is cut or
    corrupt, holds a type that cannot be read, or disagrees with its index or with another file.
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
        places = {name: tensor.path.name for name, tensor in tensors.items()}
        promised = _weight_map(index)
        wrong = sorted(
            name for name in {**promised, **places} if promised.get(name) != places.get(name)
        )
        if wrong:
            raise CheckpointError(
                f"parameters: {index} and the files disagree on where these are: {', '.join(wrong)}"
            )
    return tensors


def read_chunks(
    tensor: StoredTensor, file: io.BufferedReader, buffer: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yield the tensor's values as flat runs in order, read through `buffer` (uint8).

    Each run is a view of `buffer`, good until the next one is taken. `file` is `tensor.path`, open.
    """
    file.seek(tensor.offset)
    window = buffer.numpy().data
    left = tensor.size
    while left:
        count = min(left, len(window))
        # Not memory-mapped: touched pages of a mapped 17 GB file count as this process's memory.
        if file.readinto(window[:count]) != count:
            raise CheckpointError(f"parameters: {tensor.path} was cut while it was read")
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
    """Replace the model's parameters and persistent buffers by those of a checkpoint folder.

    The model may be built on the meta device and must carry the released names. Whatever is
    floating is cast to `dtype` while it is read and moved straight to `device`, several tensors at
    a time; peak host memory is the result (if it stays on the host) and READERS * BUFFER_BYTES or
    so. Buffers that are not persistent are left as they are. `quantize`, a kind of
    `quantization.QUANTIZATIONS`, makes the decoder's linear layers quantised ones, each as it
    is read.

    Raises CheckpointError that names every missing, unexpected, mis-shaped and mis-typed tensor, or
    the file that is cut or corrupt; the model is then unchanged.
    """
    stored = stored_tensors(folder)
    wanted = model.state_dict()
    _check_fit(folder, stored, wanted)
    device = torch.device(device)
    logger.info("reading %s", folder)
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(READERS):
        pinned = device.type == "cuda"
        buffers.put(torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned))

    def read(tensor: StoredTensor) -> dict[str, torch.Tensor]:
        kept = dtype if tensor.dtype.is_floating_point else tensor.dtype
        values = torch.empty(tensor.shape, dtype=kept, device=device)
        flat, start = values.view(-1), 0
        buffer = buffers.get()
        try:
            with tensor.path.open("rb") as file:
                for run in read_chunks(tensor, file, buffer):
                    # Moved before it is cast: a GPU casts faster than the host.
                    flat[start : start + len(run)].copy_(run.to(device))
                    start += len(run)
        finally:
            buffers.put(buffer)
        return quantization.quantized_state(tensor.name, values, quantize)

    state: dict[str, torch.Tensor] = {}
    with ThreadPoolExecutor(READERS) as pool:
        # Leaving `map` early, on an error, cancels what has not begun.
        for tensors in pool.map(read, stored.values()):
            state |= tensors
    if quantize is not None:
        quantization.quantize_linear_layers(model, quantize)
    model.load_state_dict(state, assign=True)


def _weight_map(index: Path) -> dict[str, str]:
    """Return {tensor name: file name} of an index file; file names stay inside the folder."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(places.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"parameters: {index} is not an index (JSON with a weight_map): {error!r}"
        ) from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"parameters: {index} names {name!r}; only *.safetensors beside it are read"
            )
    return dict(places)


def _read_header(path: Path) -> list[StoredTensor]:
    """Return one file's tensors, sorted by offset."""
    try:
        # The library checks that the header is sound and covers the file to its last byte.
        with safe_open(path, framework="pt", backend="pread"):
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"parameters: {path} is cut or corrupt ({error}); delete it and get it again"
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    strange = sorted({entry["dtype"] for entry in header.values()} - _DTYPES.keys())
    if strange:
        raise CheckpointError(
            f"parameters: {path} holds numbers of type {', '.join(strange)}; "
            "float32, bfloat16 and float16 checkpoints can be read"
        )
    tensors = [
        StoredTensor(
            name=name,
            path=path,
            dtype=_DTYPES[entry["dtype"]],
            shape=tuple(entry["shape"]),
            offset=8 + length + entry["data_offsets"][0],
            size=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    ]
    return sorted(tensors, key=lambda tensor: tensor.offset)


def _check_fit(
    folder: Path, stored: Mapping[str, StoredTensor], wanted: Mapping[str, torch.Tensor]
) -> None:
    """Raise one CheckpointError that names all tensors by which folder and model differ."""
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
