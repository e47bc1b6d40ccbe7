"""Checkpoint folders that are not what they should be are refused before a model is built.

A selection of the cases of `scripts.hostile.checkpoints`.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import xgenmm
from tests.support.tiny import checkpoint
from xgenmm.checkpoints import loading
from xgenmm.checkpoints.checks import check_sizes, read_tokenizer
from xgenmm.checkpoints.registry import read_config
from xgenmm.errors import CheckpointError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 5\n"


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("undamaged") / "tiny")


@pytest.fixture
def folder(undamaged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undamaged, tmp_path / "tiny"))


def read_all(folder: Path) -> None:
    """Read what `xgenmm.load` reads before it builds a model."""
    config = read_config(folder)
    read_tokenizer(folder, config)
    check_sizes(config, folder)


def edit(path: Path, *keys: str, value: Any) -> None:
    """Set a value of a JSON file."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 3 << 30)


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (lambda path: os.mkfifo(path), "is a FIFO, but must be a regular file"),
    "folder": (Path.mkdir, "is a folder, but must be a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a link out of its folder"),
    "outside": (lambda path: path.symlink_to("/etc/passwd"), "is a link out of its folder"),
    "broken": (lambda path: path.symlink_to("nothing"), "is a broken link"),
    "loop": (lambda path: path.symlink_to(path.name), "is a broken link"),
    "pointer": (lambda path: path.write_text(POINTER), "is a Git LFS pointer"),
}
FILES = ("config.json", "special_tokens_map.json", "tokenizer.model", "model.safetensors")


@pytest.mark.parametrize("file", [*FILES, loading.INDEX])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_not_a_file_of_the_folder_is_named(folder: Path, file: str, kind: str) -> None:
    make, message = SPECIAL[kind]
    (folder / file).unlink(missing_ok=True)
    make(folder / file)
    with pytest.raises(CheckpointError, match=rf"{file} {message}"):
        read_all(folder)


@pytest.mark.parametrize("file", FILES[:3])
def test_file_of_absurd_size_is_not_read(folder: Path, file: str) -> None:
    (folder / file).unlink()
    sparse(folder / file)
    with pytest.raises(CheckpointError, match=rf"{file} has 3,221,225,472 bytes, more than"):
        read_all(folder)


@pytest.mark.parametrize("file", ["config.json", "added_tokens.json", loading.INDEX])
@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a": ' + b"[" * 10**5, b"\xff", b"null"])
def test_broken_json_is_named(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file}(: it is None| is not valid JSON)"):
        read_all(folder)


@pytest.mark.parametrize(
    ("section", "field", "value", "right"),
    [
        ("text_config", "num_hidden_layers", 1000, "should be 2"),
        ("text_config", "vocab_size", 10**6, r"shape \[704, 32\]"),
        ("text_config", "intermediate_size", 64, r"shape \[32, 48\]"),
        ("vision_encoder_config", "image_size", 14, r"shape \[4, 32\]"),
        ("vision_encoder_config", "patch_size", 7, r"shape \[32, 3, 14, 14\]"),
        ("vision_tokenizer_config", "depth", 2, "should be 1"),
        ("vision_tokenizer_config", "num_heads", 3, r"times head_dim is 3 \* 8.* \[16, 32\]"),
    ],
)
def test_size_that_contradicts_the_tensors_is_named(
    folder: Path, section: str, field: str, value: int, right: str
) -> None:
    edit(folder / "config.json", section, field, value=value)
    with pytest.raises(CheckpointError, match=rf"config\.json: {section}\.{field}.*{right}"):
        read_all(folder)


def test_sizes_of_v1_are_compared_too(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "v1", "v1")
    read_all(folder)
    edit(folder / "config.json", "vision_encoder_config", "image_size", value=14)
    with pytest.raises(CheckpointError, match=r"vision_encoder_config\.image_size is 14"):
        check_sizes(read_config(folder), folder)


@pytest.mark.parametrize("token", ["<|end|>", "<|user|>"])
def test_missing_special_token_is_named(folder: Path, token: str) -> None:
    for file in ("added_tokens.json", "tokenizer_config.json"):
        (folder / file).write_text((folder / file).read_text().replace(token, "<|other|>"))
    with pytest.raises(CheckpointError, match=rf"has .*{token.replace('|', '.')}, which prompts"):
        read_all(folder)


def test_parameters_larger_than_memory_are_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "available_bytes", lambda device: 100_000)
    with pytest.raises(CheckpointError, match=r"take 0\.\d\d MB as torch.float32, but only 0\.10"):
        xgenmm.load(folder, device="cpu", dtype="float32")


def test_long_lists_of_tensors_are_cut_with_a_count(folder: Path) -> None:
    file = folder / "model.safetensors"
    more = {f"tensor.{i:04}": torch.zeros(1) for i in range(1000)}
    save_file({**load_file(file), **more, "\x1b[2J": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError) as error:
        xgenmm.load(folder, device="cpu")
    message = str(error.value)
    assert r"unexpected (1001): \x1b[2J [1]; tensor.0000 [1]; " in message
    assert "; and 993 more" in message
    assert len(message) < 1000


def test_header_of_absurd_length_is_not_read(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(
        CheckpointError, match=r"corrupt \(its header has 4,611,686,018,427,387,904"
    ):
        read_all(folder)


def test_links_within_the_folder_and_into_the_hub_cache_are_followed(
    undamaged: Path, tmp_path: Path
) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    shutil.copytree(undamaged, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (snapshot / "config.json").rename(snapshot / "other.json")
    (snapshot / "config.json").symlink_to("other.json")
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    read_all(linked)
