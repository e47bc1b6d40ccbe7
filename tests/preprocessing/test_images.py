"""Decoding of every supported file format, and rejection of unusable files."""

import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xgenmm.errors import InputError
from xgenmm.preprocessing.images import MAX_PIXELS, MAX_SCANS, read_image

RED, BLUE = (255, 0, 0), (0, 0, 255)
ORIENTATION = 0x0112


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def two_colours(mode: str = "RGB") -> Image.Image:
    """8 x 4, left half red, right half blue."""
    image = Image.new("RGB", (8, 4), RED)
    image.paste(BLUE, (4, 0, 8, 4))
    return image.convert(mode)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def png_header(width: int, height: int) -> bytes:
    """A PNG that states a size but contains no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"")


def error_message(source: bytes | str | Path) -> str:
    with pytest.raises(InputError) as caught:
        read_image(source, "images")
    text = str(caught.value)
    assert text.startswith("images: ")
    return text


@pytest.mark.parametrize(
    ("file_format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG2000", {}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 6),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 6),
        ("AVIF", {"quality": 95, "subsampling": "4:4:4"}, 12),
    ],
)
def test_formats_decode_to_the_same_pixels(
    file_format: str, options: dict[str, Any], tolerance: int
) -> None:
    image = read_image(encoded(two_colours(), file_format, **options))
    assert (image.mode, image.size) == ("RGB", (8, 4))
    difference = pixels(image).astype(int) - pixels(two_colours())
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("P", "PNG"), ("P", "GIF"), ("P", "BMP"), ("RGBA", "PNG"), ("CMYK", "TIFF")],
)
def test_colour_modes_convert_to_rgb(mode: str, file_format: str) -> None:
    source = two_colours(mode)
    assert Image.open(io.BytesIO(encoded(source, file_format))).mode == mode
    image = read_image(encoded(source, file_format))
    assert image.mode == "RGB"
    assert np.array_equal(pixels(image), pixels(two_colours()))


def test_cmyk_jpeg_is_not_inverted() -> None:
    """Pillow writes CMYK JPEGs inverted, as Adobe does."""
    image = read_image(encoded(two_colours("CMYK"), "JPEG", quality=95, subsampling=0))
    assert np.abs(pixels(image).astype(int) - pixels(two_colours())).max() <= 12


@pytest.mark.parametrize("mode", ["1", "L"])
def test_bilevel_and_grey_modes_convert_to_rgb(mode: str) -> None:
    source = Image.new(mode, (2, 1))
    source.putpixel((1, 0), 255)
    image = read_image(encoded(source, "PNG"))
    assert pixels(image).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_transparency_is_composited_over_white() -> None:
    rgba = Image.new("RGBA", (3, 1), (0, 0, 0, 0))  # black underneath
    rgba.putpixel((1, 0), (*RED, 255))
    rgba.putpixel((2, 0), (0, 0, 0, 51))
    for file_format in ("PNG", "TIFF"):
        image = read_image(encoded(rgba, file_format))
        assert pixels(image).tolist() == [[[255] * 3, list(RED), [204] * 3]]

    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (40, 255))
    assert pixels(read_image(encoded(grey, "PNG"))).tolist() == [[[255] * 3, [40] * 3]]


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(file_format: str) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, *RED])
    palette.putpixel((1, 0), 1)
    image = read_image(encoded(palette, file_format, transparency=0))
    assert pixels(image).tolist() == [[[255] * 3, list(RED)]]


def test_transparent_colour_of_an_rgb_file_becomes_white() -> None:
    image = read_image(encoded(two_colours(), "PNG", transparency=BLUE))
    assert pixels(image)[0].tolist() == [list(RED)] * 4 + [[255] * 3] * 4


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(file_format: str) -> None:
    levels = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    image = read_image(encoded(Image.fromarray(levels), file_format))
    grey = pixels(image)[..., 0].astype(int)
    assert np.array_equal(grey, np.rint(levels / 257))
    assert (grey.min(), grey.max()) == (0, 255)
    assert (np.diff(grey.ravel()) >= 0).all()


def test_big_endian_16_bit_grey_is_scaled() -> None:
    source = Image.frombytes("I;16B", (3, 1), struct.pack(">3H", 0, 257 * 100, 65535))
    image = read_image(encoded(source, "TIFF"))
    assert pixels(image)[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize(
    ("levels", "grey"),
    [
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-51, 0, 204]], np.int32), [0, 51, 255]),
        (np.array([[0, 10**6, 2 * 10**6]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.2, 1.0]], np.float32), [0, 51, 255]),
        (np.array([[10.0, 11.0, 20.0]], np.float32), [0, 26, 255]),
        (np.array([[np.inf, np.nan, 1.0]], np.float32), [0, 0, 255]),
        (np.array([[7.0, 7.0, 7.0]], np.float32), [0, 0, 0]),
    ],
)
def test_32_bit_and_float_grey_is_scaled(levels: np.ndarray, grey: list[int]) -> None:
    image = read_image(encoded(Image.fromarray(levels), "TIFF"))
    assert pixels(image)[0, :, 0].tolist() == grey


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_yields_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in (RED, BLUE)]
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    file = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert pixels(read_image(file)).reshape(-1, 3).tolist() == [list(RED)] * 30


def test_multi_picture_jpeg_is_read() -> None:
    """MPO, which many phones and 3D cameras save under the name of JPEG."""
    file = encoded(two_colours(), "MPO", save_all=True, append_images=[two_colours("L")])
    assert read_image(file).size == (8, 4)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(file_format: str, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), RED)
    upright.paste(BLUE, (0, 0, 16, 8))  # one corner: distinguishes all eight
    as_stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"subsampling": 0}, "WEBP": {"lossless": 1}}.get(file_format, {})
    image = read_image(encoded(as_stored, file_format, exif=exif, **options))
    assert image.size == (32, 16)
    assert np.abs(pixels(image).astype(int) - pixels(upright)).max() <= 6
    assert ORIENTATION not in image.getexif(), "it would be applied twice"


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_invalid_exif_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert read_image(encoded(two_colours(), "PNG", exif=exif)).size == (8, 4)


def test_broken_exif_data_is_ignored() -> None:
    file = encoded(two_colours(), "JPEG", exif=b"Exif\0\0no tags here")
    assert read_image(file).size == (8, 4)


def test_bytes_paths_and_open_files_are_accepted(tmp_path: Path) -> None:
    file = encoded(two_colours(), "PNG")
    path = tmp_path / "two colours.png"
    path.write_bytes(file)

    class Unseekable(io.BytesIO):
        def seekable(self) -> bool:
            return False

    at_the_end = io.BytesIO(file)
    at_the_end.seek(0, io.SEEK_END)
    with path.open("rb") as opened:
        for source in (file, str(path), path, opened, at_the_end, Unseekable(file)):
            assert np.array_equal(pixels(read_image(source)), pixels(two_colours()))
        assert not opened.closed


def test_one_pixel_image_is_read() -> None:
    assert read_image(encoded(Image.new("RGB", (1, 1), RED), "PNG")).getpixel((0, 0)) == RED


def test_empty_file_is_rejected(tmp_path: Path) -> None:
    assert "empty" in error_message(b"")
    (tmp_path / "empty.png").touch()
    assert "empty" in error_message(tmp_path / "empty.png")


@pytest.mark.parametrize(
    "file",
    [b"hello", b"\0" * 100, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>"],
)
def test_file_that_is_not_an_image_is_rejected(file: bytes) -> None:
    assert "not an image" in error_message(file)


def test_missing_file_and_directory_are_rejected(tmp_path: Path) -> None:
    assert "No such file" in error_message(tmp_path / "none.png")
    assert "directory" in error_message(str(tmp_path))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_file_is_rejected(file_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = encoded(Image.fromarray(noise), file_format)
    assert "damaged" in error_message(file[: int(len(file) * share)])


@pytest.mark.parametrize(("scans", "allowed"), [(MAX_SCANS, True), (MAX_SCANS + 1, False)])
def test_number_of_jpeg_scans_is_limited(scans: int, allowed: bool) -> None:
    file = encoded(two_colours(), "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    repeats = scans - file.count(b"\xff\xda")
    file = file[:last] + file[last:-2] * repeats + file[last:]
    if allowed:
        assert read_image(file).size == (8, 4)
    else:
        assert "101 scans, more than 100" in error_message(file)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about damaged TIFF files
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000"])
def test_damaged_file_raises_only_input_errors(file_format: str) -> None:
    file = encoded(two_colours().resize((40, 30)), file_format)
    random = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(file)
        for offset in random.integers(0, len(file), 4):
            damaged[offset] = random.integers(256)
        with suppress(InputError):
            assert read_image(bytes(damaged)).mode == "RGB"


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (10_000, 9_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_rejected_from_the_header(width: int, height: int) -> None:
    text = error_message(png_header(width, height))
    assert f"{width} x {height} pixels, more than the 64 megapixels" in text


def test_size_above_pillows_own_limit_gives_the_same_error() -> None:
    assert "more pixels than the 64 megapixels" in error_message(png_header(100_000, 100_000))


@pytest.mark.filterwarnings("error")
def test_pillows_size_warning_raised_as_an_error_gives_the_same_error() -> None:
    assert "more pixels than the 64 megapixels" in error_message(png_header(10_000, 9_000))


def test_exactly_the_maximum_number_of_pixels_is_allowed() -> None:
    assert MAX_PIXELS == 8000 * 8000
    assert "damaged" in error_message(png_header(8000, 8000))  # its pixels are missing


def test_image_without_pixels_is_rejected() -> None:
    assert "not an image" in error_message(png_header(0, 5))
    assert "not an image" in error_message(b"P6 0 5 255\n")
