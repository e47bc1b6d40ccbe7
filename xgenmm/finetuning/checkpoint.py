"""The checkpoint that is trained, and how the result is to be served: as it was trained.

A base model is fine-tuned as the authors do it: with the chat prompt and several tiles an image, so
that an instruct model comes out. Its result says so in its `preprocessor_config.json`. An adapter
cannot, so base models give a whole checkpoint only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xgenmm.checkpoints.checks import read_tokenizer
from xgenmm.checkpoints.registry import read_config
from xgenmm.config import GRIDS_384, TextConfig, XGenMMConfig
from xgenmm.errors import CheckpointError
from xgenmm.files import read_json_object
from xgenmm.finetuning.conversation import PAD
from xgenmm.preprocessing.tokenizer import Tokenizer

PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class TrainedCheckpoint:
    """A checkpoint to start from.

    Attributes:
        config, tokenizer: as it is trained.
        files: JSON files of the result in place of the folder's, by name.
    """

    folder: Path
    config: XGenMMConfig
    tokenizer: Tokenizer
    files: Mapping[str, Any] = field(default_factory=dict)


def read_trained(folder: Path) -> TrainedCheckpoint:
    """Read what is needed before training, apart from the weights.

    Raises CheckpointError if it is no image model v1.5, whose training the authors published, or
    its tokenizer cannot be read or lacks `<pad>`.
    """
    config, files = read_config(folder), dict[str, Any]()
    unsupported = config.vision.tower != "siglip" or not config.resampler.masked
    if unsupported or config.resampler.text_tokens or config.temporal is not None:
        raise CheckpointError(
            f"{folder.name} cannot be fine-tuned: only the image models v1.5 and demo can"
        )
    if config.text.prompt != "chat":
        config = _as_instruct_model(config)
        grids = [list(grid) for grid in config.tiling.grids]
        files[PREPROCESSOR] = {**read_json_object(folder / PREPROCESSOR), "grids": grids}
    tokenizer = read_tokenizer(folder, config)
    if PAD not in tokenizer.specials:
        raise CheckpointError(f"tokenizer: {folder}: added_tokens.json lacks {PAD}")
    return TrainedCheckpoint(folder, config, tokenizer, files)


def _as_instruct_model(config: XGenMMConfig) -> XGenMMConfig:
    """Return a base model's configuration with the chat prompt and the grids of the release."""
    side = config.vision.image_size
    grids = tuple((width // 384 * side, height // 384 * side) for width, height in GRIDS_384)
    tiling = replace(config.tiling, mode="anyres", grids=grids)
    return replace(config, tiling=tiling, text=TextConfig())
