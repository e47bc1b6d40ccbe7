"""Answer the questions of records, several records at a time: records in, rows out, in any order.

A record's rows do not depend on the records answered with it, nor on whether `caption_in_process`
or `ray_pipeline.caption_with_ray` runs them. `xgenmm.load` and `xgenmm.Request` are only looked up
when needed, because they import PyTorch, which processes that only read records do not need.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue
from threading import BoundedSemaphore, Thread
from typing import TYPE_CHECKING, TypeVar

import xgenmm
from xgenmm.captioning.media import MediaReader
from xgenmm.captioning.records import Record, Row
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.errors import InputError
from xgenmm.preprocessing.fetch import FetchLimits
from xgenmm.preprocessing.tiling import TiledImage
from xgenmm.preprocessing.video import FrameSelection

if TYPE_CHECKING:
    from xgenmm import Engine

MAX_NUM_SEQS = 32
"""Requests that an engine answers at once, memory permitting."""

RECORDS_PER_SEQ = 2
"""Records in progress per sequence of an engine: some are read while others are answered."""

MAX_NUM_BATCHED_TOKENS = 4096
"""Many, because no one watches a stream here: throughput matters, even steps do not."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class CaptionTask:
    """How to answer each record, the engine to use (see `xgenmm.load`), and limits of downloads.

    adapter: folder or tar of an adapter for the model.
    frames: to take from each video.
    """

    model: str
    adapter: str | None = None
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    system_prompt: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    limits: FetchLimits = field(default_factory=FetchLimits)
    frames: FrameSelection = field(default_factory=FrameSelection)

    def load(self) -> "Engine":
        """Load the engine. Raises as `xgenmm.load` does."""
        return xgenmm.load(
            self.model,
            self.device,
            self.dtype,
            max_num_seqs=MAX_NUM_SEQS,
            quantize=self.quantize,
            adapter=self.adapter,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        )


def preprocess_record(
    record: Record, reader: MediaReader, download: Future[bytes] | None
) -> list[TiledImage] | str:
    """Return a record's image, or frames of its video, in tiles; or the error of the record.

    download: what `reader.start_download` returned.
    """
    if record.error is not None:
        return record.error
    try:
        return reader.read(record, download)
    except InputError as error:
        return str(error)


def answer_record(
    engine: "Engine", task: CaptionTask, record: Record, images: Sequence[TiledImage] | str
) -> list[Row]:
    """Return a row for each question of a record.

    images: what `preprocess_record` returned; an error is copied to all rows.

    Invalid input becomes the error of its row. Raises EngineError if the engine itself fails.
    """
    return [_answer(engine, task, record, images, question) for question in record.questions]


def _answer(
    engine: "Engine",
    task: CaptionTask,
    record: Record,
    images: Sequence[TiledImage] | str,
    question: str,
) -> Row:
    if isinstance(images, str):
        return Row(record.id, record.image, question, error=images)
    request = xgenmm.Request(question, images, task.system_prompt, sampling=task.sampling)
    try:
        answer = engine.stream(request)
        text = answer.text()
    except InputError as error:
        return Row(record.id, record.image, question, error=str(error))
    usage = answer.usage
    return Row(
        record.id,
        record.image,
        question,
        text,
        usage.prompt_tokens,
        usage.image_tokens,
        usage.output_tokens,
        usage.stop_reason,
    )


def caption_in_process(
    engine: "Engine", task: CaptionTask, records: Iterable[Record]
) -> Iterator[list[Row]]:
    """Yield the rows of each record as soon as they are complete."""
    reading = BoundedSemaphore(2 * (os.cpu_count() or 1))  # bounds the memory of decoded images
    reader = MediaReader(engine.config, task.frames, task.limits)

    def answer(record: Record) -> list[Row]:
        download = reader.start_download(record)
        if download is not None:
            wait([download])  # before `reading`, so that slow servers do not delay other images
        with reading:
            images = preprocess_record(record, reader, download)
        return answer_record(engine, task, record, images)

    yield from map_in_threads(answer, records, RECORDS_PER_SEQ * engine.max_num_seqs)
    reader.close()  # not when the caller stops early: it would wait for videos in progress


def map_in_threads(
    function: Callable[[Item], list[Row]], items: Iterable[Item], threads: int
) -> Iterator[list[Row]]:
    """Yield `function(item)` of each item in order of completion, taking items only as needed.

    The threads are daemons: a caller that stops early, or a program that is interrupted, does not
    wait for the items in progress.
    """
    started, finished = SimpleQueue[Item | None](), SimpleQueue[Future[list[Row]]]()

    def work() -> None:
        while (item := started.get()) is not None:
            result: Future[list[Row]] = Future()
            try:
                result.set_result(function(item))
            except BaseException as error:
                result.set_exception(error)
            finished.put(result)

    remaining, running, pool = iter(items), 0, list[Thread]()
    try:
        while True:
            for item in islice(remaining, threads - running):
                started.put(item)
                running += 1
            if not running:
                return
            while len(pool) < running:
                pool.append(Thread(target=work, daemon=True))
                pool[-1].start()
            yield finished.get().result()
            running -= 1
    finally:
        for _ in pool:
            started.put(None)
