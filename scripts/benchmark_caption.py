"""Measure `python -m xgenmm.caption` on pictures of the demo's world.

    python -m scripts.benchmark_caption            # 2,000 pictures; takes some minutes

Compares loops of single predictions (of Cog's server over HTTP, and of an engine in the same
process), the program in one process, and the program with Ray, each with the same pictures and
question, and whether all give the same rows. What the model's tower, sampler and prefill need by
themselves says how much a program could gain at best: different pictures do not share them.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

import xgenmm
from scripts import demo_world as world
from scripts.local_server import data_url, predict, serving

SEED = 7
QUESTION = "Describe the image."
LOAD_SECONDS = 120.0


def main() -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="scripts.benchmark_caption", description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--single", type=int, default=400, help="pictures for each loop")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--actors", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        draw(pictures, options.pictures)
        files = sorted(pictures.iterdir())[: options.single]
        single = len(files)
        seconds = predict_over_http(files, options.model)
        print(f"loop over HTTP: {single / seconds:.2f} rows/s", flush=True)
        seconds, texts = predict_one_by_one(files, options.model)
        print(f"loop in the process: {single / seconds:.2f} rows/s", flush=True)
        seconds = without_answers(files, options.model)
        print(f"tower, sampler and prefill alone: {single / seconds:.2f} rows/s", flush=True)
        plain, rows = caption(pictures, Path(folder) / "plain.jsonl", options.model)
        print(f"program: {len(rows) / plain:.2f} rows/s ({plain:.1f} s in all)", flush=True)
        ray = ["--ray", "local", "--actors", str(options.actors)]
        with_ray, ray_rows = caption(pictures, Path(folder) / "ray.jsonl", options.model, *ray)
        print(f"with Ray: {with_ray:.1f} s in all, {with_ray / plain - 1:+.0%}")
    same = sum(json.loads(row)["text"] == texts.get(json.loads(row)["id"]) for row in rows)
    print(f"texts as one by one: {same} of {single}")
    print(f"rows with Ray as without: {rows == ray_rows} ({len(rows)} rows)")
    return 0


def draw(folder: Path, count: int) -> None:
    """Draw `count` scenes; equal counts give equal pictures."""
    folder.mkdir()
    rng, fonts = random.Random(SEED), world.held_out_fonts()
    for number in range(count):
        picture = world.draw(world.sample_scene(rng, fonts, level=1.0))
        picture.save(folder / f"{number:05}.png", compress_level=1)


def predict_over_http(files: Sequence[Path], model: str) -> float:
    """Seconds of a client that asks Cog's server about one picture after another."""
    with serving({"XGENMM_MODEL": model}) as server, httpx.Client(base_url=server.url) as client:
        server.wait_ready(LOAD_SECONDS)
        started = time.monotonic()
        for path in files:
            given = {"image": data_url(path), "question": QUESTION}
            predict(client, json.dumps({"input": given}).encode())
        return time.monotonic() - started


def predict_one_by_one(files: Sequence[Path], model: str) -> tuple[float, dict[str, str]]:
    """Seconds and texts of a loop that asks an engine about one picture after another."""
    engine = xgenmm.load(model)
    texts = {}
    started = time.monotonic()
    for path in files:
        request = xgenmm.Request(QUESTION, [xgenmm.read_picture(path)])
        texts[path.name] = engine.stream(request).text()
    seconds = time.monotonic() - started
    engine.close()
    return seconds, texts


def without_answers(files: Sequence[Path], model: str) -> float:
    """Seconds that the model needs for all pictures and prompts, four at a time, and no answer."""
    engine = xgenmm.load(model)
    tiles = [engine.tiles(xgenmm.read_picture(path)) for path in files]
    prompt = engine.prompt(xgenmm.Request(QUESTION, tiles[:1]))
    cache = engine.model.cache(4, engine.config.decoder.max_positions)
    started = time.monotonic()
    for first in range(0, len(tiles), 4):
        shown = engine.model.encode(tiles[first : first + 4])
        engine.model.prefill([engine.model.fuse(prompt, [one]) for one in shown], cache)
    return time.monotonic() - started


def caption(folder: Path, output: Path, model: str, *options: str) -> tuple[float, list[bytes]]:
    """Seconds, loading included, and the sorted rows of the program."""
    command = [sys.executable, "-m", "xgenmm.caption", str(folder), "-o", str(output)]
    started = time.monotonic()
    subprocess.run([*command, "--question", QUESTION, "--model", model, *options], check=True)
    seconds = time.monotonic() - started
    lines = [line for part in output.glob("part-*") for line in part.read_bytes().splitlines()]
    return seconds, sorted(lines)


if __name__ == "__main__":
    sys.exit(main())
