"""Access to the golden data in tests/golden, whose large files are compressed.

It is a subset of the original implementation's results (see tests/golden/README.md), in the format
that `xgenmm parity` reads.
"""

import atexit
import lzma
import shutil
import tempfile
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file

_COMPRESSED = Path(__file__).resolve().parents[1] / "golden"


@cache
def folder(name: str) -> Path:
    """Return the golden folder `name`, unpacked once per process."""
    target = _unpacked() / name
    for source in sorted(file for file in (_COMPRESSED / name).rglob("*") if file.is_file()):
        path = target / source.relative_to(_COMPRESSED / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".xz":
            path.with_suffix("").write_bytes(lzma.decompress(source.read_bytes()))
        else:
            shutil.copyfile(source, path)
    if name == "v15_video_tl":
        _add_shared_files(target, folder("v15_video_gttm"))
    return target


def _add_shared_files(target: Path, shared: Path) -> None:
    """Complete a folder that holds only a temporal encoder; the rest is that of `shared`."""
    shutil.copytree(shared / "images", target / "images")
    parameters = load_file(target / "temporal_encoder.safetensors")
    for name, tensor in load_file(shared / "model.safetensors").items():
        if ".temporal_encoder." not in name:
            parameters[name] = tensor
    save_file(parameters, target / "model.safetensors")


@cache
def _unpacked() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="xgenmm-golden-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
