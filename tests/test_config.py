"""Which configuration a checkpoint folder gets."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import DEMO
from xgenmm.checkpoints.registry import read_config, releases
from xgenmm.config import GRIDS_384, INTERLEAVE, RELEASES, ConfigError, from_json
from xgenmm.errors import CheckpointError

# As released: the base model's config.json also says any-resolution, although it has one tile.
RELEASED: dict[str, Any] = {
    "architectures": ["XGenMMModelForConditionalGeneration"],
    "text_config": {"initial_tokenizer_len": 32012, "model_type": "phi3", "sliding_window": 2047},
    "vision_encoder_config": {
        "anyres_patch_sampling": True,
        "image_aspect_ratio": "anyres",
        "model_type": "xgenmm_vision_encoder",
    },
    "vision_tokenizer_config": {"model_type": "xgenmm_vision_tokenizer"},
}
GRIDS = [list(grid) for grid in GRIDS_384]
BASE = "xgen-mm-phi3-mini-base-r-v1.5"
V1 = "xgen-mm-phi3-mini-instruct-r-v1"


@pytest.mark.parametrize("name", RELEASES)
def test_released_folder_gets_its_configuration(name: str) -> None:
    grids = [list(grid) for grid in RELEASES[name].tiling.grids] or None
    assert from_json(RELEASED, {"grids": grids}, name) == RELEASES[name]


def test_every_release_has_a_configuration() -> None:
    assert set(releases()) == {*RELEASES, "demo"}


def test_folder_with_an_unknown_name_is_recognised_by_its_files() -> None:
    v1 = RELEASED | {"architectures": ["Blip3ModelForConditionalGeneration"]}
    assert from_json(RELEASED, {"grids": GRIDS}) == RELEASES[INTERLEAVE]
    assert from_json(RELEASED, {"grids": None}) == RELEASES[BASE]
    assert from_json(v1, {"grids": [[378, 756]]}).vision.tower == "open_clip"
    assert from_json(v1, {}).text.prompt == "few_shot"
    with pytest.raises(ConfigError, match="llama"):
        from_json({"model_type": "llama"}, {})


def test_sizes_in_the_files_take_precedence() -> None:
    stated = RELEASED | {"text_config": {"num_hidden_layers": 2, "initial_tokenizer_len": 500}}
    config = from_json(stated, {"grids": [[42, 84]], "image_mean": [0, 0, 0]})
    assert config.decoder.num_layers == 2
    assert config.tiling.grids == ((42, 84),)
    assert config.tiling.mean == (0, 0, 0)
    assert next(iter(config.additional_ids.items())) == ("<image>", 500)


@pytest.mark.parametrize("folder", [BASE, f"{BASE}-bf16", "blip3-phi3-mini-instruct-r-v1"])
def test_folder_name_selects_the_release(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text(json.dumps(RELEASED))
    (tmp_path / folder / "preprocessor_config.json").write_text("{}")
    expected = RELEASES[BASE] if folder.startswith(BASE) else RELEASES[V1]
    assert read_config(tmp_path / folder) == expected


def test_missing_or_malformed_configuration_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must contain a JSON object, not list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)


def test_demo_is_marked_as_a_demonstration() -> None:
    config = read_config(DEMO)
    assert config.demo
    assert config.text == RELEASES[INTERLEAVE].text
    assert config.decoder.window_keys == 2048
