"""The model as Cog runs it: form inputs in, pieces of text out, many predictions at once.

`Predictor` only adapts Cog's interface to the library: it turns the form's inputs into a `Request`,
streams the text of the answer and reports the metrics. Environment variables configure it:

    XGENMM_MODEL         a released name, `demo`, or a checkpoint folder
    XGENMM_ADAPTER       an adapter of that checkpoint: a folder, a tar, or the URL of a tar; COG_WEIGHTS
                         is Cog's name for it
    XGENMM_DEVICE        `cuda`, `cuda:N` or `cpu`; default: a GPU if there is one
    XGENMM_DTYPE         `bfloat16`, `float16` or `float32`; default: bfloat16 on a GPU, else float32
    XGENMM_QUANTIZE      `int8` or `fp8`: the weights of the decoder
    XGENMM_MEMORY        share of the GPU's memory for weights, workspace and caches; default: 0.9
    XGENMM_DECODE        `plain` or `kernels` to insist on one of the decode paths of a GPU
    XGENMM_TIMEOUT       seconds after which generation stops and the partial text is returned
    XGENMM_FETCH_SECONDS, XGENMM_FETCH_BYTES, XGENMM_DECODE_SECONDS, XGENMM_PRIVATE_ADDRESSES
                         limits on the images of a request, see docs/serving.md
    XGENMM_ADAPTER_SECONDS, XGENMM_ADAPTER_BYTES  limits on the download of an adapter
    XGENMM_SCHEMA_..., XGENMM_VIDEO_...  limits of JSON schemas and videos, see docs/inputs.md
    COG_MAX_CONCURRENCY  predictions at once; `cog build` sets it from `@concurrent` below

Cog builds the form by parsing this file, without running it, and takes string literals verbatim.
Every description and default is therefore a single literal without escapes, however long.
"""

import atexit
import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path as LocalPath
from typing import Any

from cog import (
    BasePredictor,
    CancelationException,
    ConcatenateIterator,
    Input,
    Path,
    concurrent,
    streaming,
)

import xgenmm
from serving.adapters import AdapterEngine
from serving.compat import Prediction, SlotWatch, set_up_watched
from serving.inputs import check_url, read_urls
from serving.settings import PredictSettings
from xgenmm import Engine, InputError, Request, SamplingParams
from xgenmm.checkpoints.adapter import read_adapter
from xgenmm.checkpoints.registry import resolve
from xgenmm.preprocessing.decoders import ImageDecoders
from xgenmm.preprocessing.fetch import Kind
from xgenmm.preprocessing.prompts import parse_conversation
from xgenmm.preprocessing.video import MAX_FRAMES, FrameSelection

# Seconds for which text is joined. Cog sends an event, or a webhook with all text so far, for each
# piece, and replays only the last 1,024 events to a client that reconnects.
STREAM_INTERVAL = 0.05

logger = logging.getLogger(__name__)


