"""The engine: checks a request, makes its prompt and tiles, and streams the answer.

Knows nothing about Cog or HTTP. An `EngineThread` does the work for many requests at once.
"""

import hashlib
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from PIL import Image

from xgenmm.config import BLOCK_SIZE, TilingMode
from xgenmm.engine import clips
from xgenmm.engine.answer import Answer
from xgenmm.engine.choices import choice_token_ids
from xgenmm.engine.core import EngineCore
from xgenmm.engine.engine_thread import EngineThread
from xgenmm.engine.lru_cache import LRUCache
from xgenmm.engine.memory import cache_budget, split_budget
from xgenmm.engine.metrics import EngineStatus
from xgenmm.engine.prompt_hashes import PromptHashes
from xgenmm.engine.request import EngineRequest, Request, Usage
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.engine.scheduler import SchedulerConfig
from xgenmm.errors import InputError
from xgenmm.kernels.cuda_graphs import DecodeMode
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.prompts import IMAGE, Prompt, request_prompt
from xgenmm.preprocessing.tiling import TiledImage, tile_image
from xgenmm.preprocessing.tokenizer import Tokenizer
from xgenmm.preprocessing.video import FrameSelection, Video, decode_video

if TYPE_CHECKING:
    from xgenmm.engine.json_schema import SchemaLimits
    from xgenmm.engine.structured_output import GrammarCompiler

MAX_NUM_SEQS = 16
GPU_MEMORY_UTILIZATION = 0.9
MAX_TILE_BYTES = 256 << 20
MAX_CHOICES = 256
MAX_CLIP_BYTES = 256 << 20


