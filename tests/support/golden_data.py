"""The golden data under tests/golden, whose large files are compressed, as plain folders.

A subset of what the original implementation computed (tests/golden/README.md says which), in the
format that `python -m xgenmm.evaluation.parity` reads.
"""

import atexit
import lzma
import shutil
import tempfile
from functools import cache
from pathlib import Path

_COMPRESSED = Path(__file__).resolve().parents[1] / "golden"


@cache
def folder(name: str) -> Path:
    """The golden folder `name`, unpacked once for this process."""
    target = _unpacked() / name
    for source in sorted(path for path in (_COMPRESSED / name).rglob("*") if path.is_file()):
        place = target / source.relative_to(_COMPRESSED / name)
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".xz":
            place.with_suffix("").write_bytes(lzma.decompress(source.read_bytes()))
        else:
            shutil.copyfile(source, place)
    return target


@cache
def _unpacked() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="xgenmm-golden-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
