"""Settings of the Cog servers, from environment variables."""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from xgenmm import InputError
from xgenmm.engine.engine import GPU_MEMORY_UTILIZATION
from xgenmm.engine.json_schema import SchemaLimits
from xgenmm.engine.sampling_params import MOST_BEAMS
from xgenmm.preprocessing.decoders import DecodeLimits
from xgenmm.preprocessing.fetch import FetchLimits
from xgenmm.preprocessing.video_decoder import VideoLimits

DEFAULT_MODEL = "xgen-mm-phi3-mini-instruct-interleave-r-v1.5"
# For the images of a request together.
FETCH_SECONDS = 30.0
FETCH_BYTES = 128_000_000
# In float32, rank 16 and the whole resampler take 540 MB.
ADAPTER_SECONDS = 300.0
ADAPTER_BYTES = 1_000_000_000

Number = TypeVar("Number", int, float)
Limits = TypeVar("Limits")


@dataclass(frozen=True)
class PredictSettings:
    """What configures predict.py.

    Attributes:
        model: a name or folder.
        adapter: a folder, tar or URL; empty for none.
        load_options: further arguments of `xgenmm.load`.
        at_once: predictions that Cog admits.
        timeout: seconds after which generation stops; None for never.
        fetch_limits: of images, videos and adapters in requests.
    """

    model: str
    adapter: str
    load_options: Mapping[str, Any]
    at_once: int
    timeout: float | None
    fetch_limits: Mapping[str, FetchLimits]
    decode_limits: DecodeLimits

    @classmethod
    def from_environment(cls) -> "PredictSettings":
        """Read the environment. Raises InputError for a value that is out of range."""
        at_once = number("COG_MAX_CONCURRENCY", int) or 1
        images = fetch_limits(FETCH_SECONDS, FETCH_BYTES)
        video_limits = limits("XGENMM_VIDEO", VideoLimits())
        adapters = replace(
            images,
            seconds=number("XGENMM_ADAPTER_SECONDS", float) or ADAPTER_SECONDS,
            max_bytes=number("XGENMM_ADAPTER_BYTES", int) or ADAPTER_BYTES,
        )
        decode_seconds = number("XGENMM_DECODE_SECONDS", float) or DecodeLimits.seconds
        return cls(
            model=os.environ.get("XGENMM_MODEL") or DEFAULT_MODEL,
            adapter=os.environ.get("XGENMM_ADAPTER") or os.environ.get("COG_WEIGHTS") or "",
            load_options={
                "device": os.environ.get("XGENMM_DEVICE") or None,
                "dtype": os.environ.get("XGENMM_DTYPE") or None,
                "quantize": os.environ.get("XGENMM_QUANTIZE") or None,
                "max_num_seqs": max(at_once, MOST_BEAMS),
                "gpu_memory_utilization": number("XGENMM_MEMORY", float) or GPU_MEMORY_UTILIZATION,
                "decode": os.environ.get("XGENMM_DECODE") or "auto",
                "schema_limits": limits("XGENMM_SCHEMA", SchemaLimits()),
            },
            at_once=at_once,
            timeout=number("XGENMM_TIMEOUT", float),
            fetch_limits={
                "image": images,
                "video": replace(images, max_bytes=video_limits.file_bytes),
                "adapter": adapters,
            },
            decode_limits=DecodeLimits(decode_seconds, video=video_limits),
        )


def fetch_limits(seconds: float, max_bytes: int) -> FetchLimits:
    """Limits on downloads from the environment, with these defaults."""
    return FetchLimits(
        seconds=number("XGENMM_FETCH_SECONDS", float) or seconds,
        max_bytes=number("XGENMM_FETCH_BYTES", int) or max_bytes,
        private_addresses=switch("XGENMM_PRIVATE_ADDRESSES"),
    )


def number(name: str, kind: Callable[[str], Number]) -> Number | None:
    """Return the positive number in an environment variable, or None if it is not set.

    Raises InputError for anything else.
    """
    text = os.environ.get(name)
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if (value := kind(text)) > 0:
            return value
    raise InputError(name, f"must be a number above 0, not {text!r}")


def switch(name: str) -> bool:
    """Return whether an environment variable is 1.

    Raises InputError unless it is 0, 1 or not set.
    """
    text = os.environ.get(name) or "0"
    if text not in ("0", "1"):
        raise InputError(name, f"must be 0 or 1, not {text!r}")
    return text == "1"


def limits(prefix: str, defaults: Limits) -> Limits:
    """Limits from environment variables with this prefix and the names of the fields.

    defaults: a dataclass of numbers.
    """
    found = {
        field.name: number(f"{prefix}_{field.name.upper()}", type(field.default))
        for field in fields(defaults)  # type: ignore[arg-type]
    }
    return replace(defaults, **{name: value for name, value in found.items() if value})  # type: ignore[type-var]
