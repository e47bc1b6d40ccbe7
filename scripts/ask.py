"""Ask a question about an image or a video through Cog's HTTP server: what `make predict` runs.

    python -m scripts.ask --image cat.jpg --question "What is the cat doing?" --model demo
    python -m scripts.ask --video clip.mp4 --question "Which way does the star move?"

Starts the server, sends the file, prints the answer while it is generated, and stops the server.
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
    kind, file, question = "image", arguments.image, arguments.question
    if arguments.video is not None:
        kind, file = "video", arguments.video
    elif file is None:
        file, question = _example(question)
    if not file.is_file():
        print(f"{kind}: there is no file {file}", file=sys.stderr)
        return 1
    with serving({"XGENMM_MODEL": arguments.model}) as server:
        try:
            loaded = server.wait_ready(LOAD_SECONDS, _progress(f"loading {arguments.model}"))
        except ServerError as failure:
            print(failure, file=sys.stderr)
            return 1
        model = f"{arguments.model} (loaded in {loaded:.1f} s)"
        return ask(server.url, file, question, model, kind)


def ask(url: str, file: Path, question: str, model: str, kind: str = "image") -> int:
    """Print the answer of the server at `url` as it streams; returns an exit status.

    model: its description, which is only printed.
    kind: the input that takes the file, `image` or `video`.
    """
    print(f"model     {model}")
    print(f"{kind}     {os.path.relpath(file)}")
    print(f"question  {question or f'(none: describe the {kind})'}")
    print("answer    ", end="", flush=True)
    started = time.monotonic()
    body = {"input": {kind: data_url(file), "question": question}}
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
    parser.add_argument("--video", type=_path, help="video file, instead of an image")
    parser.add_argument("--question", default="", help="default: describe the image or video")
    parser.add_argument(
        "--model", default="", help="a released name, a folder, or by default demo or demo-video"
    )
    arguments = parser.parse_args()
    if arguments.image is not None and arguments.video is not None:
        parser.error("--image and --video exclude each other; give one of them")
    arguments.model = arguments.model or ("demo" if arguments.video is None else "demo-video")
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
