"""Ask a question about an image through Cog's HTTP server: what `make predict` runs.

    python -m scripts.ask --image cat.jpg --question "What is the cat doing?" --model demo

Starts the server, sends the image, prints the answer while it is generated, and stops the server.
Without arguments it asks the demo checkpoint about one of its example images.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from httpx_sse import connect_sse

from scripts.local_server import ROOT, ServerError, data_url, serving

EXAMPLES = ROOT / "weights" / "demo" / "examples"
LOAD_SECONDS = 600.0
PROGRESS_SECONDS = 2.0  # between lines that say what the program is waiting for


def main() -> int:
    """Run the program; returns its exit status."""
    arguments = _arguments()
    image, question = arguments.image, arguments.question
    if image is None:
        image, question = _example(question)
    if not image.is_file():
        print(f"image: there is no file {image}", file=sys.stderr)
        return 1
    with serving({"XGENMM_MODEL": arguments.model}) as server:
        try:
            loaded = server.wait_ready(LOAD_SECONDS, _progress(f"loading {arguments.model}"))
        except ServerError as failure:
            print(failure, file=sys.stderr)
            return 1
        return ask(server.url, image, question, f"{arguments.model} (loaded in {loaded:.1f} s)")


def ask(url: str, image: Path, question: str, model: str) -> int:
    """Print the answer of the server at `url` as it streams; returns an exit status.

    model: its description, which is only printed.
    """
    print(f"model     {model}")
    print(f"image     {os.path.relpath(image)}")
    print(f"question  {question or '(none: describe the image)'}")
    print("answer    ", end="", flush=True)
    started = time.monotonic()
    body = {"input": {"image": data_url(image), "question": question}}
    completed: dict[str, Any] = {"status": "failed", "error": "the server ended the answer early"}
    try:
        with (
            httpx.Client(timeout=None) as client,
            connect_sse(client, "POST", f"{url}/predictions", json=body) as source,
        ):
            if source.response.is_error:
                print(f"\n{source.response.read().decode()}", file=sys.stderr)
                return 1
            for event in source.iter_sse():
                if event.event == "output":
                    print(event.json()["chunk"], end="", flush=True)
                elif event.event == "completed":
                    completed = event.json()
    except httpx.TransportError as error:
        completed["error"] = f"the connection to the server was lost ({error})"
    seconds = time.monotonic() - started
    print()
    if completed["status"] != "succeeded":
        print(completed["error"], file=sys.stderr)
        return 1
    print(f"time      {seconds:.2f} s for {completed['metrics']['output_tokens']} tokens")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.ask",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # `make predict` passes an empty string for a variable that is not set.
    parser.add_argument("--image", type=_path, help="image file (default: one of the examples)")
    parser.add_argument("--question", default="", help="default: describe the image")
    parser.add_argument(
        "--model", default="demo", help="a released name, demo (the default), or a folder"
    )
    arguments = parser.parse_args()
    arguments.model = arguments.model or "demo"
    return arguments


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _example(question: str) -> tuple[Path, str]:
    """The first example image, with its own question unless another one is given."""
    example = json.loads((EXAMPLES / "questions.json").read_text())[0]
    return EXAMPLES / example["images"][0], question or example["question"]


def _progress(task: str) -> Callable[[float], None]:
    """A callback for `wait_ready` that prints a line every `PROGRESS_SECONDS`."""
    printed = 0.0

    def progress(seconds: float) -> None:
        nonlocal printed
        if seconds - printed >= PROGRESS_SECONDS:
            printed = seconds
            print(f"{task}: {seconds:.0f} s", file=sys.stderr)

    return progress


if __name__ == "__main__":
    sys.exit(main())