class Predictor(BasePredictor):
    """One checkpoint, loaded once, that serves as many predictions at once as Cog admits."""

    settings: PredictSettings
    engines: AdapterEngine
    decoders: ImageDecoders
    max_images: int

    def setup(self) -> None:
        """Load the checkpoint and answer one request, so that the first user does not wait.

        Raises CheckpointError, naming the command to run, if the checkpoint is missing, and
        InputError for a setting that is out of range.
        """
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each URL
        set_up_watched(self._load)

    def _load(self) -> SlotWatch:
        self.settings = settings = PredictSettings.from_environment()
        # Freeze imported objects so that garbage collection does not stall streams (for 0.2 s).
        gc.freeze()
        self.engines = AdapterEngine(self._load_engine, self._check_adapter)
        # Cog has no shutdown hook; its worker process exits after the last prediction.
        atexit.register(self.engines.close)
        logger.info("loading %s", settings.model)
        own = replace(settings.fetch_limits["adapter"], private_addresses=True)
        config = self.engines.start(settings.adapter, own).config
        room = config.decoder.max_positions // config.resampler.num_latents
        self.max_images = room if config.temporal is None else MAX_FRAMES
        tiling, side = config.tiling, config.vision.image_size
        self.decoders = ImageDecoders(tiling, side, settings.decode_limits)
        self.decoders.start()
        return SlotWatch(settings.at_once)

    def _load_engine(self, adapter: LocalPath | None) -> Engine:
        settings = self.settings
        engine = xgenmm.load(settings.model, adapter=adapter, **settings.load_options)
        engine.warm_up(schemas=True)
        return engine

    def _check_adapter(self, adapter: LocalPath) -> None:
        read_adapter(adapter, resolve(self.settings.model))

    def healthcheck(self) -> bool:
        """Return True if the engine works. Raises EngineError, with the reason, if it does not."""
        self.engines.check()
        return True

    @concurrent(max=16)
    @streaming
    async def predict(
        self,
        image: Path | None = Input(
            default=None,
            accept="image/*",
            description="The image to ask about: JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF, up to 64 megapixels. Leave it empty for a question without an image.",
        ),
        images: list[Path] | None = Input(
            default=None,
            accept="image/*",
            description="More images, for a question about several. They come after image, in this order. For a video model: the frames of one clip.",
        ),
        video: Path | None = Input(
            default=None,
            accept="video/*",
            description="The video to ask about, instead of images: MP4, WebM, MKV, MOV, AVI or GIF. Of the image models only interleave and dpo take it, as images; they were not trained on clips.",
        ),
        question: str = Input(
            default="",
            description="Your question. If it is empty, the image or video is described. Images are placed before the question, in order; to place them yourself, write <image> once for each, or once for a video.",
        ),
        num_frames: int | None = Input(
            default=None,
            ge=1,
            le=64,
            description="How many frames of the video to look at, spread evenly. If empty: 8, the number the models were trained with, or every frame of a shorter clip.",
        ),
        start: float | None = Input(
            default=None,
            ge=0,
            description="Where the part of the video to look at starts, in seconds. If empty, at its first frame.",
        ),
        end: float | None = Input(
            default=None,
            ge=0,
            description="Where the part of the video to look at ends, in seconds. If empty, at its last frame.",
        ),
        system_prompt: str = Input(
            default="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.",
            description="How the assistant should behave. The default is the text the models were trained with. Base models ignore it.",
        ),
        max_new_tokens: int = Input(
            default=768,
            ge=1,
            le=2048,
            description="Maximum length of the answer in tokens. A token is about three quarters of an English word.",
        ),
        temperature: float = Input(
            default=0.0,
            ge=0.0,
            le=2.0,
            description="0 always picks the most likely token, so the same question gets the same answer. Higher values make answers more varied.",
        ),
        top_p: float = Input(
            default=1.0,
            ge=0.0,
            le=1.0,
            description="Sample only from the most likely tokens whose probabilities add up to this value. 1 turns it off. Has an effect only if temperature is above 0.",
        ),
        top_k: int = Input(
            default=0,
            ge=0,
            le=100000,
            description="Sample only from this many of the most likely tokens. 0 turns it off. Has an effect only if temperature is above 0.",
        ),
        num_beams: int = Input(
            default=1,
            ge=1,
            le=8,
            description="Number of beams for beam search. 1 turns it off and is fastest. With more, the text arrives in one piece at the end, temperature must be 0, and json_schema empty.",
        ),
        repetition_penalty: float = Input(
            default=1.0,
            ge=0.5,
            le=3.0,
            description="Values above 1 discourage tokens that the answer already contains. 1 turns it off.",
        ),
        stop_sequences: list[str] | None = Input(
            default=None,
            description="The answer ends before the first of these texts. At most 16, none empty.",
        ),
        seed: int | None = Input(
            default=None,
            ge=0,
            description="Random seed, for a reproducible answer when temperature is above 0. If empty, each run is different.",
        ),
        messages: list[dict[str, str]] | None = Input(
            default=None,
            description='Earlier turns of the conversation, oldest first: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]. The last may be from the user, if question is empty. For a base model: few-shot examples. Images of earlier turns come before those of the question.',
        ),
        choices: list[str] | None = Input(
            default=None,
            description="Answer with the most likely of these texts, which must differ. The metric choices gives the probability of each. The inputs for sampling and beam search have no effect, and json_schema must be empty.",
        ),
        json_schema: dict[str, Any] | None = Input(
            default=None,
            description='Answer with JSON that follows this JSON Schema, for example {"type": "object", "properties": {"color": {"type": "string"}}, "required": ["color"]}. It cannot be combined with choices or several beams.',
        ),
        adapter: Path | None = Input(
            default=None,
            description="An adapter from fine-tuning this checkpoint, as a .tar or .tar.gz file. To change it takes as long as to load the model, and is refused while predictions with another one run. If empty, the server's own adapter, if it has one.",
        ),
    ) -> ConcatenateIterator[str]:
        """Answer a question about images or a video; yields the text as it is generated.

        This coroutine runs in the event loop that all predictions share, so it only checks the
        inputs. The generator that it returns does the work; Cog iterates over it in a separate
        thread for each prediction.
        """
        with Prediction() as prediction:
            if choices is not None and not choices:
                raise InputError("choices", "is empty; give texts to choose from or leave it out")
            system_prompt, turns, question = parse_conversation(
                messages or (), question, system_prompt
            )
            sources = _urls(image, images or (), video)
            if not question.strip() and not sources:
                raise InputError(
                    "question",
                    "is empty and there is no image or video; give one, under these names: Cog "
                    "ignores inputs of other names, such as prompt",
                )
            selection = FrameSelection(num_frames, start, end)
            engine = await self._engine(prediction, None if adapter is None else str(adapter))
            if video is not None:
                engine.check_takes_video()
                selection.check()
            request = Request(
                question=question,
                system_prompt=system_prompt,
                messages=turns,
                sampling=SamplingParams(
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    num_beams=1 if choices else num_beams,  # choices are not searched for
                    repetition_penalty=repetition_penalty,
                    stop_sequences=tuple(stop_sequences or ()),
                    seed=seed,
                ),
                choices=tuple(choices or ()),
                json_schema=json_schema,
                timeout=self.settings.timeout,
            )
            contents = await self._contents(sources)
            prediction.outlive_coroutine()
            # `scope` is a context variable of this coroutine, not set in the generator's thread.
            record = self.scope.record_metric
            return self._stream(engine, request, contents, selection, prediction, record)

    async def _contents(self, urls: dict[str, str]) -> dict[str, bytes]:
        """Return the files of images or of a video, by input name."""
        if len(urls) > self.max_images:
            raise InputError("images", f"{len(urls)} given; at most {self.max_images} fit")
        kind: Kind = "video" if "video" in urls else "image"
        return await read_urls(urls, self.settings.fetch_limits[kind], kind)

    async def _engine(self, prediction: Prediction, adapter: str | None) -> Engine:
        """Return the engine with the adapter that a URL refers to or contains, or the default."""
        content = None
        if adapter is not None:
            urls = {"adapter": check_url("adapter", adapter)}
            limits = self.settings.fetch_limits["adapter"]
            content = (await read_urls(urls, limits, "archive"))["adapter"]
        return await self.engines.acquire(prediction, content)

    def _stream(
        self,
        engine: Engine,
        request: Request,
        contents: dict[str, bytes],
        selection: FrameSelection,
        prediction: Prediction,
        record_metric: Callable[[str, Any], None],
    ) -> Iterator[str]:
        """Yield the answer's text until it ends or `prediction` is cancelled; record the metrics.

        contents: the files of the images, or of the video, by input name.
        selection: the frames of the video.
        """
        with contextlib.closing(prediction):
            if "video" in contents:
                clip = engine.preprocess_video(
                    contents["video"], selection, read=self.decoders.read_video
                )
                request = replace(request, video=clip)
            else:
                read = self.decoders.reader()
                images = [engine.preprocess_image(contents[n], n, read) for n in contents]
                request = replace(request, images=images)
            answer = engine.stream(request)
            prediction.cancelled.add_done_callback(lambda _: answer.cancel())
            try:
                yield from answer.pieces(STREAM_INTERVAL)
                if prediction.cancelled.cancelled():
                    raise CancelationException
            finally:
                answer.cancel()
                for name, value in asdict(answer.usage).items():
                    if value is not None:
                        record_metric(name, value)


def _urls(image: Path | None, images: Sequence[Path], video: Path | None) -> dict[str, str]:
    """Return the URL of each image, or of the video, by its input's name, in order.

    Raises InputError for a video together with images, and for a value that is not a URL.
    """
    sources = {} if image is None else {"image": image}
    sources |= {f"images[{i}]": path for i, path in enumerate(images)}
    if video is not None:
        if sources:
            raise InputError("video", "cannot be combined with image or images; give one of them")
        sources = {"video": video}
    return {name: check_url(name, source) for name, source in sources.items()}


# Cog leaves text alone, see serving/inputs.py.
_URL = str | None
Predictor.predict.__annotations__ |= {
    "image": _URL, "images": list[str] | None, "video": _URL, "adapter": _URL,
}  # fmt: skip
