"""Samples -> the batches of each step, read ahead in threads, the same on any number of devices."""

import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from xgenmm.config import XGenMMConfig
from xgenmm.errors import InputError
from xgenmm.finetuning.batch import IGNORED, Row
from xgenmm.finetuning.conversation import MAX_TEXT_TOKENS, tokenize
from xgenmm.finetuning.dataset import PlacedSample
from xgenmm.finetuning.images import ImageReader
from xgenmm.preprocessing.tiling import tile_image
from xgenmm.preprocessing.tokenizer import Tokenizer

AHEAD = 2  # steps that are read while one is computed


@dataclass(frozen=True)
class RowReader:
    """Makes the row of a sample: tokens and the tiles of its images."""

    config: XGenMMConfig
    tokenizer: Tokenizer
    images: ImageReader
    max_tokens: int = MAX_TEXT_TOKENS

    def read(self, placed: PlacedSample) -> Row:
        """Raises InputError, naming the sample, if an image cannot be read any more."""
        tokens = tokenize(placed.sample.turns, self.tokenizer, self.max_tokens)
        tiling, side = self.config.tiling, self.config.vision.image_size
        folder = placed.place.file.parent
        images = (self.images.read(source, folder) for source in placed.sample.images)
        try:
            tiles = tuple(tile_image(image, tiling, side) for image in images)
        except InputError as error:
            raise InputError("DATA", f"{placed.place}: {error}") from error
        return Row(tokens.ids, tokens.labels, tiles)


@dataclass(frozen=True)
class Plan:
    """Which samples are in which step: each epoch all of them, in an order of its own.

    Attributes:
        samples: number of samples.
        batch_size: samples of a step, over all devices; the last of an epoch has the rest.
        micro_batch_size: samples that a device computes at once.
    """

    samples: int
    batch_size: int
    micro_batch_size: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch."""
        return -(-self.samples // self.batch_size)

    @property
    def steps(self) -> int:
        """Steps of all epochs."""
        return self.steps_per_epoch * self.epochs

    def step(self, step: int) -> list[list[int]]:
        """Return the samples of each micro-batch of a step, counted from 0."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = list(range(self.samples))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
        size = self.micro_batch_size
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]


def read_steps(
    plan: Plan,
    samples: Sequence[PlacedSample],
    reader: RowReader,
    first: int = 0,
    device: int = 0,
    devices: int = 1,
) -> Iterator[tuple[int, list[list[Row]]]]:
    """Yield the number of each step from `first` on, and this device's batches.

    All devices get equally many batches: one that would have too few gets one without labels.
    """
    executor = ThreadPoolExecutor(min(os.cpu_count() or 1, 8))
    try:
        waiting: deque[tuple[int, list[list[Future[Row]]], bool]] = deque()
        for step in range(first, plan.steps):
            batches = plan.step(step)
            own = batches[device::devices]
            # A device without a batch computes one all the same: the others wait for its gradient.
            idle = len(own) < -(-len(batches) // devices)
            chosen = own + batches[:1] * idle
            futures = [[executor.submit(reader.read, samples[i]) for i in one] for one in chosen]
            waiting.append((step, futures, idle))
            if len(waiting) > AHEAD:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:  # after an error or Ctrl-C, do not read what is not needed any more
        executor.shutdown(cancel_futures=True)


def _result(
    step: int, futures: Sequence[Sequence[Future[Row]]], idle: bool
) -> tuple[int, list[list[Row]]]:
    """idle: whether the last batch only fills up, so that nothing of it is learned."""
    batches = [[future.result() for future in one] for one in futures]
    if idle:
        batches[-1] = [Row(r.ids, (IGNORED,) * len(r.ids), r.images) for r in batches[-1]]
    return step, batches
