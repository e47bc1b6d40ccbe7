"""`pipeline` on Ray Data: tasks on CPUs read and tile images and videos, actors with an engine
each answer.

Ray and pyarrow are imported only where they are used; they are optional dependencies.
"""

import functools
import json
import logging
import math
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from xgenmm.captioning.media import MediaReader
from xgenmm.captioning.pipeline import (
    MAX_NUM_SEQS,
    RECORDS_PER_SEQ,
    CaptionTask,
    answer_record,
    map_in_threads,
    preprocess_record,
)
from xgenmm.captioning.records import Record, Row
from xgenmm.checkpoints.registry import read_config, resolve
from xgenmm.errors import InputError
from xgenmm.preprocessing.fetch import FetchLimits
from xgenmm.preprocessing.tiling import TiledImage
from xgenmm.preprocessing.video import FrameSelection

RECORDS_PER_BLOCK = 32
"""Records that a task reads, and an actor receives, at a time."""

DOWNLOADS_PER_TASK = 8
"""Images or videos that a task downloads at a time. Each may need the memory that limits allow."""

BLOCKS_PER_ACTOR = RECORDS_PER_SEQ * MAX_NUM_SEQS // RECORDS_PER_BLOCK
"""Blocks that an actor works on at once, so that no sequence is idle when one block ends."""


def caption_with_ray(
    task: CaptionTask, records: Iterable[Record], address: str, num_actors: int | None = None
) -> Iterator[list[Row]]:
    """Yield the rows of each record as soon as they are complete, from a Ray Data pipeline.

    Ray replaces an actor or a worker that dies and repeats its unfinished blocks.

    Args:
        records: kept in Ray's memory all at once; their images and videos are not.
        address: of a running cluster (see `ray.init`), whose machines have this package, the
            checkpoint, its adapter and INPUT at the same paths; `local` starts a cluster on this
            machine.
        num_actors: number of engines; by default one per GPU, or one per CPU core without GPUs.

    Raises InputError if the cluster cannot be reached or is too small.
    """
    ray = _connect(address)
    try:
        num_actors, use_gpu = choose_actors(ray.cluster_resources(), task, num_actors)
        task = replace(
            task,
            model=str(resolve(task.model).absolute()),
            adapter=task.adapter and str(Path(task.adapter).expanduser().absolute()),
            device="cuda" if use_gpu else "cpu",  # an actor sees only the GPU that it reserved
        )
        results = _build_pipeline(ray, task, records, num_actors, use_gpu=use_gpu)
        for row in results.iter_rows():
            yield [Row(**cells) for cells in json.loads(row["rows"])]
    finally:
        ray.shutdown()


