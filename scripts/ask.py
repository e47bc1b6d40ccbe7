"""Ask a question about an image through Cog's HTTP server: what `make predict` runs.

Starts the server, sends the image as a data URL, shows the answer as it streams, and stops the
server again. Left without arguments it asks the demo checkpoint about an image shipped with it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from scripts.local_server import ROOT, ServerError, data_url, events, serving

EXAMPLES = ROOT / "weights" / "demo" / "examples"
LOAD_SECONDS = 600.0
PATIENCE = 2.0
"""Seconds of silence after which a line says what is going on, and then between such lines."""


def main() -> int:
    """Run the program; return its exit status."""
    arguments = _arguments()
    image, question = arguments.image, arguments.question
    if image is None:
        image, question = _example(question)
    if not image.is_file():
        print(f"image: there is no file {image}", file=sys.stderr)
        return 1
    with serving({"XGENMM_MODEL": arguments.model}) as server:
        try:
            loaded = server.wait_ready(LOAD_SECONDS, _ticker(f"loading {arguments.model}"))
        except ServerError as failure:
            print(failure, file=sys.stderr)
            return 1
        return _ask(server.url, image, question, f"{arguments.model} (loaded in {loaded:.1f} s)")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts.ask", description=__doc__)
    parser.add_argument("--image", type=_file, help="the image; default: one that is shipped")
    parser.add_argument("--question", default="", help="default: describe the image")
    parser.add_argument("--model", default="demo", help="a released name, demo, or a folder")
    arguments = parser.parse_args()
    arguments.model = arguments.model or "demo"
    return arguments


def _file(text: str) -> Path | None:
    return Path(text) if text else None


def _example(question: str) -> tuple[Path, str]:
    """Return the first shipped image, and its own question unless another one is asked."""
    example = json.loads((EXAMPLES / "questions.json").read_text())[0]
    return EXAMPLES / example["images"][0], question or example["question"]


def _ask(url: str, image: Path, question: str, model: str) -> int:
    print(f"model     {model}")
    print(f"image   {os.path.relpath(image)}")
    print(f"question  {question or '(none: describe it)'}")
    print("answer    ", end="", flush=True)
    started = time.monotonic()
    with httpx.stream(
        "POST",
        f"{url}/predictions",
        headers={"Accept": "text/event-stream"},
        json={"input": {"image": data_url(image), "question": question}},
        timeout=None,
    ) as response:
        for name, data in events(response):
            if name == "output":
                print(data["chunk"], end="", flush=True)
            elif name == "completed":
                completed = data
    seconds = time.monotonic() - started
    print()
    if completed["status"] != "succeeded":
        print(completed["error"], file=sys.stderr)
        return 1
    print(f"time      {seconds:.2f} s for {completed['metrics']['output_tokens']} tokens")
    return 0


def _ticker(task: str) -> Callable[[float], None]:
    """Return a function of the seconds passed that writes a line every `PATIENCE` of them."""
    shown = 0.0

    def tick(seconds: float) -> None:
        nonlocal shown
        if seconds - shown >= PATIENCE:
            shown = seconds
            print(f"{task}: {seconds:.0f} s", file=sys.stderr)

    return tick


if __name__ == "__main__":
    sys.exit(main())
