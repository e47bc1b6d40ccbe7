"""The part `caption`: the program for datasets against loops of single predictions.

Measures loops over Cog's server and over an engine in this process, the program in one process, and
the program with Ray, all on the same images of the demo's world and the same question, in
alternating rounds. The time of tower, resampler and prefill alone limits what any program can gain,
since different images cannot share them.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import torch

import xgenmm
from scripts.benchmarks.report import Options, Row
from scripts.demo_model.drawing import draw
from scripts.demo_model.fonts import held_out_fonts
from scripts.demo_model.sampling import sample_scene
from scripts.local_server import data_url, predict, serving
from xgenmm.engine.reference import next_logits
from xgenmm.models.attention import GrowingCache

SEED = 7
QUESTION = "Describe the image."
LOAD_SECONDS = 120.0
PROGRAM = [sys.executable, "-m", "xgenmm", "caption"]


def caption(options: Options) -> list[Row]:
    """Measure `options.rounds` rounds, and compare the texts."""
    rates: dict[str, list[float]] = defaultdict(list)
    texts: dict[str, str] = {}
    ray = ["--ray", "local", "--actors", str(options.actors)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "images"
        _draw_images(images, options.images)
        files = sorted(images.iterdir())[: options.single]
        for number in range(options.rounds):
            share = files[number :: options.rounds]
            rates["loop over HTTP"].append(_http_loop(share, options.model))
            rate, loop_texts = _engine_loop(share, options.model)
            rates["loop in the process"].append(rate)
            texts |= loop_texts
            rates["tower, resampler and prefill alone"].append(_no_answers(share, options.model))
            output = folder / str(number)
            rate, rows = _program(images, output / "plain.jsonl", options.model)
            rates["program"].append(rate)
            rate, ray_rows = _program(images, output / "ray.jsonl", options.model, *ray)
            rates["the same with Ray"].append(rate)
    program_texts = {row["id"]: row["text"] for row in map(json.loads, rows)}
    same = [program_texts[file] == text for file, text in texts.items()]
    return [
        *_rate_rows(rates),
        Row("caption", "program's texts as the loop's", 100 * sum(same) / len(same), "%", 100),
        Row("caption", f"{len(rows)} rows the same with Ray", 100 * (rows == ray_rows), "%", 100),
    ]


def _rate_rows(rates: Mapping[str, Sequence[float]]) -> list[Row]:
    """The median of each rate, and of the rounds' ratios to the program's."""
    rows = []
    for what, measured in rates.items():
        rounds = ", ".join(f"{rate:.3g}" for rate in measured)
        median = statistics.median(measured)
        rows.append(Row("caption", f"{what} (rounds: {rounds})", median, "images/s"))
    for what, measured in rates.items():
        if what != "program":
            pairs = zip(rates["program"], measured, strict=True)
            ratio = statistics.median(program / rate for program, rate in pairs)
            goal = 1.25 if what == "the same with Ray" else None
            rows.append(Row("caption", f"program against {what}", ratio, "x", at_most=goal))
    return rows


def _draw_images(folder: Path, count: int) -> None:
    """Draw `count` scenes; equal counts give equal images."""
    folder.mkdir()
    rng, fonts = random.Random(SEED), held_out_fonts()
    for number in range(count):
        image = draw(sample_scene(rng, fonts, level=1.0))
        image.save(folder / f"{number:05}.png", compress_level=1)


def _http_loop(files: Sequence[Path], model: str) -> float:
    """Images a second of a client that asks Cog's server about one image after the other."""
    with serving({"XGENMM_MODEL": model}) as server, httpx.Client(base_url=server.url) as client:
        server.wait_ready(LOAD_SECONDS)
        started = time.monotonic()
        for path in files:
            inputs = {"image": data_url(path), "question": QUESTION}
            predict(client, json.dumps({"input": inputs}).encode())
        return len(files) / (time.monotonic() - started)


def _engine_loop(files: Sequence[Path], model: str) -> tuple[float, dict[str, str]]:
    """Images a second of a loop over an engine, and the texts by file name."""
    engine = xgenmm.load(model)
    texts = {}
    started = time.monotonic()
    for path in files:
        request = xgenmm.Request(QUESTION, [xgenmm.read_image(path)])
        texts[path.name] = engine.stream(request).text()
    rate = len(files) / (time.monotonic() - started)
    engine.close()
    return rate, texts


def _no_answers(files: Sequence[Path], model: str) -> float:
    """Images a second of the model up to the first logits, four at a time."""
    engine = xgenmm.load(model)
    tiles = [engine.preprocess_image(xgenmm.read_image(path)) for path in files]
    prompt = engine.prompt(xgenmm.Request(QUESTION, tiles[:1]))
    window = engine.config.decoder.window_keys
    started = time.monotonic()
    for first in range(0, len(tiles), 4):
        vision = engine.model.encode(tiles[first : first + 4])
        embeds = [engine.model.merge_multimodal_embeddings(prompt, [tokens]) for tokens in vision]
        next_logits(engine.model, torch.stack(embeds), 0, GrowingCache(window))
    rate = len(files) / (time.monotonic() - started)
    engine.close()
    return rate


def _program(folder: Path, output: Path, model: str, *options: str) -> tuple[float, list[bytes]]:
    """Images a second of the program, loading included, and its rows, sorted."""
    command = [*PROGRAM, str(folder), "-o", str(output), "--question", QUESTION, "--model", model]
    started = time.monotonic()
    subprocess.run([*command, *options], check=True)
    seconds = time.monotonic() - started
    rows = [line for part in output.glob("part-*") for line in part.read_bytes().splitlines()]
    return len(rows) / seconds, sorted(rows)
