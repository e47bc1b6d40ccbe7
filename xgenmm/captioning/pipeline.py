"""One stage for a dataset: records in, rows of answers out, in any order.

`in_process` keeps an engine's batches full. `with_ray` runs the same as a Ray Data pipeline: CPU
tasks read the images and cut them into tiles, apart from the actors, which have an engine each.
A record's rows are the same either way, whatever is answered beside it. The engine is imported
where it is needed: to a process that only reads, it would be seconds of loading libraries.
"""

import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from xgenmm.captioning.datasets import Record, Row, read_record
from xgenmm.checkpoints.registry import read_config, resolve
from xgenmm.config import XGenMMConfig
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.errors import InputError
from xgenmm.preprocessing.tiling import TiledImage, tile_image

if TYPE_CHECKING:
    from xgenmm.engine.engine import Engine

SLOTS = 32
"""Of an engine, where they fit."""

QUEUED = 2
"""Records in work for each slot of an engine: some are read while others are answered."""

PIECES = 8
"""Of encoding and prefill between two decode steps: nobody watches a stream, so fill the slots."""

BLOCK = 32
"""Records that Ray reads, and hands to an engine, at a time."""

IN_FLIGHT = QUEUED * SLOTS // BLOCK
"""Blocks at an actor."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class CaptionTask:
    """What is done to every record, and by which engine (see `xgenmm.load`)."""

    model: str
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    system_prompt: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def load(self) -> "Engine":
        """An engine in a process of its own. Raises as `xgenmm.load` does."""
        from xgenmm import load
        from xgenmm.engine.engine import favour_model_thread

        favour_model_thread()
        return load(
            self.model,
            self.device,
            self.dtype,
            max_num_seqs=SLOTS,
            quantize=self.quantize,
            prefill_batches_per_step=PIECES,
        )


def prepare(record: Record, config: XGenMMConfig) -> TiledImage | str:
    """A record's image in tiles, or what is wrong with it."""
    if record.error is not None:
        return record.error
    try:
        return tile_image(read_record(record), config.tiling, config.vision.image_size)
    except InputError as error:
        return str(error)


def answer(
    engine: "Engine", task: CaptionTask, record: Record, tiles: TiledImage | str
) -> list[Row]:
    """A row for each question of a record; one that cannot be answered says why.

    Raises EngineError if it is not the record's fault.
    """
    return [_answer(engine, task, record, tiles, question) for question in record.questions]


def _answer(
    engine: "Engine", task: CaptionTask, record: Record, tiles: TiledImage | str, question: str
) -> Row:
    from xgenmm.engine.engine import Request

    if isinstance(tiles, str):
        return Row(record.id, record.image, question, error=tiles)
    request = Request(question, [tiles], task.system_prompt, sampling=task.sampling)
    try:
        made = engine.stream(request)
        text = made.text()
    except InputError as error:
        return Row(record.id, record.image, question, error=str(error))
    usage = made.usage
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


def in_process(
    engine: "Engine", task: CaptionTask, records: Iterable[Record]
) -> Iterator[list[Row]]:
    """The rows of each record, as they are done."""
    reading = BoundedSemaphore(2 * (os.cpu_count() or 1))  # large images, decoded, are large

    def rows(record: Record) -> list[Row]:
        with reading:
            tiles = prepare(record, engine.config)
        return answer(engine, task, record, tiles)

    return _in_threads(rows, records, QUEUED * engine.max_num_seqs)


