"""Measure `python -m xgenmm.caption` on pictures of the demo's world.

    python -m scripts.benchmark_caption            # 2,000 pictures; takes some minutes

Compares a loop of single predictions, the program in one process, and the program with Ray, each
with the same pictures and question, and whether all give the same rows.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import xgenmm
from scripts import demo_world as world

SEED = 7
QUESTION = "Describe the image."


def main() -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="scripts.benchmark_caption", description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--single", type=int, help="pictures for the loop; default: all")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--actors", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        draw(pictures, options.pictures)
        single = options.single or options.pictures
        seconds, texts = predict_one_by_one(pictures, options.model, single)
        print(f"one by one: {single / seconds:.2f} rows/s ({seconds:.1f} s)")
        plain, rows = caption(pictures, Path(folder) / "plain.jsonl", options.model)
        print(f"in one process: {plain:.1f} s in all")
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


def predict_one_by_one(folder: Path, model: str, count: int) -> tuple[float, dict[str, str]]:
    """Seconds and texts of a loop that asks about one picture after another."""
    engine = xgenmm.load(model)
    texts = {}
    started = time.monotonic()
    for path in sorted(folder.iterdir())[:count]:
        request = xgenmm.Request(QUESTION, [xgenmm.read_picture(path)])
        texts[path.name] = engine.stream(request).text()
    seconds = time.monotonic() - started
    engine.close()
    return seconds, texts


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
