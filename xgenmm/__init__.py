"""xGen-MM (BLIP-3) in PyTorch: ask questions about images and videos and stream the answers.

import xgenmm

engine = xgenmm.load("demo")
image = xgenmm.read_image("star.png")
for text in engine.stream(xgenmm.Request("What color is the star?", [image])):
    print(text, end="", flush=True)

A video model takes a clip: Request("What happens?", video=xgenmm.read_video("clip.mp4")).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xgenmm.engine.answer import Answer
    from xgenmm.engine.engine import Engine
    from xgenmm.engine.load import load
    from xgenmm.engine.request import Request, Usage
    from xgenmm.engine.sampling_params import SamplingParams
    from xgenmm.errors import CheckpointError, EngineError, InputError
    from xgenmm.preprocessing.images import read_image
    from xgenmm.preprocessing.prompts import Message
    from xgenmm.preprocessing.video import read_video

__all__ = [
    "Answer",
    "CheckpointError",
    "Engine",
    "EngineError",
    "InputError",
    "Message",
    "Request",
    "SamplingParams",
    "Usage",
    "load",
    "read_image",
    "read_video",
]

_MODULES = {
    "Answer": "engine.answer",
    "CheckpointError": "errors",
    "Engine": "engine.engine",
    "EngineError": "errors",
    "InputError": "errors",
    "Message": "preprocessing.prompts",
    "Request": "engine.request",
    "SamplingParams": "engine.sampling_params",
    "Usage": "engine.request",
    "load": "engine.load",
    "read_image": "preprocessing.images",
    "read_video": "preprocessing.video",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, because PyTorch takes seconds and many programs do without it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
