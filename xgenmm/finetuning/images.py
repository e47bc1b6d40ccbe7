"""The images of samples, read as they are read for answers: from files, URLs and data URLs."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from xgenmm.errors import InputError, printable
from xgenmm.files import atomic_write
from xgenmm.preprocessing.data_url import decode_data_url
from xgenmm.preprocessing.fetch import FetchLimits, start_fetch
from xgenmm.preprocessing.images import read_image


@dataclass(frozen=True)
class ImageReader:
    """Reads images upright, over white where they are transparent, as the engine does.

    The authors apply neither; a model answers best about images read as in its training.

    Attributes:
        downloads: folder that keeps what URLs gave, so that every epoch sees the same image; None
            to download again each time.
        root: files outside of this folder are refused, links followed; None to allow all.
    """

    downloads: Path | None = None
    limits: FetchLimits = field(default_factory=FetchLimits)
    root: Path | None = None

    def read(self, source: str, folder: Path) -> Image.Image:
        """Return an image in RGB.

        source: a URL, a data URL, or a path relative to `folder`.

        Raises InputError, naming the source, if it cannot be read.
        """
        name = f"image {printable(source, 80)}"
        if source.startswith("data:"):
            return read_image(decode_data_url(source, name), name)
        if source.startswith(("http://", "https://")):
            return read_image(self._download(source, name), name)
        try:
            if self.root and not (folder / source).resolve().is_relative_to(self.root.resolve()):
                raise InputError(name, "leads out of the dataset; give a path within its folder")
            return read_image(folder / source, name)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(name, f"is not a path ({error})") from error

    def _download(self, url: str, name: str) -> bytes:
        if self.downloads is None:
            return start_fetch(url, self.limits, name).result()
        path = self.downloads / hashlib.sha256(os.fsencode(url)).hexdigest()
        if not path.exists():
            content = start_fetch(url, self.limits, name).result()
            self.downloads.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(content)
        return path.read_bytes()
