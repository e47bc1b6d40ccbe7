"""Runs what the scheduler decided: the model, its KV cache and the state of the batch.

Each request owns one slot, a row of the KV cache (with beams, one slot per beam). Shapes are
static except for the number of slots of a step, a power of two, and the number of keys. A decode
step runs over all slots up to the last one in use. What it writes for idle slots, and for slots
whose prompt is still being computed, lands at `BatchState.position`, where it is overwritten before
anything reads it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from xgenmm.engine.batch_state import BatchState
from xgenmm.engine.prefix_cache import Caches
from xgenmm.engine.prompt_hashes import BLOCK_SIZE
from xgenmm.engine.request import EngineRequest
from xgenmm.engine.sampler import apply_token_masks
from xgenmm.engine.scheduler import DecodeBatch, EncodeBatch, PrefillChunk
from xgenmm.kernels.cuda_graphs import build_decode_step
from xgenmm.models.transfer import to_device
from xgenmm.models.xgenmm import XGenMM

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class StepOutput:
    """Output of a step that may still be running on the device.

    requests: each with the row of its token, or of its first beam.
    tokens: waits for the step and returns the token of each row.
    logits: [rows, vocab], valid until the next decode step.
    """

    requests: Sequence[tuple[EngineRequest, int]]
    tokens: Callable[[], list[int]]
    logits: torch.Tensor


class ModelRunner:
    """The model and, on its device, the state of running requests.

    Args:
        num_slots: rows of the KV cache.
        cache_bytes: memory for image features and prefixes of earlier requests.
    """

    def __init__(self, model: XGenMM, num_slots: int, cache_bytes: int) -> None:
        self.model = model
        self.caches = Caches(cache_bytes)
        decoder = model.config.decoder
        # The extra position takes the padding of chunks at the end of the context.
        self.kv_cache = model.cache(num_slots, decoder.max_positions + 1)
        vocab = decoder.initial_vocab + decoder.additional_tokens
        self._batch = BatchState(num_slots, vocab, model.device)
        self._decode_step = build_decode_step(model, self.kv_cache)

    def retry_out_of_memory(self, work: Callable[[], T]) -> T:
        """Run `work`; if memory runs out, drop the caches and run it once more.

        This is safe because a method of this class that has raised can be called again.
        """
        try:
            return work()
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("out of memory: dropping the caches and trying once more")
        self.caches.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return work()

    def add_request(self, request: EngineRequest) -> None:
        """Prepare the request's slots and reuse what is cached of its prompt and images."""
        # At least one position must be computed, for the logits that follow it.
        hashes = request.hashes.blocks[: (request.num_prompt_tokens - 1) // BLOCK_SIZE]
        cached = self.caches.prefixes.restore(hashes, self.kv_cache, request.slots[0])
        request.num_computed_tokens = request.usage.cached_tokens = cached
        for slot in request.slots:
            self._batch.add_request(slot, request.params, cached)
        for index in request.pending_images:
            features = self.caches.image_features.get(request.hashes.images[index])
            if features is not None:
                request.image_features[index] = features

    def remove_request(self, request: EngineRequest) -> None:
        """Make the request's slots idle."""
        for slot in request.slots:
            self._batch.remove(slot)

    def cache_prefix(self, request: EngineRequest) -> None:
        """Cache the keys and values of the prompt and of the output so far."""
        hashes = request.hashes.blocks_with_output(request.output_token_ids)
        computed = hashes[: request.num_computed_tokens // BLOCK_SIZE]
        self.caches.prefixes.save(computed, self.kv_cache, request.slots[0])

    def encode(self, batch: EncodeBatch) -> None:
        """Encode images, cache the features and give them to the requests.

        The features are vision tokens, unless these depend on the prompt's text (the
        instruction-aware resampler of v1): then they are the output of the vision tower.
        """
        images = list(batch.images.values())
        encoded = self.model.features(images)
        if not self.model.config.resampler.text_tokens:
            encoded = self.model.vision_tokens(images, encoded)
        for image_hash, view in zip(batch.images, encoded, strict=True):
            features = view.clone()  # a view would keep the whole batch alive
            self.caches.image_features.put(image_hash, features)
            for request, index in batch.users[image_hash]:
                request.image_features[index] = features

    def merge_embeddings(self, request: EngineRequest) -> None:
        """Make the prompt's embeddings from its token ids and image features."""
        config, device = self.model.config, self.model.device
        vision = []
        for index, image in enumerate(request.images):
            if index not in request.image_features:  # within the cached prefix: never read
                count = image.pixels.shape[0] * config.resampler.num_latents
                vision.append(torch.zeros(count, config.decoder.hidden_size, device=device))
            elif config.resampler.text_tokens:
                features = [request.image_features[index]]
                vision += self.model.vision_tokens([image], features, request.prompt)
            else:
                vision.append(request.image_features[index])
        request.embeds = self.model.merge_multimodal_embeddings(request.prompt, vision)
        request.image_features.clear()

    def prefill(self, chunks: Sequence[PrefillChunk]) -> torch.Tensor:
        """Compute prompt chunks; returns the logits after each: float32 [chunks, vocab]."""
        parts = []
        for chunk in chunks:
            assert chunk.request.embeds is not None
            parts.append(chunk.request.embeds[chunk.start : chunk.start + chunk.length])
        starts = [chunk.start for chunk in chunks]
        slots = [chunk.request.slots[0] for chunk in chunks]
        logits = self.model.prefill_chunk(parts, starts, slots, self.kv_cache)
        for chunk, slot in zip(chunks, slots, strict=True):
            self._batch.position[slot] = chunk.start + chunk.length
        return logits

    def sample_first(
        self, request: EngineRequest, logits: torch.Tensor, mask: torch.Tensor | None
    ) -> StepOutput:
        """Begin sampling for a request, from the logits [1, vocab] after its prompt.

        mask: the tokens that the request's grammar allows, bool [vocab].
        """
        slot = request.slots[0]
        self._batch.activate(slot)
        logits = apply_token_masks(logits, {} if mask is None else {0: mask})
        tokens = self._batch.sample(slice(slot, slot + 1), logits)
        return StepOutput([(request, 0)], _copy_to_host(tokens), logits)

    def decode(self, batch: DecodeBatch, masks: Mapping[int, torch.Tensor]) -> StepOutput:
        """Begin a decode step; on a GPU it is not finished when this returns.

        masks: the tokens that grammars allow, bool [vocab] by slot.
        """
        state, slots = self._batch, slice(batch.num_slots)
        logits = self._decode_step(
            state.token[slots], state.position[slots], self.kv_cache, batch.num_keys
        )
        tokens = state.sample(slots, apply_token_masks(logits, masks))
        state.advance(slots)  # last, so that a step that fails before can be repeated
        rows = [(request, request.slots[0]) for request in batch.requests]
        return StepOutput(rows, _copy_to_host(tokens), logits)

    def start_beams(self, request: EngineRequest, logits: torch.Tensor) -> torch.Tensor:
        """Copy the prompt to the slots of all beams.

        Takes the logits [1, vocab] after the prompt, returns penalized log-probabilities.
        """
        slots = self._slots(request)
        prompt = slots[:1].expand(len(slots))
        self.kv_cache.reorder(prompt, request.num_computed_tokens, into=slots)
        return self._batch.penalize(slots[:1], logits.log_softmax(-1))

    def score_beams(self, request: EngineRequest, logits: torch.Tensor) -> torch.Tensor:
        """Penalized log-probabilities [beams, vocab] from a decode step's logits [slots, vocab]."""
        slots = self._slots(request)
        return self._batch.penalize(slots, logits[slots].log_softmax(-1))

    def reorder_beams(
        self, request: EngineRequest, parents: Sequence[int], token_ids: Sequence[int]
    ) -> None:
        """Let beam i continue beam `parents[i]` with the token `token_ids[i]`."""
        device, length = self.model.device, request.num_computed_tokens
        slots = self._slots(request)
        sources = slots[to_device(torch.tensor(parents), device)]
        self.kv_cache.reorder(sources, length, into=slots)
        tokens = to_device(torch.tensor(token_ids), device)
        self._batch.reorder_beams(slots, sources, tokens, length)

    def _slots(self, request: EngineRequest) -> torch.Tensor:
        return to_device(torch.tensor(request.slots), self.model.device)


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch has an error class only for GPUs; the CPU's allocator raises a RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate" in str(error)


def _copy_to_host(tokens: torch.Tensor) -> Callable[[], list[int]]:
    """Begin to copy int64 [n] to the host; the returned function waits for the copy."""
    copy = tokens.to("cpu", non_blocking=True)  # pinned memory, if from a GPU
    if tokens.device.type != "cuda":
        return copy.tolist
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[int]:
        copied.synchronize()
        return copy.tolist()

    return wait