class Engine:
    """A loaded checkpoint that answers many requests at once.

    Args:
        model: on its device, with its weights.
        max_num_seqs: maximum number of requests (or beams) in a step; others wait.
        cache_bytes: memory for the KV cache and image features; by default what
            `memory.cache_budget` finds.
        prefix_caching: whether images and prompt prefixes of earlier requests are reused.
        gpu_memory_utilization: share of a GPU's memory to use in all.
        decode: what computes steps without prompts on a GPU: `plain` PyTorch, the `kernels`, or by
            default the kernels if they pass a check.
        scheduler_config: by default the one for the model's device.
        schema_limits: what a request's JSON schema may take.

    Raises:
        InputError: the KV cache does not hold one request, or the budget of a step no prompt.
        EngineError: the device computes something wrong, or `kernels` are wanted and cannot serve.
    """

    def __init__(
        self,
        model: XGenMM,
        tokenizer: Tokenizer,
        max_num_seqs: int = MAX_NUM_SEQS,
        cache_bytes: int | None = None,
        *,
        prefix_caching: bool = True,
        gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
        decode: DecodeMode = "auto",
        scheduler_config: SchedulerConfig | None = None,
        schema_limits: "SchemaLimits | None" = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = model.config
        self.max_num_seqs = max_num_seqs
        self.end_ids = frozenset(tokenizer.id(token) for token in self.config.text.stop_tokens)
        config = scheduler_config or SchedulerConfig.for_device(model.device.type)
        if config.max_num_batched_tokens <= max_num_seqs:
            raise InputError(
                "max_num_batched_tokens",
                f"{config.max_num_batched_tokens} leave no room for prompts in a step of "
                f"{max_num_seqs} requests; it must be above max_num_seqs",
            )
        if cache_bytes is None:
            tokens = config.max_idle_batched_tokens
            cache_bytes = cache_budget(model, gpu_memory_utilization, tokens)
        self.num_blocks, image_bytes = split_budget(model, cache_bytes)
        core = EngineCore.build(
            model,
            self.end_ids,
            config,
            max_num_seqs=max_num_seqs,
            num_blocks=self.num_blocks,
            image_bytes=image_bytes,
            prefix_caching=prefix_caching,
            decode=decode,
        )
        self._schema_limits = schema_limits
        self._thread = EngineThread(core)
        self._tiles: LRUCache[TiledImage] = LRUCache(MAX_TILE_BYTES if prefix_caching else 0)
        self._clips: LRUCache[clips.CachedClip] = LRUCache(MAX_CLIP_BYTES if prefix_caching else 0)
        # The thread holds no reference to the engine, so it ends when the engine is collected.
        weakref.finalize(self, self._thread.close)

    def preprocess_image(
        self,
        image: bytes | Image.Image | TiledImage,
        name: str = "image",
        read: Callable[[bytes, str], Image.Image | TiledImage] = read_image,
    ) -> TiledImage:
        """Tile an image for a request. May be called from any thread.

        image: an encoded file (the tiles of recent ones are cached), upright RGB, or tiles, which
            are returned as they are.
        name: the image's name in error messages.
        read: decodes a file that is not cached, see `ImageDecoders.reader`.

        Raises InputError as `read` does.
        """
        if isinstance(image, TiledImage):
            return image
        if isinstance(image, Image.Image):
            return tile_image(image, self.config.tiling, self.config.vision.image_size)
        key = hashlib.sha256(image).digest()
        tiles = self._tiles.get(key)
        if tiles is None:
            tiles = self.preprocess_image(read(image, name))
            self._tiles.put(key, tiles)
        return tiles

    def preprocess_images(self, request: Request) -> list[TiledImage]:
        """Tile a request's images and the frames of its video, in order."""
        images = [self.preprocess_image(image) for image in request.images]
        return images + [self._tile_frame(frame) for frame in clips.frames(request)]

    def check_takes_video(self) -> None:
        """Raise InputError, with the models to use instead, if the model takes no videos."""
        clips.check_takes_video(self.config)

    def preprocess_video(
        self,
        content: bytes,
        selection: FrameSelection | None = None,
        name: str = "video",
        read: Callable[[bytes, str, FrameSelection, TilingMode], Video[TiledImage]] | None = None,
    ) -> Video[TiledImage]:
        """Take frames from a video and tile each. May be called from any thread.

        content: of the file; the frames of recent ones are cached.
        name: the video's name in error messages.
        read: decodes a file that is not cached, see `ImageDecoders.read_video`; by default this
            process does.

        Raises InputError as `read` or `read_video` does.
        """
        selection = selection or FrameSelection()
        key = hashlib.sha256(content).digest() + repr(selection).encode()
        if (cached := self._clips.get(key)) is not None:
            return cached.video
        if read is None:
            video = decode_video(content, self._tile_frame, selection, name=name)
        else:
            video = read(content, name, selection, self.config.frame_tiling.mode)
        self._clips.put(key, clips.CachedClip(video))
        return video

    def _tile_frame(self, frame: Image.Image | TiledImage) -> TiledImage:
        if isinstance(frame, TiledImage):
            return frame
        return tile_image(frame, self.config.frame_tiling, self.config.vision.image_size)

    def stream(self, request: Request) -> Answer:
        """Check a request, tile its images and queue it. May be called from any thread.

        Raises:
            InputError: the request cannot be answered: it is empty, images and `<image>` do not
                match, the model takes no videos or not as many frames, the prompt exceeds the
                context, or the schema cannot be enforced.
            EngineError: the engine is shut down or broken.
        """
        started = time.monotonic()
        self._validate(request)
        prompt = self.prompt(request)
        images = self.preprocess_images(request)
        if len(request.video) and self.config.temporal is None:
            request, images = clips.fit_frames(self.config, request, images, prompt.text_tokens)
            prompt = self.prompt(request)
        text = self.config.text
        choices = [choice_token_ids(self.tokenizer, text, choice) for choice in request.choices]
        schema = request.json_schema
        answer = Answer(
            self.tokenizer, self.end_ids, request.sampling.stop_sequences, request.choices
        )
        room = self._measure(prompt, images, answer.usage)
        clips.record_clip(self.config, request, images, answer.usage)
        max_tokens = min(request.sampling.max_new_tokens, room)
        if max(map(len, choices), default=0) > room:
            raise InputError("choices", f"the longest has more than the {room} tokens left for it")
        if not choices:
            self._check_beams(request.sampling.num_beams, answer.usage.prompt_tokens, max_tokens)
        engine_request = EngineRequest(
            prompt=prompt,
            images=images,
            hashes=PromptHashes.from_prompt(
                prompt, images, self.config.resampler, self.config.clip_tokens
            ),
            params=request.sampling,
            max_tokens=max_tokens,
            sink=answer,
            usage=answer.usage,
            grammar=None if schema is None else self._grammars.compile(schema),
            choices=choices,
            started=started,
            deadline=started + (float("inf") if request.timeout is None else request.timeout),
        )
        self._thread.submit(engine_request)
        return answer

    def warm_up(self, *, schemas: bool = False) -> None:
        """Answer a small request, so that the first caller does not pay for one-time work.

        schemas: whether to prepare for JSON schemas, which starts a process that checks them.
        """
        if schemas:
            self._grammars.compile({})
        image = Image.new("RGB", (64, 64))
        self.stream(Request("", [image], sampling=SamplingParams(max_new_tokens=4))).text()

    def check(self) -> None:
        """Raise EngineError if the engine is dead or stuck. Cheap; callable from any thread."""
        self._thread.check()

    def status(self) -> EngineStatus:
        """A snapshot of what the engine is doing and has done. May be called from any thread."""
        return self._thread.status()

    def close(self) -> None:
        """Refuse new requests, finish the accepted ones and stop the engine's thread."""
        self._thread.close()
        self._thread.join()
        if "_grammars" in vars(self):
            self._grammars.close()

    def prompt(self, request: Request) -> Prompt:
        """The request's prompt. An empty question with images asks for a caption."""
        images = len(request.images) + len(request.video)
        if len(request.video) and self.config.temporal is None:
            request = clips.place_frames(request)
        question = request.question
        if not question.strip():
            if not images:
                raise InputError("question", "is empty and there is no image; give one of the two")
            question = self.config.text.caption_question
        if self.config.temporal is not None and images:
            images = 1  # the clip
            if (places := clips.places(request)) > 1:
                raise InputError(
                    "question",
                    f"{IMAGE} occurs {places} times in question and user messages, but all frames "
                    "are of one clip; write it once, or leave it out",
                )
        return request_prompt(
            self.tokenizer,
            self.config,
            question,
            images=images,
            system_prompt=request.system_prompt,
            messages=request.messages,
        )

    def _validate(self, request: Request) -> None:
        """Check what does not depend on the prompt."""
        clips.check_frames(self.config, request)
        choices, beams = request.choices, request.sampling.num_beams
        if any(not isinstance(choice, str) or not choice for choice in choices):
            raise InputError("choices", "each must be a non-empty text")
        if len(set(choices)) < len(choices):
            raise InputError("choices", "must all be different")
        if len(choices) > MAX_CHOICES:
            raise InputError("choices", f"{len(choices)} given; at most {MAX_CHOICES} are allowed")
        if request.json_schema is not None and choices:
            raise InputError("json_schema", "cannot be combined with choices; give one of the two")
        if request.json_schema is not None and beams > 1:
            raise InputError(
                "json_schema", f"cannot be combined with {beams} beams; set num_beams to 1"
            )
        if beams > self.max_num_seqs and not choices:
            raise InputError(
                "num_beams",
                f"{beams} beams exceed the {self.max_num_seqs} sequences of a step; "
                f"set num_beams to at most {self.max_num_seqs}",
            )

    def _check_beams(self, beams: int, prompt_tokens: int, max_tokens: int) -> None:
        """Check that the KV cache holds all beams, which share no more than the prompt."""
        shared = prompt_tokens // BLOCK_SIZE
        blocks = shared + beams * (-(-(prompt_tokens + max_tokens) // BLOCK_SIZE) - shared)
        if beams > 1 and blocks > self.num_blocks:
            raise InputError(
                "num_beams",
                f"{beams} beams of {max_tokens} tokens after a prompt of {prompt_tokens} may take "
                f"{blocks * BLOCK_SIZE} positions of the KV cache, which has "
                f"{self.num_blocks * BLOCK_SIZE}; set num_beams or max_new_tokens lower",
            )

    @cached_property
    def _grammars(self) -> "GrammarCompiler":
        # Imported on demand: only this needs llguidance and jsonschema.
        from xgenmm.engine.structured_output import GrammarCompiler

        decoder = self.config.decoder
        vocab = decoder.initial_vocab + decoder.additional_tokens
        return GrammarCompiler(self.tokenizer, self.end_ids, vocab, self._schema_limits)

    def _measure(self, prompt: Prompt, images: Sequence[TiledImage], usage: Usage) -> int:
        """Record the length of the prompt; returns how many tokens are left for the answer."""
        image_tokens = clips.vision_tokens(self.config, images)
        text_tokens = prompt.text_tokens
        total, context = text_tokens + image_tokens, self.config.decoder.max_positions
        if total >= context:
            raise InputError(
                "question",
                f"with its images and earlier turns it takes {total} tokens ({image_tokens} for "
                f"{len(images)} images, {text_tokens} for text), {total - context + 1} more "
                f"than the {context - 1} that leave room for an answer; shorten the text or give "
                "fewer images",
            )
        usage.prompt_tokens, usage.image_tokens = total, image_tokens
        return context - total
