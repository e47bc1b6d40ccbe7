"""Decides what the engine runs next. Plain data in, plain data out: no torch, model or threads.

A request waits until enough batch slots are free, one for each of its beams, and keeps them until
it finishes. Between two decode steps, which serve all decoding requests at once, the engine runs a
limited amount of prefill work: a batch of images to encode, or a batch of prompt chunks. So the
time between two tokens of a stream has a bound that does not depend on how much is waiting.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from xgenmm.engine.request import EngineRequest
from xgenmm.preprocessing.tiling import TiledImage


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of the work between two decode steps, and the intervals of the engine's loop.

    prefill_batches_per_step: batches of images or prompt chunks between two decode steps. One keeps
        streams even; more raise throughput.
    max_chunk_tokens: prompt positions of one batch of chunks, padding included.
    max_encode_tiles: tiles of one batch of images. For the released models, 6 tiles cost about as
        much as 512 positions.
    max_idle_encode_tiles: the same while no request is decoding.
    overlapped_steps: decode steps that begin before the tokens of earlier ones reach the host.
    stall_seconds: a busy engine without a step for this long counts as stuck.
    summary_seconds: interval of activity between two summaries in the log.
    """

    prefill_batches_per_step: int = 1
    max_chunk_tokens: int = 512
    max_encode_tiles: int = 6
    max_idle_encode_tiles: int = 6
    overlapped_steps: int = 0
    stall_seconds: float = 300.0
    summary_seconds: float = 60.0

    @classmethod
    def for_device(cls, device_type: str, prefill_batches_per_step: int = 1) -> "SchedulerConfig":
        """The defaults for `cpu` or `cuda`.

        A CPU gains nothing from overlapped steps or from larger batches of tiles.
        """
        if device_type == "cuda":
            return cls(prefill_batches_per_step, max_idle_encode_tiles=32, overlapped_steps=1)
        return cls(prefill_batches_per_step)


@dataclass(frozen=True)
class EncodeBatch:
    """Images to encode together.

    images: by hash, each once. users: for each hash, the requests that need the image and its index
    among their images.
    """

    images: Mapping[bytes, TiledImage]
    users: Mapping[bytes, Sequence[tuple[EngineRequest, int]]]

    @property
    def requests(self) -> list[EngineRequest]:
        """The requests that need any of the images, each once."""
        return list({request: None for users in self.users.values() for request, _ in users})

    @property
    def num_tiles(self) -> int:
        """Tiles of all images."""
        return sum(image.pixels.shape[0] for image in self.images.values())


@dataclass(frozen=True)
class PrefillChunk:
    """The prompt positions `start` to `start + length` of a request."""

    request: EngineRequest
    start: int
    length: int


@dataclass(frozen=True)
class PrefillBatch:
    """Prompt chunks of different requests to compute together."""

    chunks: Sequence[PrefillChunk]


@dataclass(frozen=True)
class DecodeBatch:
    """One token of each decoding request.

    num_slots: the step runs over the slots 0 to `num_slots` - 1, decoding or not.
    num_keys: cached positions to attend to, an upper bound for all of these slots.
    """

    requests: Sequence[EngineRequest]
    num_slots: int
    num_keys: int


class Scheduler:
    """The waiting and running requests of an engine, and the free batch slots.

    Args:
        num_slots: rows of the batch, and so of the KV cache.
        config: limits of each batch.
        padded_length: length to which the model pads a prompt chunk.
    """

    def __init__(
        self,
        num_slots: int,
        config: SchedulerConfig,
        padded_length: Callable[[int], int] = lambda length: length,
    ) -> None:
        self.num_slots = num_slots
        self.config = config
        self.waiting: deque[EngineRequest] = deque()
        self.running: list[EngineRequest] = []
        self.free_slots = set(range(num_slots))
        self._padded_length = padded_length

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    @property
    def decoding(self) -> list[EngineRequest]:
        """The running requests whose prompt has been computed."""
        return [request for request in self.running if request.decoding]

    @property
    def overlapped_steps(self) -> int:
        """Decode steps that may begin before the host has seen the tokens of earlier ones.

        0 if a request has a grammar or beams: both need a token to prepare the next step.
        """
        for request in self.decoding:
            if request.grammar is not None or request.beam_search is not None:
                return 0
        return self.config.overlapped_steps

    def add(self, request: EngineRequest) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def admit(self) -> Iterator[EngineRequest]:
        """Move waiting requests to free slots, in order of arrival, and yield each.

        A request gets the lowest free slots, because a decode step runs over all slots up to the
        last one in use. Slots freed during the iteration are reused.
        """
        while self.waiting and len(self.free_slots) >= self.waiting[0].num_slots:
            request = self.waiting.popleft()
            request.slots = sorted(self.free_slots)[: request.num_slots]
            self.free_slots.difference_update(request.slots)
            self.running.append(request)
            yield request

    def remove(self, request: EngineRequest) -> None:
        """Forget a waiting or running request and free its slots."""
        if request in self.running:
            self.running.remove(request)
            self.free_slots.update(request.slots)
        else:
            self.waiting.remove(request)

    def expired(self, now: float) -> list[EngineRequest]:
        """The requests whose deadline has passed at `time.monotonic` seconds `now`."""
        return [request for request in [*self.running, *self.waiting] if now > request.deadline]

    def cancelled(self) -> list[EngineRequest]:
        """The requests that their callers have cancelled."""
        return [request for request in [*self.running, *self.waiting] if request.sink.cancelled]

    def prefill_work(self) -> EncodeBatch | PrefillBatch | None:
        """The next work for requests that are not decoding yet; the oldest determines its kind."""
        oldest = next((request for request in self.running if not request.decoding), None)
        if oldest is None:
            return None
        return self._encode_batch() if oldest.pending_images else self._prefill_batch()

    def decode_batch(self) -> DecodeBatch | None:
        """The next decode step, or None if no request is decoding.

        The number of slots is a power of two, so that few shapes occur.
        """
        requests = self.decoding
        if not requests:
            return None
        last = max(slot for request in requests for slot in request.slots)
        # Slots that are not decoding also write a key, at their next position.
        num_keys = 1 + max(request.num_computed_tokens for request in self.running)
        return DecodeBatch(requests, min(self.num_slots, 1 << last.bit_length()), num_keys)

    def _encode_batch(self) -> EncodeBatch:
        """The longest waiting images that fit the limit, and always at least one."""
        config = self.config
        room = config.max_encode_tiles if self.decoding else config.max_idle_encode_tiles
        images: dict[bytes, TiledImage] = {}
        users: dict[bytes, list[tuple[EngineRequest, int]]] = {}
        for request in self.running:
            for index in request.pending_images:
                image_hash, image = request.hashes.images[index], request.images[index]
                if image_hash not in images:
                    if images and image.pixels.shape[0] > room:
                        continue
                    room -= image.pixels.shape[0]
                    images[image_hash] = image
                users.setdefault(image_hash, []).append((request, index))
        return EncodeBatch(images, users)

    def _prefill_batch(self) -> PrefillBatch:
        """The next chunks of the oldest prompts without pending images, padded to one length."""
        limit = self.config.max_chunk_tokens
        chunks: list[PrefillChunk] = []
        longest = 0
        for request in self.running:
            if request.decoding or request.pending_images:
                continue
            start = request.num_computed_tokens
            length = min(limit, request.num_prompt_tokens - start)
            longest = max(longest, self._padded_length(length))
            if chunks and (len(chunks) + 1) * longest > limit:
                break
            chunks.append(PrefillChunk(request, start, length))
        return PrefillBatch(chunks)
