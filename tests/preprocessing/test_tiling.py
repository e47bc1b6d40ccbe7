"""Canvas selection, padding and tile order, on examples small enough to check by hand; threads."""

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.paths import ROOT
from xgenmm.config import GRIDS_384, TilingConfig
from xgenmm.preprocessing.tiling import resize_and_pad, select_best_resolution, tile_image

SMALL = TilingConfig(grids=((4, 8), (8, 4), (8, 8), (12, 4), (4, 12)))


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        ((1000, 1000), (768, 768)),
        ((4000, 1000), (1152, 384)),
        ((100, 3000), (384, 1152)),
        ((384, 384), (384, 768)),  # both two-tile canvases keep all pixels: the first wins
        ((1, 1), (384, 768)),
        ((700, 380), (768, 384)),
    ],
)
def test_best_canvas_is_selected(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert select_best_resolution(size, GRIDS_384) == canvas


def test_resized_image_is_centred_on_black() -> None:
    canvas = resize_and_pad(Image.new("RGB", (100, 20), "white"), (12, 4))
    rows = [canvas.getpixel((6, y)) for y in range(4)]
    assert rows == [(255, 255, 255)] * 3 + [(0, 0, 0)]  # 12 x ceil(2.4), (4 - 3) // 2 above it


def test_base_tile_comes_first_then_the_canvas_row_by_row() -> None:
    image = Image.new("RGB", (8, 8))
    for corner, color in (((0, 0), 10), ((4, 0), 20), ((0, 4), 30), ((4, 4), 40)):
        image.paste((color, color, color), (*corner, corner[0] + 4, corner[1] + 4))
    tiles = tile_image(image, SMALL, 4)
    assert (tiles.columns, tiles.rows, tiles.image_size) == (2, 2, (8, 8))
    assert tiles.pixels.shape == (5, 4, 4, 3)
    assert tiles.pixels.dtype == np.uint8
    assert [int(tile[2, 2, 0]) for tile in tiles.pixels[1:]] == [10, 20, 30, 40]


def test_squash_and_pad_modes_give_one_tile() -> None:
    image = Image.new("RGB", (80, 20), "white")
    squashed = tile_image(image, TilingConfig("squash", ()), 8)
    padded = tile_image(image, TilingConfig("pad", ()), 8)
    assert squashed.pixels.shape == padded.pixels.shape == (1, 8, 8, 3)
    assert squashed.pixels.min() == 255
    assert int(padded.pixels[0, 0, 0, 0]) == 127  # the mean colour


def test_tiles_are_equal_in_many_threads_and_from_a_file_not_decoded_yet() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    expected = tile_image(Image.fromarray(noise), SMALL, 4).pixels
    assert np.array_equal(tile_image(Image.open(file), SMALL, 4).pixels, expected)
    with ThreadPoolExecutor(8) as pool:
        shared = Image.fromarray(noise)
        tiled = pool.map(lambda _: tile_image(shared, SMALL, 4).pixels, range(64))
        assert all(np.array_equal(pixels, expected) for pixels in tiled)


def test_truncated_file_fails_in_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.effect_noise((200, 100), 50).convert("RGB").save(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OSError, match="truncated"):
        tile_image(Image.open(path), SMALL, 4)


AFTER_A_FORK_AND_AT_EXIT = """
import os, threading
from PIL import Image
from xgenmm.config import TilingConfig
from xgenmm.preprocessing.tiling import tile_image

def tile():
    tile_image(Image.new("RGB", (80, 60)), TilingConfig(grids=((8, 4),)), 4)

def tile_at_exit():
    threading.main_thread().join()
    tile()
    print("tiled at exit")

tile()
child = os.fork()
tile()
if child:
    assert os.waitpid(child, 0)[1] == 0
    threading.Thread(target=tile_at_exit).start()
else:
    os._exit(0)
"""


def test_tiling_works_in_a_forked_process_and_while_the_interpreter_exits() -> None:
    command = [sys.executable, "-c", AFTER_A_FORK_AND_AT_EXIT]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "tiled at exit\n", "")
