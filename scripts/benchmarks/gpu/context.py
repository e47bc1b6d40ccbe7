"""What the stages share, made when it is first needed."""

import tempfile
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scripts.benchmarks.gpu.device import Device, Size
from scripts.benchmarks.random_data import (
    TINY_CONFIG,
    photo_jpeg,
    random_model,
    write_checkpoint,
    write_tokenizer,
)
from xgenmm.config import XGenMMConfig

if TYPE_CHECKING:
    from xgenmm.models.xgenmm import XGenMM
    from xgenmm.preprocessing.tokenizer import Tokenizer

ONE_REQUEST_BYTES = 1_750_000_000
"""What the caches of an engine take for one request of the whole context."""

FULL = Size(
    XGenMMConfig(),
    batches=(1, 8, 32, 64),
    context=800,
    tokens=64,
    prompts=(128, 512, 704, 2048),
    text=32,
    image=(1600, 1200),
    requests=64,
    lengths=20,
    copy=2**31,
    matrix=8192,
    rounds=5,
)
TINY = Size(
    TINY_CONFIG,
    batches=(1, 2),
    context=40,
    tokens=4,
    prompts=(8, 40),
    text=8,
    image=(80, 60),
    requests=3,
    lengths=3,
    copy=2**20,
    matrix=64,
    rounds=1,
)


class Context:
    """The device, its limits, and a model with random weights: speed does not depend on values."""

    def __init__(self, tiny: bool) -> None:
        self.device = Device("cuda" if torch.cuda.is_available() else "cpu")
        self.size = TINY if tiny else FULL
        self._exit = ExitStack()

    def __enter__(self) -> "Context":
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    @cached_property
    def bandwidth(self) -> float:
        """Bytes/s of a copy. A copied byte counts twice, as it is read and written."""
        size = self.size.copy
        source = torch.ones(size, dtype=torch.uint8, device=self.device.device)
        target = torch.empty_like(source)
        return 2 * size / self.device.seconds(lambda: target.copy_(source), self.size.rounds)

    @cached_property
    def matmul_rate(self) -> float:
        """FLOP/s of a large matrix product."""
        side, device = self.size.matrix, self.device
        a, b = (torch.randn(side, side, device=device.device, dtype=device.dtype) for _ in range(2))
        return 2 * side**3 / device.seconds(lambda: a @ b, self.size.rounds)

    @cached_property
    def model(self) -> "XGenMM":
        """The model as an engine has it."""
        from xgenmm.models.vision import fuse_attention

        model = random_model(self.size.config, self.device.device, self.device.dtype)
        fuse_attention(model.vlm.vision_encoder)
        return model

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """A tokenizer with the model's vocabulary."""
        from xgenmm.preprocessing.tokenizer import Tokenizer

        config = self.size.config
        folder = self._temporary_folder()
        write_tokenizer(folder, config)
        return Tokenizer.from_folder(folder, config.text.convention, config.additional_ids)

    @cached_property
    def checkpoint(self) -> Path:
        """A checkpoint folder, which is in the page cache."""
        folder = self._temporary_folder()
        write_checkpoint(folder, self.size.config, self.device.device, self.device.dtype)
        return folder

    def image(self, number: int) -> bytes:
        """A JPEG file that is cut into 5 tiles; each number gives another one."""
        return photo_jpeg(self.size.image, number)

    def drop_model(self) -> None:
        """Free the memory of `model`; its next use makes it again."""
        self.__dict__.pop("model", None)
        self.device.reset_peak_memory()

    def _temporary_folder(self) -> Path:
        return Path(self._exit.enter_context(tempfile.TemporaryDirectory()))
