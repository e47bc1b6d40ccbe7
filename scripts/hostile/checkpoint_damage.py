"""Ways to damage a checkpoint folder, and the tiny checkpoints that are damaged."""

import json
import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.tiny import checkpoint

Damage = Callable[[Path], object]

LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@dataclass(frozen=True)
class Case:
    """One hostile folder.

    group: class of attack, for the table.
    words: what the error must contain; empty if the folder is in order and must answer.
    base: whether the checkpoint is a base model, which reads `tokenizer.json`.
    """

    group: str
    name: str
    damage: Damage
    words: tuple[str, ...] = ()
    base: bool = False


def value_case(
    file: str, path: tuple[str, ...], value: Any, group: str | None = None, base: bool = False
) -> Case:
    shown = json.dumps(value)
    name = f"{'.'.join(path)} = {shown if len(shown) < 60 else shown[:57] + '...'}"
    words = (file, path[-1]) if path[-1] else (file,)
    return Case(
        group or file, name, partial(set_value, file=file, path=path, value=value), words, base
    )


def set_value(folder: Path, file: str, path: tuple[str, ...], value: Any) -> None:
    content = json.loads((folder / file).read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / file).write_text(json.dumps(content))


def set_empty(folder: Path, section: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    if section not in content:
        set_value(folder, "config.json", (section,), None)


def write_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def write_index(folder: Path, weight_map: Any) -> None:
    content = {} if weight_map is None else {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def remove_token(folder: Path, token: str) -> None:
    for file in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        content = json.loads((folder / file).read_text())
        content.pop(token, None)
        for role in [key for key, value in content.items() if value == token]:
            del content[role]
        decoder = content.get("added_tokens_decoder", {})
        for key in [key for key, entry in decoder.items() if entry["content"] == token]:
            del decoder[key]
        (folder / file).write_text(json.dumps(content))


def grow_vocabulary(folder: Path, rows: int) -> None:
    """Give the embedding and output rows that only a sparse file can have."""
    shapes = {name: list(t.shape) for name, t in load_file(folder / "model.safetensors").items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        shapes[f"vlm.lang_model.{name}"][0] = rows
    write_sparse(folder, shapes)


def sparse_vocabulary(folder: Path, rows: int) -> None:
    set_value(folder, "config.json", ("text_config", "vocab_size"), rows)
    grow_vocabulary(folder, rows)


def sparse_widths(folder: Path, width: int) -> None:
    """Feed-forward layers of 250 GB, which config.json and the header agree on."""
    set_value(folder, "config.json", ("text_config", "intermediate_size"), width)
    set_value(folder, "config.json", ("text_config", "num_hidden_layers"), 100)
    set_value(folder, "config.json", ("text_config", "hidden_size"), 2048)
    with torch.device("meta"):
        from xgenmm.checkpoints.registry import read_config
        from xgenmm.models.xgenmm import XGenMM

        shapes = {n: list(t.shape) for n, t in XGenMM(read_config(folder)).state_dict().items()}
    write_sparse(folder, shapes)


def write_sparse(folder: Path, shapes: dict[str, list[int]]) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    content = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    os.truncate(path, min(path.stat().st_size + offset, 2**43))


_UNDAMAGED = tempfile.TemporaryDirectory()  # for the whole run of the program


def undamaged(base: bool = False) -> Path:
    """Return the folder of the tiny checkpoint, an instruct or a base model."""
    return Path(_UNDAMAGED.name) / ("base" if base else "instruct")


def write_undamaged() -> None:
    """Write both tiny checkpoints; the base model's `tokenizer.json` has no merges."""
    checkpoint(undamaged())
    checkpoint(undamaged(base=True), base=True)
    from xgenmm.preprocessing.tokenizer_files import read_vocabulary

    pieces = read_vocabulary(undamaged(), "slow")[1]
    description: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": "<unk>",
            "vocab": {piece: token for token, piece in pieces.items()},
            "merges": [],
        },
    }
    (undamaged(base=True) / "tokenizer.json").write_text(json.dumps(description))
    # The slow convention would do without tokenizer.json, and the fast one does without this.
    (undamaged(base=True) / "tokenizer.model").unlink()
