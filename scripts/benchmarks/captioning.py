"""Measure `python -m xgenmm.captioning.program` on images of the demo's world.

    python -m scripts.benchmarks.captioning            # 2,000 images; takes ten minutes

Compares loops of single predictions (of Cog's server over HTTP, and of an engine in the same
process), the program in one process, and the program with Ray, each with the same images and
question, and whether all give the same rows. They take turns, and a ratio is the median of the
rounds' ratios. What the model's tower, sampler and prefill need by themselves says how much a
program could gain at best: different images do not share them.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import httpx

import xgenmm
from scripts.demo_model import drawing, fonts, sampling
from scripts.local_server import data_url, predict, serving

SEED = 7
QUESTION = "Describe the image."
LOAD_SECONDS = 120.0


def main() -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="scripts.benchmarks.captioning", description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--single", type=int, default=400, help="images for each loop, in all")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of all of them, in turns")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        draw(images, options.images)
        files = sorted(images.iterdir())[: options.single]
        rates = defaultdict(list)
        texts: dict[str, str] = {}
        for number in range(options.rounds):
            shown = files[number :: options.rounds]
            rates["loop over HTTP"].append(predict_over_http(shown, options.model))
            rate, said = predict_one_by_one(shown, options.model)
            rates["loop in the process"].append(rate)
            texts |= said
            rates["without answers"].append(without_answers(shown, options.model))
            output = Path(folder) / str(number)
            rate, rows = caption(images, output / "plain.jsonl", options.model)
            rates["program"].append(rate)
            ray = ["--ray", "local", "--actors", str(options.actors)]
            rate, ray_rows = caption(images, output / "ray.jsonl", options.model, *ray)
            rates["with Ray"].append(rate)
    for what, measured in rates.items():
        against = statistics.median(a / b for a, b in zip(measured, rates["program"], strict=True))
        each = ", ".join(f"{rate:.2f}" for rate in measured)
        median = statistics.median(measured)
        print(f"{what}: {median:.2f} rows/s ({each}), {against:.3f} of the program's")
    same = sum(json.loads(row)["text"] == texts.get(json.loads(row)["id"]) for row in rows)
    print(f"texts as one by one: {same} of {len(texts)}")
    print(f"rows with Ray as without: {rows == ray_rows} ({len(rows)} rows)")
    return 0


def draw(folder: Path, count: int) -> None:
    """Draw `count` scenes; equal counts give equal images."""
    folder.mkdir()
    rng, faces = random.Random(SEED), fonts.held_out_fonts()
    for number in range(count):
        image = drawing.draw(sampling.sample_scene(rng, faces, level=1.0))
        image.save(folder / f"{number:05}.png", compress_level=1)


def predict_over_http(files: Sequence[Path], model: str) -> float:
    """Rows a second of a client that asks Cog's server about one image after another."""
    with serving({"XGENMM_MODEL": model}) as server, httpx.Client(base_url=server.url) as client:
        server.wait_ready(LOAD_SECONDS)
        started = time.monotonic()
        for path in files:
            given = {"image": data_url(path), "question": QUESTION}
            predict(client, json.dumps({"input": given}).encode())
        return len(files) / (time.monotonic() - started)


def predict_one_by_one(files: Sequence[Path], model: str) -> tuple[float, dict[str, str]]:
    """Rows a second and texts of a loop that asks an engine about one image after another."""
    engine = xgenmm.load(model)
    texts = {}
    started = time.monotonic()
    for path in files:
        request = xgenmm.Request(QUESTION, [xgenmm.read_image(path)])
        texts[path.name] = engine.stream(request).text()
    rate = len(files) / (time.monotonic() - started)
    engine.close()
    return rate, texts


def without_answers(files: Sequence[Path], model: str) -> float:
    """Images a second, with their prompts, four at a time, by the model alone and no answer."""
    engine = xgenmm.load(model)
    tiles = [engine.preprocess_image(xgenmm.read_image(path)) for path in files]
    prompt = engine.prompt(xgenmm.Request(QUESTION, tiles[:1]))
    cache = engine.model.cache(4, engine.config.decoder.max_positions)
    started = time.monotonic()
    for first in range(0, len(tiles), 4):
        shown = engine.model.encode(tiles[first : first + 4])
        engine.model.prefill(
            [engine.model.merge_multimodal_embeddings(prompt, [one]) for one in shown], cache
        )
    return len(files) / (time.monotonic() - started)


def caption(folder: Path, output: Path, model: str, *options: str) -> tuple[float, list[bytes]]:
    """Rows a second, loading included, and the sorted rows of the program."""
    command = [sys.executable, "-m", "xgenmm.captioning.program", str(folder), "-o", str(output)]
    started = time.monotonic()
    subprocess.run([*command, "--question", QUESTION, "--model", model, *options], check=True)
    seconds = time.monotonic() - started
    lines = [line for part in output.glob("part-*") for line in part.read_bytes().splitlines()]
    return len(lines) / seconds, sorted(lines)


if __name__ == "__main__":
    sys.exit(main())
