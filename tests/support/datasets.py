"""Datasets for fine-tuning as archives, for Cog's server that trains."""

import base64
import io
import json
import zipfile
from collections.abc import Mapping

from PIL import Image

COLORS = ("red", "green", "blue", "black", "white", "gray")


def dataset_zip(count: int = 6, sources: Mapping[int, str] | None = None) -> bytes:
    """A zip with `count` samples of one image each.

    sources: by sample, another place of the image than where it is.
    """
    content = io.BytesIO()
    lines = []
    with zipfile.ZipFile(content, "w") as archive:
        for number in range(count):
            color = COLORS[number % len(COLORS)]
            image = io.BytesIO()
            Image.new("RGB", (60, 60), color).save(image, "PNG")
            archive.writestr(f"set/images/{number}.png", image.getvalue())
            source = (sources or {}).get(number, f"images/{number}.png")
            turns = [
                {"role": "user", "content": "<image>What color is it?"},
                {"role": "assistant", "content": color},
            ]
            lines.append(json.dumps({"messages": turns, "images": [source]}))
        archive.writestr("set/data.jsonl", "\n".join(lines))
    return content.getvalue()


def archive_url(content: bytes) -> str:
    """A data URL of an archive."""
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
