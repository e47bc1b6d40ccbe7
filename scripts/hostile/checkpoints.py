"""Load hostile checkpoint folders, and count how many are refused clearly.

    python -m scripts.hostile.checkpoints            # a line for each class of case
    python -m scripts.hostile.checkpoints -v         # and one for each case that is not handled
    python -m scripts.hostile.checkpoints "index"    # only classes whose name contains this

Each case damages one file of a tiny checkpoint, loads it in a process of its own and asks a
question. It is refused if loading ends within 30 s, without much memory, with a CheckpointError
(or another ValueError or OSError that has a message). It is handled if that error also names the
file, and the field if a field is wrong, in at most a screen. A folder that is in order is handled
if it answers as the undamaged one does.
"""

import argparse
import json
import os
import shutil
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import xgenmm
from scripts.hostile.isolation import LONGEST_MESSAGE, Outcome, run
from tests.support.tiny import checkpoint

Damage = Callable[[Path], object]

BAD_INTEGERS: tuple[Any, ...] = ("32", 2.5, True, [2], {"a": 2}, 0, -1, 10**12, 10**30)
BAD_NUMBERS: tuple[Any, ...] = ("1e-5", True, [1.0], {}, -1.0, float("nan"), float("inf"), 10**400)
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
SECTIONS: dict[str, tuple[str, ...]] = {
    "vision_encoder_config": (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "image_size", "patch_size",
    ),
    "vision_tokenizer_config": ("num_latents", "depth", "num_heads", "head_dim"),
    "text_config": (
        "vocab_size", "initial_tokenizer_len", "hidden_size", "intermediate_size",
        "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "sliding_window",
    ),
}  # fmt: skip
JSON_FILES = (
    "config.json",
    "preprocessor_config.json",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "model.safetensors.index.json",
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


def all_cases() -> Iterator[Case]:
    """Yield every case."""
    yield from _config_values()
    yield from _contradictions()
    yield from _preprocessor()
    yield from _tokenizer_entries()
    yield from _tokenizer_json()
    yield from _tokenizer_model()
    for name in (*JSON_FILES, "tokenizer.model", "model.safetensors"):
        yield from _special_files(name)
    for name in JSON_FILES:
        yield from _malformed_json(name)
    yield from _index()
    yield from _headers()
    yield from _in_order()


def _config_values() -> Iterator[Case]:
    value: Any
    for section, fields in SECTIONS.items():
        for field in fields:
            for value in BAD_INTEGERS:
                yield _value("config.json", (section, field), value)
    for field in ("rms_norm_eps", "rope_theta"):
        for value in (*BAD_NUMBERS, 0.0):
            yield _value("config.json", ("text_config", field), value)
    for section in SECTIONS:
        for value in (["a"], "text", 7, True):
            yield _value("config.json", (section,), value)
    for value in ("yes", 1, []):
        yield _value("config.json", ("demo",), value)
    for value in ("text", 7, [7], {"a": 1}, [None]):
        yield _value("config.json", ("architectures",), value)


def _contradictions() -> Iterator[Case]:
    """Values that are possible but are not those of the tensors, or not supported."""
    group = "config.json against the tensors"
    for section, field, value in (
        ("vision_encoder_config", "hidden_size", 64),
        ("vision_encoder_config", "intermediate_size", 65),
        ("vision_encoder_config", "num_hidden_layers", 3),
        ("vision_encoder_config", "num_hidden_layers", 1),
        ("vision_encoder_config", "num_attention_heads", 3),
        ("vision_encoder_config", "image_size", 42),
        ("vision_encoder_config", "patch_size", 7),
        ("vision_encoder_config", "tower", "vit"),
        ("vision_tokenizer_config", "num_latents", 5),
        ("vision_tokenizer_config", "depth", 2),
        ("vision_tokenizer_config", "num_heads", 3),
        ("vision_tokenizer_config", "head_dim", 16),
        ("text_config", "vocab_size", 705),
        ("text_config", "initial_tokenizer_len", 705),
        ("text_config", "initial_tokenizer_len", 100),
        ("text_config", "hidden_size", 64),
        ("text_config", "intermediate_size", 64),
        ("text_config", "num_hidden_layers", 40),
        ("text_config", "num_hidden_layers", 1),
        ("text_config", "num_attention_heads", 5),
        ("text_config", "num_attention_heads", 32),
        ("text_config", "max_position_embeddings", 16),
        ("text_config", "num_key_value_heads", 1),
        ("text_config", "additional_tokens", 2),
        ("text_config", "rope_scaling", {"type": "su", "long_factor": [1.0]}),
        ("text_config", "hidden_act", "relu"),
        ("text_config", "tie_word_embeddings", True),
    ):
        yield _value("config.json", (section, field), value, group)
    for section, field, value in (
        ("vision_encoder_config", "tower", "open_clip"),
        ("vision_tokenizer_config", "text_tokens", 4),
    ):
        damage = partial(_set, file="config.json", path=(section, field), value=value)
        yield Case(group, f"{section}.{field} = {value}", damage, ("safetensors", "missing"))


def _preprocessor() -> Iterator[Case]:
    value: Any
    file = "preprocessor_config.json"
    for field in ("image_mean", "image_std"):
        for value in ("half", 0.5, [0.5], [0.5] * 4, [0.5, "x", 0.5], [0.5, None, 0.5],
                      [0.5, True, 0.5], [0.5, float("nan"), 0.5], [0.5, float("inf"), 0.5],
                      [0.5, -0.5, 0.5], [123.0, 116.0, 103.0], {"r": 0.5}):  # fmt: skip
            yield _value(file, (field,), value)
    yield _value(file, ("image_std",), [0.5, 0.0, 0.5])
    yield _value(file, ("image_std",), [0.5, 1e-300, 0.5])
    for value in ("all", 7, [], [7], [[28]], [[28, 28, 28]], [["28", 56]], [[28.5, 56]],
                  [[True, 28]], [[0, 28]], [[-28, 28]], [[28, 30]], [[28, 10**9]], [[10**30, 28]],
                  [[28 * 200, 28]], [[28, 56]] * 100_000, {"a": [28, 56]}):  # fmt: skip
        yield _value(file, ("grids",), value)


def _tokenizer_entries() -> Iterator[Case]:
    value: Any
    wrong: Any
    file = "added_tokens.json"
    for value in ("7", 1.5, True, None, [], {}, -1, 10**12, 5, 652, 690):
        yield _value(file, ("<|new|>",), value)
    yield _value(file, ("",), 651)
    file = "tokenizer_config.json"
    for value in ([], "text", 7, {"x": {"content": "a"}}, {"-1": {"content": "a"}},
                  {"651": "text"}, {"651": []}, {"651": {}}, {"651": {"content": 7}},
                  {"651": {"content": ""}}, {"651": {"content": None}},
                  {"999999999999": {"content": "a"}}):  # fmt: skip
        yield _value(file, ("added_tokens_decoder",), value)
    for token in ("690", "5"):
        yield _value(file, ("added_tokens_decoder", token), {"content": "a"})
    for field in ("lstrip", "rstrip", "special", "normalized", "single_word"):
        for wrong in ("yes", 1, []):
            entry = {"content": "<pad>", field: wrong}
            case = _value(file, ("added_tokens_decoder", "651"), entry)
            yield Case(case.group, f"{field} = {wrong!r}", case.damage, (file, field))
    for field in ("normalized", "single_word"):
        entry = {"content": "<pad>", field: True}
        case = _value(file, ("added_tokens_decoder", "651"), entry)
        yield Case(case.group, f"{field} = True", case.damage, (field,))
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for value in (7, [], ["<s>"], {"text": "<s>"}, {"content": 7}, True):
            yield _value(file, ("bos_token",), value)
    for token in ("<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "<|endoftext|>"):
        yield Case("missing special token", token, partial(_remove_token, token=token), (token,))


def _tokenizer_json() -> Iterator[Case]:
    value: Any
    for path, value in (
        (("model",), None), (("model",), []), (("model",), {"type": "BPE"}),
        (("model", "type"), "WordPiece"), (("model", "vocab"), {}), (("model", "vocab"), []),
        (("model", "vocab", "<unk>"), "0"), (("model", "vocab", "<unk>"), -1),
        (("model", "vocab", "new"), 10**12), (("model", "vocab", "new"), 690),
        (("model", "vocab", "new"), 1.5), (("model", "merges"), 7),
        (("model", "merges"), [["a", "b", "c"]]),
        (("pre_tokenizer",), {"type": "Split", "pattern": {"Regex": "(a+)+$"},
                              "behavior": "Isolated", "invert": False}),
        (("normalizer",), {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}),
        (("normalizer",), "NFC"), (("added_tokens",), 7), (("added_tokens",), [7]),
        (("added_tokens",), [{"id": 1}]), (("added_tokens",), [{"content": "<s>"}]),
        (("added_tokens",), [{"id": "1", "content": "<s>"}]),
        (("added_tokens",), [{"id": 1, "content": 7}]),
        (("added_tokens",), [{"id": -1, "content": "<s>"}]),
    ):  # fmt: skip
        yield _value("tokenizer.json", path, value, base=True)
    for merge in ("x", "nope nope", ""):
        damage = partial(_set, file="tokenizer.json", path=("model", "merges"), value=[merge])
        yield Case("tokenizer.json", f"merges {merge!r}", damage, ("tokenizer.json",), True)


def _tokenizer_model() -> Iterator[Case]:
    def cut(folder: Path) -> None:
        path = folder / "tokenizer.model"
        path.write_bytes(path.read_bytes()[:4321])

    def flip(folder: Path, start: int) -> None:
        path = folder / "tokenizer.model"
        content = bytearray(path.read_bytes())
        for place in range(start, start + 64):
            content[place] ^= 0xFF
        path.write_bytes(content)

    words = ("tokenizer.model",)
    for name, content in (("random bytes", bytes(range(256)) * 40), ("text", b"hello " * 100)):
        damage = partial(_write, name="tokenizer.model", content=content)
        yield Case("tokenizer.model", name, damage, words)
    yield Case("tokenizer.model", "cut", cut, words)
    for start in (0, 100, 3000, 9000):
        yield Case("tokenizer.model", f"flipped from {start}", partial(flip, start=start), words)


def _special_files(file: str) -> Iterator[Case]:
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
        _write_index(right, {})
    path.symlink_to(right / file)


def _malformed_json(file: str) -> Iterator[Case]:
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
        yield Case("malformed JSON", f"{file}: {name}", partial(_write, name=file, content=content),
                   (file,), base)  # fmt: skip


def _index() -> Iterator[Case]:
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
        damage = partial(_write_index, weight_map=places)
        yield Case("index file", name, damage, (file,))


def _headers() -> Iterator[Case]:
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
        _set(folder, "config.json", ("text_config", "vocab_size"), 2**40)
        _grow_vocabulary(folder, 2**40)

    def large(folder: Path) -> None:
        """Embeddings of 2 x 1.1 TB, in a sparse file."""
        _set(folder, "config.json", ("text_config", "vocab_size"), 2**33)
        _grow_vocabulary(folder, 2**33)

    yield Case("safetensors header", "scalars", scalar, ("safetensors",))
    yield Case("more than memory", "sparse file of 281 TB", huge, ("config.json", "vocab_size"))
    yield Case("more than memory", "sparse file of 2 TB", large, ("config.json", "vocab_size"))
    yield Case(
        "more than memory", "sparse file of 64 GB",
        partial(_sparse_vocabulary, rows=2**28), ("vocab_size",),
    )  # fmt: skip
    yield Case(
        "more than memory", "sparse file of 250 GB that config.json allows",
        partial(_sparse_widths, width=2**17), ("memory",),
    )  # fmt: skip


def _in_order() -> Iterator[Case]:
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
    yield Case(group, "unknown key", lambda f: _set(f, "config.json", ("future",), {"a": [1]}))
    for section in (*SECTIONS, "demo"):
        yield Case(group, f"{section}: null when it says nothing",
                   partial(_set_empty, section=section))  # fmt: skip
    yield Case(
        group, "integers for numbers",
        lambda f: _set(f, "preprocessor_config.json", ("image_mean",), [0.5, 0.5, 0.5]),
    )  # fmt: skip
    yield Case(
        group, "null for a field",
        lambda f: _set(f, "config.json", ("text_config", "rope_theta"), None),
    )  # fmt: skip


def _value(
    file: str, path: tuple[str, ...], value: Any, group: str | None = None, base: bool = False
) -> Case:
    shown = json.dumps(value)
    name = f"{'.'.join(path)} = {shown if len(shown) < 60 else shown[:57] + '...'}"
    words = (file, path[-1]) if path[-1] else (file,)
    return Case(group or file, name, partial(_set, file=file, path=path, value=value), words, base)


def _set(folder: Path, file: str, path: tuple[str, ...], value: Any) -> None:
    content = json.loads((folder / file).read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / file).write_text(json.dumps(content))


def _set_empty(folder: Path, section: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    if section not in content:
        _set(folder, "config.json", (section,), None)


def _write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def _write_index(folder: Path, weight_map: Any) -> None:
    content = {} if weight_map is None else {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def _remove_token(folder: Path, token: str) -> None:
    for file in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        content = json.loads((folder / file).read_text())
        content.pop(token, None)
        for role in [key for key, value in content.items() if value == token]:
            del content[role]
        decoder = content.get("added_tokens_decoder", {})
        for key in [key for key, entry in decoder.items() if entry["content"] == token]:
            del decoder[key]
        (folder / file).write_text(json.dumps(content))


def _grow_vocabulary(folder: Path, rows: int) -> None:
    """Give the embedding and output rows that only a sparse file can have."""
    shapes = {name: list(t.shape) for name, t in load_file(folder / "model.safetensors").items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        shapes[f"vlm.lang_model.{name}"][0] = rows
    _write_sparse(folder, shapes)


def _sparse_vocabulary(folder: Path, rows: int) -> None:
    _set(folder, "config.json", ("text_config", "vocab_size"), rows)
    _grow_vocabulary(folder, rows)


def _sparse_widths(folder: Path, width: int) -> None:
    """Feed-forward layers of 250 GB, which config.json and the header agree on."""
    _set(folder, "config.json", ("text_config", "intermediate_size"), width)
    _set(folder, "config.json", ("text_config", "num_hidden_layers"), 100)
    _set(folder, "config.json", ("text_config", "hidden_size"), 2048)
    with torch.device("meta"):
        from xgenmm.checkpoints.registry import read_config
        from xgenmm.models.xgenmm import XGenMM

        shapes = {n: list(t.shape) for n, t in XGenMM(read_config(folder)).state_dict().items()}
    _write_sparse(folder, shapes)


def _write_sparse(folder: Path, shapes: dict[str, list[int]]) -> None:
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


_UNDAMAGED = Path(tempfile.gettempdir())  # set by `main`


def undamaged(base: bool = False) -> Path:
    """Return the folder of the tiny checkpoint, an instruct or a base model."""
    return _UNDAMAGED / ("base" if base else "instruct")


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


def answer(folder: Path) -> str:
    """Load a checkpoint and answer one question about one image."""
    torch.set_num_threads(1)
    try:
        engine = xgenmm.load(folder, device="cpu", max_num_seqs=1)
    except xgenmm.CheckpointError:
        raise
    except Exception as error:
        # Clear errors of other types count too, if they name the file.
        if not isinstance(error, ValueError | OSError):
            raise RuntimeError(f"at load: {type(error).__name__}") from error
        raise xgenmm.CheckpointError(str(error)) from error
    image = Image.new("RGB", (50, 40), "red")
    sampling = xgenmm.SamplingParams(max_new_tokens=4)
    try:
        return repr("".join(engine.stream(xgenmm.Request("aaa what?", [image], sampling=sampling))))
    except Exception as error:
        raise RuntimeError(f"at the question: {type(error).__name__}: {error}") from error


def run_case(case: Case, right: dict[bool, str]) -> tuple[bool, bool, Outcome]:
    """Run one case; return whether it was bounded and whether it was handled."""
    with tempfile.TemporaryDirectory(dir=_UNDAMAGED) as root:
        folder = Path(root) / "checkpoint"
        shutil.copytree(undamaged(case.base), folder)
        case.damage(folder)
        outcome = run(partial(answer, folder))
    if not case.words:
        same = outcome.text == right[case.base]
        return same, same, outcome
    refused = (outcome.ended, outcome.kind) == ("raised", "CheckpointError")
    clear = all(word in outcome.text for word in case.words) and "\x1b" not in outcome.text
    return refused, refused and clear and len(outcome.text) <= LONGEST_MESSAGE, outcome


def main() -> int:
    """Run all cases and print the table; return 1 if one was not handled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("only", nargs="?", default="")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    global _UNDAMAGED
    with tempfile.TemporaryDirectory() as folder:
        _UNDAMAGED = Path(folder)
        write_undamaged()
        right = {base: run(partial(answer, undamaged(base))).text for base in (False, True)}
        counts: dict[str, list[int]] = {}
        for case in all_cases():
            if options.only not in case.group:
                continue
            refused, handled, outcome = run_case(case, right)
            count = counts.setdefault(case.group, [0, 0, 0])
            counts[case.group] = [count[0] + 1, count[1] + refused, count[2] + handled]
            if options.verbose and not handled:
                print(f"  {case.group}: {case.name}: {outcome}", flush=True)
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    print(f"{'class':<40}{'cases':>7}{'refused':>9}{'handled':>9}")
    for group, (cases, refused_cases, handled_cases) in counts.items():
        print(f"{group:<40}{cases:>7}{refused_cases:>9}{handled_cases:>9}")
    return int(counts["all"][0] != counts["all"][2])


if __name__ == "__main__":
    sys.exit(main())
