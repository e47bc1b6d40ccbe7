"""Hostile files: links, devices, malformed JSON, index files and safetensors headers."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from scripts.hostile.checkpoint_damage import (
    LFS_POINTER,
    Case,
    grow_vocabulary,
    set_empty,
    set_value,
    sparse_vocabulary,
    sparse_widths,
    undamaged,
    write_file,
    write_index,
)
from scripts.hostile.checkpoint_values import SECTIONS


def special_files(file: str) -> Iterator[Case]:
    """What is not a file of the folder, or far too large to be one."""
    group = "special files"
    base = file == "tokenizer.json"

    def replaced(make: Callable[[Path], object], folder: Path) -> None:
        path = folder / file
        path.unlink(missing_ok=True)
        make(path)

    def sparse(path: Path) -> None:
        path.touch()
        os.truncate(path, 3 << 30)

    def bind(path: Path) -> None:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's address has at most 107 characters
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)

    makers: dict[str, Callable[[Path], object]] = {
        "empty": Path.touch,
        "LFS pointer": lambda path: path.write_text(LFS_POINTER),
        "FIFO": lambda path: os.mkfifo(path),
        "socket": bind,
        "folder": Path.mkdir,
        "3 GB of zeros": sparse,
        "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "link to a terminal": lambda path: path.symlink_to("/dev/tty"),
        "link to /etc/passwd": lambda path: path.symlink_to("/etc/passwd"),
        "link to itself": lambda path: path.symlink_to(path.name),
        "link to nothing": lambda path: path.symlink_to("nothing"),
        "link out of the folder": partial(_link_out, file=file, base=base),
    }
    for name, make in makers.items():
        yield Case(group, f"{file}: {name}", partial(replaced, make), (file,), base)


def _link_out(path: Path, file: str, base: bool) -> None:
    """Link to a file that would be right, were it in the folder."""
    right = path.parent.with_name("elsewhere")
    shutil.rmtree(right, ignore_errors=True)
    shutil.copytree(undamaged(base), right)
    if file == "model.safetensors.index.json":
        write_index(right, {})
    path.symlink_to(right / file)


def malformed_json(file: str) -> Iterator[Case]:
    base = file == "tokenizer.json"
    contents: dict[str, bytes] = {
        "not JSON": b"hello",
        "cut": b'{"a": [1, 2',
        "list": b"[1]",
        "null": b"null",
        "number": b"7",
        "text": b'"text"',
        "200,000 lists deep": b"[" * 200_000 + b"]" * 200_000,
        "200,000 objects deep": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        "deep below a key": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "NUL bytes": b"\0" * 100,
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "invalid UTF-8": b'{"a": "\xff\xfe"}',
        "a number of 10,000 digits": b'{"a": ' + b"9" * 10_000 + b"}",
        "100 MB of lists": b'{"a": [' + b"[]," * (33 << 20) + b"[]]}",
    }
    for name, content in contents.items():
        write = partial(write_file, name=file, content=content)
        yield Case("malformed JSON", f"{file}: {name}", write, (file,), base)


def index() -> Iterator[Case]:
    file = "model.safetensors.index.json"
    right = dict.fromkeys(load_file(undamaged() / "model.safetensors"), "model.safetensors")
    some = next(iter(right))
    maps: dict[str, Any] = {
        "no weight_map": None,
        "list": [],
        "text": "model.safetensors",
        "empty": {},
        "number for a file": right | {some: 7},
        "list for a file": right | {some: ["model.safetensors"]},
        "null for a file": right | {some: None},
        "absolute": right | {some: "/etc/passwd"},
        "absolute safetensors": right | {some: "/tmp/a.safetensors"},
        "parent": right | {some: "../a.safetensors"},
        "pickle": right | {some: "pytorch_model.bin"},
        "NUL": right | {some: "a\0b.safetensors"},
        "long": right | {some: "a" * 100_000 + ".safetensors"},
        "missing file": right | {some: "b.safetensors"},
        "100,000 missing files": right | {f"t{i}": f"{i}.safetensors" for i in range(100_000)},
        "100,000 tensors": right | {f"tensor.{i}": "model.safetensors" for i in range(100_000)},
        "missing tensor": {n: f for n, f in right.items() if n != some},
        "escape sequences": right | {"\x1b[2J\x1b]0;x\x07": "model.safetensors"},
    }
    for name, places in maps.items():
        damage = partial(write_index, weight_map=places)
        yield Case("index file", name, damage, (file,))


def headers() -> Iterator[Case]:
    def header(folder: Path, content: bytes, length: int | None = None, data: int = 0) -> None:
        size = len(content) if length is None else length
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", size) + content + bytes(data))

    def entry(**change: Any) -> bytes:
        values = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        return json.dumps({"a": values | change}).encode()

    contents: dict[str, tuple[bytes, int | None, int]] = {
        "not JSON": (b"hello, not json", None, 8),
        "length of 2^63": (b"{}", 2**63, 0),
        "length beyond the file": (b"{}", 1000, 0),
        "length 0": (b"", None, 8),
        "list": (b"[1, 2]", None, 8),
        "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, 8),
        "text as shape": (entry(shape="2"), None, 8),
        "negative shape": (entry(shape=[-2]), None, 8),
        "fractional shape": (entry(shape=[2.5]), None, 8),
        "shape of 2^62 x 4": (entry(shape=[2**62, 4]), None, 8),
        "shape of 0 x 2^62": (entry(shape=[0, 2**62], data_offsets=[0, 0]), None, 0),
        "20,000 dimensions": (entry(shape=[1] * 20_000 + [2]), None, 8),
        "unknown dtype": (entry(dtype="F13"), None, 8),
        "float8": (entry(dtype="F8_E4M3", data_offsets=[0, 2]), None, 2),
        "offsets backwards": (entry(data_offsets=[8, 0]), None, 8),
        "offsets beyond the file": (entry(data_offsets=[8, 16]), None, 8),
        "overlap": (entry()[:-1] + b"," + entry().replace(b'"a"', b'"b"')[1:], None, 8),
        "no dtype": (b'{"a": {"shape": [2], "data_offsets": [0, 8]}}', None, 8),
        "metadata of numbers": (b'{"__metadata__": {"a": 7}}', None, 0),
        "300,000 tensors": (
            json.dumps({
                f"tensor.{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
                for i in range(300_000)
            }).encode(), None, 0,
        ),
        "a name of 1 MB": (entry().replace(b'"a"', b'"' + b"a" * 2**20 + b'"'), None, 8),
        "escape sequences": (entry().replace(b'"a"', b'"\\u001b[2J\\u001b]0;x\\u0007"'), None, 8),
    }  # fmt: skip
    for name, (content, length, data) in contents.items():
        damage = partial(header, content=content, length=length, data=data)
        yield Case("safetensors header", name, damage, ("safetensors",))

    def scalar(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        save_file({name: tensor.flatten()[0].clone() for name, tensor in state.items()},
                  folder / "model.safetensors")  # fmt: skip

    def huge(folder: Path) -> None:
        """A decoder of 2 PB by config.json and by the header, in a sparse file."""
        set_value(folder, "config.json", ("text_config", "vocab_size"), 2**40)
        grow_vocabulary(folder, 2**40)

    def large(folder: Path) -> None:
        """Embeddings of 2 x 1.1 TB, in a sparse file."""
        set_value(folder, "config.json", ("text_config", "vocab_size"), 2**33)
        grow_vocabulary(folder, 2**33)

    yield Case("safetensors header", "scalars", scalar, ("safetensors",))
    yield Case("more than memory", "sparse file of 281 TB", huge, ("config.json", "vocab_size"))
    yield Case("more than memory", "sparse file of 2 TB", large, ("config.json", "vocab_size"))
    yield Case(
        "more than memory", "sparse file of 64 GB",
        partial(sparse_vocabulary, rows=2**28), ("vocab_size",),
    )  # fmt: skip
    yield Case(
        "more than memory", "sparse file of 250 GB that config.json allows",
        partial(sparse_widths, width=2**17), ("memory",),
    )  # fmt: skip


def in_order() -> Iterator[Case]:
    """Folders that must load and answer as before."""
    group = "in order"

    def linked_folder(folder: Path) -> None:
        folder.rename(folder.with_name("real"))
        folder.symlink_to("real")

    def hub_cache(folder: Path) -> None:
        repository = folder.with_name("models--a--b")
        (repository / "snapshots").mkdir(parents=True)
        (repository / "blobs").mkdir()
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(repository / "blobs" / f"{number:040x}")
        snapshot = repository / "snapshots" / f"{7:040x}"
        snapshot.mkdir()
        for number, name in enumerate(sorted(p.name for p in undamaged().iterdir())):
            (snapshot / name).symlink_to(f"../../blobs/{number:040x}")
        folder.rmdir()
        folder.symlink_to(snapshot)

    def inner_link(folder: Path) -> None:
        (folder / "config.json").rename(folder / "original.json")
        (folder / "config.json").symlink_to("original.json")

    def byte_order(folder: Path) -> None:
        for path in folder.glob("*config.json"):
            path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=True, indent=8))

    def parent(folder: Path) -> None:
        (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")

    yield Case(group, "undamaged", lambda _: None)
    yield Case(group, "base model", lambda _: None, base=True)
    yield Case(group, "link to a folder", linked_folder)
    yield Case(group, "the hub's cache", hub_cache)
    yield Case(group, "link within the folder", inner_link)
    yield Case(group, "indented", byte_order)
    yield Case(group, "tokenizer.model in the parent", parent)
    yield Case(group, "unknown key", lambda f: set_value(f, "config.json", ("future",), {"a": [1]}))
    for section in (*SECTIONS, "demo"):
        yield Case(group, f"{section}: null when it says nothing",
                   partial(set_empty, section=section))  # fmt: skip
    yield Case(
        group, "integers for numbers",
        lambda f: set_value(f, "preprocessor_config.json", ("image_mean",), [0.5, 0.5, 0.5]),
    )  # fmt: skip
    yield Case(
        group, "null for a field",
        lambda f: set_value(f, "config.json", ("text_config", "rope_theta"), None),
    )  # fmt: skip