def _in_threads(
    work: Callable[[Item], list[Row]], items: Iterable[Item], threads: int
) -> Iterator[list[Row]]:
    """Yield what `work` makes of each item, `threads` at a time; take items only as needed."""
    remaining, running = iter(items), set[Future[list[Row]]]()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            running |= {pool.submit(work, i) for i in islice(remaining, threads - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


# Ray


def with_ray(
    task: CaptionTask, records: Iterable[Record], address: str, actors: int | None = None
) -> Iterator[list[Row]]:
    """The rows of each record, as they are done, from a Ray Data pipeline.

    What an actor or a worker was at when it died is done again by another.

    Args:
        records: held in Ray's memory as a whole; the images are not.
        address: of a running cluster (see `ray.init`), whose machines have this package, the
            checkpoint and INPUT at the same places; `local` starts one on this machine.
        actors: how many engines; by default one a GPU, and without GPUs one a CPU core.

    Raises InputError for a cluster that cannot be reached or is too small.
    """
    ray = _ray(address)
    try:
        actors, on_gpu = _actors(ray.cluster_resources(), task, actors)
        task = replace(
            task,
            model=str(resolve(task.model).absolute()),
            device="cuda" if on_gpu else "cpu",  # of its GPUs, a machine shows an actor one
        )
        items = [{"record": json.dumps(asdict(record))} for record in records]
        results = (
            ray.data.from_items(items, override_num_blocks=-(-len(items) // BLOCK))
            .map_batches(
                _read_block,
                fn_args=[task],
                batch_size=None,
                batch_format="pyarrow",
                # Reading waits for disk and network, but two readers on one core only cost a
                # second start. Like needs would let Ray join the two stages.
                num_cpus=0.75,
            )
            .map_batches(
                _EngineActor,
                fn_constructor_args=[task],
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    size=actors,
                    # Several blocks at once, so that the end of one leaves no slot empty.
                    max_concurrent_calls_per_actor=IN_FLIGHT,
                    max_tasks_in_flight_per_actor=IN_FLIGHT,
                    enable_true_multi_threading=True,
                ),
                num_cpus=0 if on_gpu else 1,
                num_gpus=1 if on_gpu else 0,
            )
        )
        for row in results.iter_rows():
            yield [Row(**cells) for cells in json.loads(row["rows"])]
    finally:
        ray.shutdown()


def _actors(
    resources: Mapping[str, float], task: CaptionTask, wanted: int | None
) -> tuple[int, bool]:
    """How many actors, and whether each takes a GPU or a CPU core."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    on_gpu = gpus > 0 and task.device != "cpu"
    if not on_gpu and task.device not in (None, "cpu"):
        raise InputError("device", f"{task.device} was asked for, but the cluster has no GPU")
    room = gpus if on_gpu else cpus - 1  # one core reads
    actors = room if wanted is None else wanted
    if not 1 <= actors <= room:
        kind = "GPUs" if on_gpu else "CPU cores beside the one that reads"
        raise InputError("actors", f"{actors} do not fit: the cluster has {room} {kind}")
    return actors, on_gpu


def _ray(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise InputError("ray", "install it: pip install -r requirements-data.txt") from error
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    try:
        if address == "local":
            cores = os.cpu_count() or 1
            ray.init("local", num_cpus=cores + 1, include_dashboard=False, **settings)
        else:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if host and port.isdigit():  # Ray itself looks for it for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            with _asked_once():
                ray.init(address, **settings)
    except (OSError, ValueError) as error:
        raise InputError("ray", f"no cluster at {address!r} ({error})") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


@contextmanager
def _asked_once() -> Iterator[None]:
    """Ray asks a cluster once (41 s) and not twenty times: what is there may be something else."""
    name = "RAY_gcs_server_port_wait_time_s"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]  # to start a cluster it may take longer


def _read_block(block: Any, task: CaptionTask) -> Any:
    """Add to records their tiles, or what is wrong; runs in a Ray task on a CPU."""
    import pyarrow

    config = read_config(resolve(task.model))
    rows = []
    for text in block["record"].to_pylist():
        tiles = prepare(_record(text), config)
        if isinstance(tiles, str):
            rows.append({"record": text, "error": tiles})
        else:
            rows.append(
                {
                    "record": text,
                    "pixels": tiles.pixels.tobytes(),
                    "shape": list(tiles.pixels.shape),
                    "columns": tiles.columns,
                    "rows": tiles.rows,
                    "image_size": list(tiles.image_size),
                }
            )
    sizes = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema(
        {
            "record": pyarrow.string(),
            "error": pyarrow.string(),
            "pixels": pyarrow.large_binary(),
            "shape": sizes,
            "columns": pyarrow.int32(),
            "rows": pyarrow.int32(),
            "image_size": sizes,
        }
    )
    return pyarrow.Table.from_pylist(rows, schema)


def _record(text: str) -> Record:
    cells = json.loads(text)
    return Record(**{**cells, "questions": tuple(cells["questions"])})


class _EngineActor:
    """A Ray actor with an engine, which answers the records of several blocks at once."""

    def __init__(self, task: CaptionTask) -> None:
        self._task = task
        self._engine = task.load()

    def __call__(self, block: Any) -> Any:
        import pyarrow

        def rows(item: dict[str, Any]) -> list[Row]:
            return answer(self._engine, self._task, _record(item["record"]), _tiles(item))

        done = _in_threads(rows, block.to_pylist(), len(block))
        return pyarrow.table({"rows": [json.dumps([asdict(row) for row in r]) for r in done]})


def _tiles(item: dict[str, Any]) -> TiledImage | str:
    if item["error"] is not None:
        return str(item["error"])
    pixels = np.frombuffer(item["pixels"], dtype=np.uint8).reshape(item["shape"])
    width, height = item["image_size"]
    return TiledImage(pixels, item["columns"], item["rows"], (width, height))
