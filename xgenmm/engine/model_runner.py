"""Computes what the scheduler decided: the model, its KV cache and the state of the batch.

A step is one forward pass over a flat list of tokens: the newest token of each decoding request,
prompt chunks and choices. Linear layers run over all of them at once, attention per request.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch

from xgenmm.engine.batch_state import BatchState, Rows
from xgenmm.engine.lru_cache import LRUCache
from xgenmm.engine.prefill_check import check_prefill
from xgenmm.engine.request import EngineRequest
from xgenmm.engine.sampler import apply_token_masks
from xgenmm.engine.scheduler import ChoicesChunk, PrefillChunk, Step
from xgenmm.kernels.cuda_graphs import DecodeMode, build_decode_step, needed_buckets
from xgenmm.models.attention import (
    Segment,
    continuations_segment,
    decode_segment,
    prompt_segment,
)
from xgenmm.models.kv_cache import slots
from xgenmm.models.transfer import to_device
from xgenmm.models.xgenmm import XGenMM

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class StepOutput:
    """Output of a step that may still be running on the device.

    requests: those that got logits for their next token, each with its rows of the output: one, or
        one for each beam.
    preemptions: how often each request of the step had been preempted before.
    choices: each with the logits of its tokens, float32 [tokens, vocab].
    tokens: waits for the step and returns the token of each row.
    logits: float32 [rows, vocab], valid until the next step.
    """

    requests: Sequence[tuple[EngineRequest, Sequence[int]]]
    preemptions: Mapping[EngineRequest, int]
    choices: Sequence[tuple[ChoicesChunk, torch.Tensor]]
    tokens: Callable[[], list[int]]
    logits: torch.Tensor


class ModelRunner:
    """The model and, on its device, the state of running requests.

    Args:
        num_rows: of the batch.
        num_blocks: of the KV cache, without the one for padding.
        image_features: features of recent images, by hash.
        decode: what computes steps without prompts: `auto`, `kernels` or `plain`.

    Raises EngineError if the device computes something wrong, or the kernels are asked for and
    cannot serve.
    """

    def __init__(
        self,
        model: XGenMM,
        num_rows: int,
        num_blocks: int,
        image_features: LRUCache[torch.Tensor],
        decode: DecodeMode = "auto",
    ) -> None:
        self.model = model
        self.image_features = image_features
        self.kv_cache = model.cache(num_blocks + 1)
        if model.device.type == "cuda":
            num_rows = needed_buckets(num_rows)[-1]
            difference = check_prefill(model, self.kv_cache)
            logger.info("prefill: logits differ from the reference's by %.1e", difference)
        self._batch = batch = BatchState(num_rows, model.config.decoder, model.device)
        self.decode_path = build_decode_step(
            model, self.kv_cache, batch.token, batch.position, batch.block_tables, decode
        )

    def retry_out_of_memory(self, work: Callable[[], T]) -> T:
        """Run `work`; if memory runs out, drop the cached images and run it once more.

        This is safe because a method of this class that has raised can be called again.
        """
        try:
            return work()
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("out of memory: dropping the cached images and trying once more")
        self.image_features.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return work()

    def add_request(self, request: EngineRequest) -> None:
        """Prepare the request's rows."""
        for row in request.rows:
            self._batch.add(row, request.params, request.output_token_ids)

    def free_rows(self, rows: Sequence[int]) -> None:
        """Make rows idle."""
        for row in rows:
            self._batch.remove(row)

    def encode(self, step: Step) -> None:
        """Encode a step's images, cache the features and give them to the requests.

        The features are vision tokens, unless these depend on more than the image: on the prompt's
        text (the instruction-aware resampler of v1), then they are the output of the vision tower;
        or on the other frames of a clip, then they are latents.
        """
        images = list(step.images.values())
        encoded = self.model.features(images)
        if self.model.config.temporal is not None:
            encoded = self.model.frame_latents(encoded)
        elif not self.model.config.resampler.text_tokens:
            encoded = self.model.vision_tokens(images, encoded)
        for image_hash, view in zip(step.images, encoded, strict=True):
            features = view.clone()  # a view would keep the whole batch alive
            self.image_features.put(image_hash, features)
            for request, index in step.image_users[image_hash]:
                request.image_features[index] = features

    def merge_embeddings(self, request: EngineRequest) -> None:
        """Make the embeddings of what the request has to prefill, from ids and image features."""
        vision = (
            self._image_tokens(request)
            if request.hashes.clip is None
            else [self._clip_tokens(request, request.hashes.clip)]
        )
        embeds = self.model.merge_multimodal_embeddings(request.prompt, vision)
        if request.output_token_ids:
            embeds = torch.cat([embeds, self.model.embed_ids(request.output_token_ids)])
        request.embeds = embeds
        request.image_features.clear()
        request.clip_tokens = None

    def _image_tokens(self, request: EngineRequest) -> list[torch.Tensor]:
        """The vision tokens of each image of a request."""
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
        return vision

    def _clip_tokens(self, request: EngineRequest, clip_hash: bytes) -> torch.Tensor:
        """The vision tokens of a request's clip, cached or from the latents of its frames."""
        config = self.model.config
        if request.clip_tokens is not None:
            return request.clip_tokens
        if not request.image_features:  # within the cached prefix: never read
            width = config.decoder.hidden_size
            return torch.zeros(config.clip_tokens, width, device=self.model.device)
        latents = [request.image_features[index] for index in range(len(request.images))]
        tokens = self.model.clip_tokens(latents)
        self.image_features.put(clip_hash, tokens)
        return tokens

    def run(self, step: Step, masks: Mapping[int, torch.Tensor]) -> StepOutput:
        """Begin a step's forward pass and sampling; on a GPU they are not finished on return.

        masks: the tokens that grammars allow next, bool [vocab] by batch row.
        """
        self._update_blocks(step)
        finished = [chunk.request for chunk in step.chunks if chunk.is_last]
        rows = [row for request in step.decoding for row in request.rows]
        rows += [request.rows[0] for request in finished]
        where: Rows
        decode = self.decode_path.decode
        if decode is not None and not step.chunks and not step.choices:
            logits = decode(max(rows) + 1)
            where, index = slice(len(logits)), {row: row for row in rows}
        else:
            logits = self._forward(step)
            where = to_device(torch.tensor(rows, dtype=torch.long), self.model.device)
            index = {row: i for i, row in enumerate(rows)}
        sizes = [sum(map(len, choices.token_ids)) for choices in step.choices]
        logits, *choices_logits = logits.split([len(logits) - sum(sizes), *sizes])
        logits = apply_token_masks(logits, {index[row]: mask for row, mask in masks.items()})
        for request in finished:
            if request.is_sampled:
                self._batch.start(request.rows[0], request.num_prefill_tokens - 1)
        tokens = self._batch.sample(where, logits) if rows else torch.empty(0)
        return StepOutput(
            requests=[
                (request, [index[row] for row in request.rows if row in index])
                for request in [*step.decoding, *finished]
            ],
            preemptions={request: request.num_preemptions for request in step.requests},
            choices=list(zip(step.choices, choices_logits, strict=True)),
            tokens=_copy_to_host(tokens),
            logits=logits,
        )

    def score_beams(
        self, request: EngineRequest, logits: torch.Tensor, rows: Sequence[int]
    ) -> torch.Tensor:
        """Penalized log-probabilities [beams, vocab] from these rows of a step's logits."""
        device = self.model.device
        logits = logits[to_device(torch.tensor(rows), device)]
        beams = to_device(torch.tensor(request.rows[: len(rows)]), device)
        return self._batch.penalize(beams, logits.log_softmax(-1))

    def reorder_beams(
        self, request: EngineRequest, parents: Sequence[int], token_ids: Sequence[int]
    ) -> None:
        """Let beam i continue beam `parents[i]` with the token `token_ids[i]`."""
        device, position = self.model.device, request.num_computed_tokens
        sources = [request.rows[parent] for parent in parents]
        rows, parent_rows, tokens = to_device(
            torch.tensor([request.rows, sources, token_ids]), device
        )
        self._batch.reorder_beams(rows, parent_rows, tokens, position)

    def _forward(self, step: Step) -> torch.Tensor:
        """The logits after each decoding row and each whole prompt, and of all choices' tokens.

        float32 [n, vocab].
        """
        parts: list[tuple[torch.Tensor, Segment, int]] = []
        if step.decoding:
            parts.append(self._decode_part(step))
        parts += [self._prompt_part(chunk) for chunk in step.chunks]
        parts += [self._choices_part(choices) for choices in step.choices if choices.token_ids]
        if not parts:
            return torch.empty(0, self._batch.vocab, device=self.model.device)
        embeds = torch.cat([embeds for embeds, _, _ in parts])
        hidden = self.model.forward(embeds, [segment for _, segment, _ in parts], self.kv_cache)
        ends = accumulate(len(embeds) for embeds, _, _ in parts)
        wanted = [hidden[end - n : end] for end, (_, _, n) in zip(ends, parts, strict=True)]
        return self.model.logits(torch.cat(wanted))

    # Each part of a pass: embeddings [tokens, width], their segment, and how many of the last
    # tokens need logits.

    def _decode_part(self, step: Step) -> tuple[torch.Tensor, Segment, int]:
        rows = [row for request in step.decoding for row in request.rows]
        where = to_device(torch.tensor(rows), self.model.device)
        positions, tables = self._batch.position[where], self._batch.block_tables[where]
        if self.decode_path.segment is not None:
            segment = self.decode_path.segment(positions, tables)
        else:
            num_keys = 1 + max(request.num_computed_tokens for request in step.decoding)
            window = self.model.config.decoder.window_keys
            segment = decode_segment(positions, tables, num_keys, window, self.model.dtype)
        return self.model.decoder.embed(self._batch.token[where]), segment, len(rows)

    def _prompt_part(self, chunk: PrefillChunk) -> tuple[torch.Tensor, Segment, int]:
        request, config = chunk.request, self.model.config.decoder
        assert request.embeds is not None
        embeds = request.embeds[chunk.start : chunk.start + chunk.length]
        table = self._batch.block_tables[request.rows[0]]
        segment = prompt_segment(
            chunk.start, chunk.length, table, config.window_keys, self.model.dtype
        )
        return embeds, segment, int(chunk.is_last)

    def _choices_part(self, choices: ChoicesChunk) -> tuple[torch.Tensor, Segment, int]:
        request, config, device = choices.request, self.model.config.decoder, self.model.device
        tokens = [token for choice in choices.token_ids for token in choice]
        blocks = to_device(torch.tensor(request.scratch_blocks), device)
        scratch = slots(blocks[None], torch.arange(len(tokens), device=device)[None])[0]
        segment = continuations_segment(
            [len(choice) for choice in choices.token_ids],
            request.num_prompt_tokens,
            self._batch.block_tables[request.rows[0]],
            scratch,
            config.window_keys,
            self.model.dtype,
        )
        return self.model.embed_ids(tokens), segment, len(tokens)

    def _update_blocks(self, step: Step) -> None:
        """Copy blocks that beams no longer share, and bring the block tables to the device."""
        if step.block_copies:
            sources, targets = to_device(torch.tensor(step.block_copies).T, self.model.device)
            self.kv_cache.copy_blocks(sources, targets)
        self._batch.set_block_tables(
            [
                (row, table)
                for request in step.requests
                for row, table in zip(request.rows, request.block_tables, strict=False)
            ]
        )


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