def choose_actors(
    resources: Mapping[str, float], task: CaptionTask, num_actors: int | None
) -> tuple[int, bool]:
    """Return the number of actors, and whether each reserves a GPU rather than a CPU core.

    resources: of the cluster, as `ray.cluster_resources` returns them.

    Raises InputError if the cluster has too few of what `task.device` and `num_actors` ask for.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    use_gpu = gpus > 0 and task.device != "cpu"
    if not use_gpu and task.device not in (None, "cpu"):
        raise InputError("device", f"the cluster has no GPU for {task.device!r}; use cpu")
    capacity = gpus if use_gpu else cpus - 1  # one core reads images
    num_actors = capacity if num_actors is None else num_actors
    if not 1 <= num_actors <= capacity:
        resource = "GPUs" if use_gpu else "CPU cores besides the one that reads images"
        raise InputError(
            "actors", f"{num_actors} do not fit: the cluster has {capacity} {resource}"
        )
    return num_actors, use_gpu


def _build_pipeline(
    ray: Any, task: CaptionTask, records: Iterable[Record], num_actors: int, *, use_gpu: bool
) -> Any:
    """Return the Ray dataset of answers; iterating over it runs the pipeline."""
    items = [{"record": json.dumps(asdict(record))} for record in records]
    blocks = max(1, -(-len(items) // RECORDS_PER_BLOCK))  # none is left after a late crash
    return (
        ray.data.from_items(items, override_num_blocks=blocks)
        .map_batches(
            preprocess_block,
            fn_args=[task],
            batch_size=None,
            batch_format="pyarrow",
            # Not the same resources as the actors, or Ray would fuse the two stages.
            num_cpus=0.75,
        )
        .map_batches(
            CaptionActor,
            fn_constructor_args=[task],
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=num_actors,
                max_concurrent_calls_per_actor=BLOCKS_PER_ACTOR,
                max_tasks_in_flight_per_actor=BLOCKS_PER_ACTOR,
                enable_true_multi_threading=True,
            ),
            num_cpus=0 if use_gpu else 1,
            num_gpus=1 if use_gpu else 0,
        )
    )


def preprocess_block(block: Any, task: CaptionTask) -> Any:
    """Run `preprocess_record` on a block of records, as a Ray task on a CPU.

    block: a pyarrow table with the column `record`, in JSON. Returns a table with an `error` next
    to it, or the `pixels` of all tiles and, as JSON in `images`, the other fields of each
    TiledImage.
    """
    import pyarrow

    reader = _reader(task.model, task.frames, task.limits)
    rows: list[dict[str, Any]] = []
    for record, download in _start_downloads(block["record"].to_pylist(), reader):
        images = preprocess_record(_parse_record(record), reader, download)
        if isinstance(images, str):
            rows.append({"record": record, "error": images})
        else:
            fields = [(i.pixels.shape, i.columns, i.rows, i.image_size) for i in images]
            pixels = b"".join(image.pixels.data for image in images)
            rows.append({"record": record, "images": json.dumps(fields), "pixels": pixels})
    schema = pyarrow.schema(
        {
            "record": pyarrow.string(),
            "error": pyarrow.string(),
            "images": pyarrow.string(),
            "pixels": pyarrow.large_binary(),
        }
    )
    return pyarrow.Table.from_pylist(rows, schema)


@functools.lru_cache(1)
def _reader(model: str, frames: FrameSelection, limits: FetchLimits) -> MediaReader:
    """The reader of this worker process, which runs one task at a time."""
    return MediaReader(read_config(resolve(model)), frames, limits, processes=1)


def _start_downloads(
    records: Sequence[str], reader: MediaReader
) -> Iterator[tuple[str, Future[bytes] | None]]:
    """Yield each record, in JSON, with its download; the next ones are in progress already."""
    downloads = deque[Future[bytes] | None]()
    for number, record in enumerate(records):
        while len(downloads) < min(DOWNLOADS_PER_TASK, len(records) - number):
            following = records[number + len(downloads)]
            downloads.append(reader.start_download(_parse_record(following)))
        yield record, downloads.popleft()


class CaptionActor:
    """A Ray actor with an engine. Ray calls it from several threads, with a block each."""

    def __init__(self, task: CaptionTask) -> None:
        self._task = task
        self._engine = task.load()

    def __call__(self, block: Any) -> Any:
        """Return the rows of each record of a table from `preprocess_block`, in JSON."""
        import pyarrow

        def answer(item: dict[str, Any]) -> list[Row]:
            record = _parse_record(item["record"])
            return answer_record(self._engine, self._task, record, _parse_images(item))

        answers = map_in_threads(answer, block.to_pylist(), len(block))
        return pyarrow.table({"rows": [json.dumps([asdict(row) for row in a]) for a in answers]})


def _parse_record(text: str) -> Record:
    fields = json.loads(text)
    return Record(**{**fields, "questions": tuple(fields["questions"])})


def _parse_images(item: dict[str, Any]) -> list[TiledImage] | str:
    if item["error"] is not None:
        return str(item["error"])
    images, offset = list[TiledImage](), 0
    for shape, columns, rows, (width, height) in json.loads(item["images"]):
        pixels = np.frombuffer(item["pixels"], np.uint8, math.prod(shape), offset).reshape(shape)
        images.append(TiledImage(pixels, columns, rows, (width, height)))
        offset += pixels.nbytes
    return images


def _connect(address: str) -> Any:
    """Connect to a Ray cluster, or start a local one, and return the module `ray`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise InputError("ray", "not installed; run `pip install 'ray[data]'`") from error
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    try:
        if address == "local":
            # The engines take a core each; Ray needs one more to run the tasks that read images.
            num_cpus = (os.cpu_count() or 1) + 1
            ray.init("local", num_cpus=num_cpus, include_dashboard=False, **settings)
        else:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if host and port.isdigit():  # fails at once; Ray would retry for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            with _single_attempt():
                ray.init(address, **settings)
    except (OSError, ValueError) as error:
        raise InputError("ray", f"no cluster at {address!r} ({error})") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


@contextmanager
def _single_attempt() -> Iterator[None]:
    """Let Ray try to connect once (41 s) rather than 20 times, in case the port is not Ray's.

    A value set by the user takes precedence. Unset afterwards, because starting a cluster takes
    longer.
    """
    name = "RAY_gcs_server_port_wait_time_s"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
