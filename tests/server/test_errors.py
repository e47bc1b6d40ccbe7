"""Cog's server with invalid inputs, and without weights."""

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.client import SECONDS, ask, assert_answers, data_url, example_image
from tests.support.dockerignore import image_files
from tests.support.paths import ROOT
from tests.support.server import LocalServer, ServerError, serving


def oversized_png() -> bytes:
    """Only the header of an image of 10,000 x 10,000 pixels."""
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def references(count: int) -> dict[str, Any]:
    """A schema with a chain of references."""
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": {}}}


def patterns(count: int) -> dict[str, Any]:
    """Patterns of names that have to be compared with one another."""
    return {f"^k{i}$": {"type": "integer"} for i in range(count)}


INVALID_INPUTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no question and no image": (lambda: {}, "question: "),
    "question under another name": (
        lambda: {"prompt": "What is it?"},
        "Cog ignores inputs of other names, such as prompt",
    ),
    "marker without an image": (lambda: {"question": "<image> What is it?"}, "1"),
    "one marker for two images": (
        lambda: {
            "images": [example_image(), example_image()],
            "question": "<image> What is it?",
        },
        "2",
    ),
    "empty file": (lambda: {"image": data_url(b"")}, "image: the file is empty"),
    "not an image": (lambda: {"image": data_url(b"hello")}, "image: "),
    "second image damaged": (
        lambda: {"images": [example_image(), data_url(b"x")]},
        "images[1]: ",
    ),
    "over 64 megapixels": (lambda: {"image": data_url(oversized_png(), "PNG")}, "image: "),
    "file of the server": (lambda: {"image": str(ROOT / "LICENSE")}, "image: must be an http"),
    "path among images": (lambda: {"images": [example_image(), "b.png"]}, "images[1]: must be"),
    "prompt too long": (lambda: {"question": "star " * 10_000}, "question: "),
    "unknown role": (
        lambda: {"question": "?", "messages": [{"role": "god", "content": "?"}]},
        "messages: ",
    ),
    "beam search with a temperature": (
        lambda: {"image": example_image(), "num_beams": 2, "temperature": 1},
        "num_beams: ",
    ),
    "empty list of choices": (lambda: {"image": example_image(), "choices": []}, "choices: "),
    "repeated choice": (lambda: {"image": example_image(), "choices": ["a", "a"]}, "choices: "),
    "choices and a schema": (
        lambda: {"image": example_image(), "choices": ["a", "b"], "json_schema": {}},
        "json_schema: ",
    ),
    "invalid schema": (
        lambda: {"image": example_image(), "json_schema": {"type": "colour"}},
        "json_schema: ",
    ),
    "schema that overflows the stack": (
        lambda: {"question": "?", "json_schema": references(3_000)},
        "json_schema: takes more than 2 s or 256 MB to check, or nests too deeply",
    ),
    "schema that takes minutes": (
        lambda: {"question": "?", "json_schema": {"patternProperties": patterns(1_000)}},
        "json_schema: takes more than 2 s or 256 MB to check, or nests too deeply",
    ),
    "schema of 1 MB": (
        lambda: {"question": "?", "json_schema": {"const": "x" * 1_000_000}},
        "json_schema: has 1000005 characters or more; at most 131072 are allowed",
    ),
    "schema that cannot be enforced": (
        lambda: {"image": example_image(), "json_schema": {"not": {"type": "string"}}},
        "json_schema: ",
    ),
}


@pytest.mark.parametrize("name", INVALID_INPUTS)
def test_error_names_the_invalid_input_and_the_next_request_works(
    server: LocalServer, name: str
) -> None:
    inputs, message = INVALID_INPUTS[name]
    prediction = ask(server, **inputs())
    assert prediction["status"] == "failed"
    assert message in prediction["error"]
    assert_answers(server)


HEAVY_SCHEMAS: dict[str, dict[str, Any]] = {
    "8,000 required names": {"type": "object", "required": [f"key{i}" for i in range(8_000)]},
    "10,000 properties": {"properties": {f"key{i}": {"type": "integer"} for i in range(10_000)}},
    "1,500 references": references(1_500),
}


@pytest.mark.parametrize("name", HEAVY_SCHEMAS)
def test_server_survives_a_heavy_schema(server: LocalServer, name: str) -> None:
    """It is answered or refused, depending on how fast the machine is."""
    prediction = ask(server, question="?", json_schema=HEAVY_SCHEMAS[name], max_new_tokens=5)
    assert prediction["status"] == "succeeded" or "json_schema: " in prediction["error"]
    assert_answers(server)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2049),
        ("top_p", 1.5),
        ("temperature", "hot"),
        ("choices", "red"),
        ("json_schema", ["color"]),
    ],
)
def test_schema_rejects_a_value_of_wrong_type_or_out_of_range(
    server: LocalServer, name: str, value: object
) -> None:
    response = httpx.post(f"{server.url}/predictions", json={"input": {name: value}})
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["body", "input", name]
    assert_answers(server)


def test_error_names_a_url_that_cannot_be_read(server: LocalServer, file_server: str) -> None:
    prediction = ask(server, image=f"{file_server}/nothing.jpg")
    assert prediction["status"] == "failed"
    assert f"{file_server}/nothing.jpg" in prediction["error"]
    assert_answers(server)


def test_error_without_weights_says_which_command_downloads_them(tmp_path: Path) -> None:
    # What is in an image that was built before the weights were there, and what starts it.
    for name in (*image_files(ROOT), "openapi.json", "scripts/serve"):
        if not name.startswith("weights/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    environment = {"XGENMM_MODEL": "", "XGENMM_HOME": str(tmp_path / "weights")}
    with (
        serving(environment, root=tmp_path) as started,
        pytest.raises(ServerError, match=r"download xgen-mm-phi3-mini"),
    ):
        started.wait_ready(SECONDS)
