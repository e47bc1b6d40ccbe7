"""Everything about a dataset that can go wrong in training, found before the first step."""

import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from xgenmm.config import Size, XGenMMConfig
from xgenmm.errors import InputError
from xgenmm.finetuning.batch import IGNORED
from xgenmm.finetuning.conversation import MAX_TEXT_TOKENS, Tokens, marked_text, tokenize
from xgenmm.finetuning.dataset import Dataset, Fault, Place, PlacedSample
from xgenmm.finetuning.images import ImageReader
from xgenmm.preprocessing.tiling import select_best_resolution
from xgenmm.preprocessing.tokenizer import Tokenizer

WORKERS = min(os.cpu_count() or 1, 16)
CONTROL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Report:
    """What a dataset holds, and what is wrong with it.

    Attributes:
        faults: nothing is trained if there is any.
        text_tokens, positions: of each sample, before the cut; positions count vision tokens too.
        learned: labels of each sample, after the cut.
        cut, nothing_left, too_long, spelled: the places of samples that lose text, that have no
            label left, that take more positions than the model was trained with, and whose text
            spells a control token.
        example: one sample as text, what is learned in `[[` and `]]`.
    """

    counts: dict[Path, int]
    faults: list[Fault]
    images: Counter[int] = field(default_factory=Counter)
    text_tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    cut: list[Place] = field(default_factory=list)
    nothing_left: list[Place] = field(default_factory=list)
    too_long: list[Place] = field(default_factory=list)
    spelled: list[Place] = field(default_factory=list)
    example: str = ""


def check_dataset(
    dataset: Dataset,
    config: XGenMMConfig,
    tokenizer: Tokenizer,
    reader: ImageReader,
    max_tokens: int = MAX_TEXT_TOKENS,
    progress: Callable[[], object] = lambda: None,
) -> Report:
    """Tokenize every sample and decode every image, each once.

    progress: called after each image.
    """
    report = Report(dataset.counts, list(dataset.faults))
    vision_tokens = _check_images(dataset.samples, config, reader, report, progress)
    for placed in dataset.samples:
        tokens = tokenize(placed.sample.turns, tokenizer, max_tokens)
        sizes = [vision_tokens.get(key, 0) for key in _image_keys(placed)]
        _add_sample(report, placed, tokens, tokens.uncut + sum(sizes) - len(sizes), config)
        if not report.example and any(label != IGNORED for label in tokens.labels):
            report.example = f"{placed.place}\n{marked_text(tokens, tokenizer)}"
    return report


def _add_sample(
    report: Report, placed: PlacedSample, tokens: Tokens, positions: int, config: XGenMMConfig
) -> None:
    learned = sum(label != IGNORED for label in tokens.labels)
    report.images[len(placed.sample.images)] += 1
    report.text_tokens.append(tokens.uncut)
    report.positions.append(positions)
    report.learned.append(learned)
    if tokens.uncut > len(tokens.ids):
        report.cut.append(placed.place)
    if not learned:
        report.nothing_left.append(placed.place)
    if positions > config.decoder.max_positions:
        report.too_long.append(placed.place)
    texts = [turn.text for turn in placed.sample.turns]
    if any(token in text for text in texts for token in CONTROL_TOKENS):
        report.spelled.append(placed.place)


def _image_keys(placed: PlacedSample) -> list[tuple[Path, str]]:
    folder = placed.place.file.parent
    return [(folder, source) for source in placed.sample.images]


def _check_images(
    samples: Sequence[PlacedSample],
    config: XGenMMConfig,
    reader: ImageReader,
    report: Report,
    progress: Callable[[], object],
) -> dict[tuple[Path, str], int]:
    """Decode every image and return the vision tokens of each.

    An image that cannot be read is a fault of every sample that has it.
    """
    places: dict[tuple[Path, str], list[Place]] = {}
    for placed in samples:
        for key in _image_keys(placed):
            places.setdefault(key, [])
            if placed.place not in places[key]:
                places[key].append(placed.place)

    def size(key: tuple[Path, str]) -> Size | InputError:
        try:
            return reader.read(key[1], key[0]).size
        except InputError as error:
            return error

    vision_tokens = {}
    for key, found in zip(places, _map(size, list(places)), strict=True):
        progress()
        if isinstance(found, InputError):
            report.faults += [Fault(place, str(found)) for place in places[key]]
        else:
            vision_tokens[key] = count_tiles(found, config) * config.resampler.num_latents
    return vision_tokens


def _map(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Call a function in threads, with a bounded number of results waiting; results in order."""
    with ThreadPoolExecutor(WORKERS) as executor:
        for start in range(0, len(items), 64 * WORKERS):
            yield from executor.map(function, items[start : start + 64 * WORKERS])


def count_tiles(size: Size, config: XGenMMConfig) -> int:
    """How many tiles an image of this size becomes, the base tile included."""
    if config.tiling.mode != "anyres":
        return 1
    width, height = select_best_resolution(size, config.tiling.grids)
    side = config.vision.image_size
    return 1 + (width // side) * (height // side)


def describe(report: Report, max_tokens: int, max_positions: int) -> str:
    """Return the report as lines of text, without its faults."""
    lines = [f"{_samples(count)} of {file}" for file, count in report.counts.items()]
    lines += [
        f"{_samples(count)} with {images} {'image' if images == 1 else 'images'}"
        for images, count in sorted(report.images.items())
    ]
    for name, values in (
        ("text tokens", report.text_tokens),
        ("positions, with vision tokens", report.positions),
        ("learned tokens", report.learned),
    ):
        if values:
            middle, largest = statistics.median(values), max(values)
            lines.append(
                f"{name}: {min(values):,} to {largest:,}, median {middle:,.0f}, sum {sum(values):,}"
            )
    for places, problem in (
        (report.cut, f"with text beyond {max_tokens:,} tokens, which is cut"),
        (report.nothing_left, "without an answer to learn after the cut"),
        (report.too_long, f"of more than the model's {max_positions:,} positions"),
        (report.spelled, "that spell control tokens such as <|end|>, which are read as such"),
    ):
        lines.append(f"{_samples(len(places))} {problem}{_shown(places)}")
    if report.example:
        lines.append(f"\nA sample, what is learned in [[ ]]: {report.example}")
    return "\n".join(lines)


def _samples(count: int) -> str:
    return f"{count:>9,} sample{'s' * (count != 1)}"


def _shown(places: Sequence[Place], most: int = 20) -> str:
    if not places:
        return ""
    more = f", and {len(places) - most:,} more" if len(places) > most else ""
    return ": " + ", ".join(str(place) for place in places[:most]) + more
