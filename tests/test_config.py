"""Which configuration a checkpoint folder gets."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import DEMO
from xgenmm.checkpoints.config_json import ConfigError, from_json
from xgenmm.checkpoints.registry import read_config, releases
from xgenmm.config import GRIDS_384, INTERLEAVE, RELEASES, VIDEO_32, VIDEO_128, TemporalConfig
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
    assert set(releases()) == {*RELEASES, "demo", "demo-video"}


def test_folder_with_an_unknown_name_is_recognised_by_its_files() -> None:
    v1 = RELEASED | {"architectures": ["Blip3ModelForConditionalGeneration"]}
    assert from_json(RELEASED, {"grids": GRIDS}) == RELEASES[INTERLEAVE]
    assert from_json(RELEASED, {"grids": None}) == RELEASES[BASE]
    assert from_json(v1, {"grids": [[378, 756]]}).vision.tower == "open_clip"
    assert from_json(v1, {}).text.prompt == "few_shot"
    with pytest.raises(ConfigError, match="llama"):
        from_json({"model_type": "llama"}, {})


def test_video_model_with_an_unknown_name_states_its_temporal_encoder() -> None:
    assert from_json(RELEASED, {}).temporal is None
    stated = RELEASED | {"temporal_encoder_config": {"kind": "token_learner", "num_tokens": 16}}
    config = from_json(stated, {})
    assert config.temporal == TemporalConfig("token_learner", num_tokens=16)
    assert (config.tiling.mode, config.text.convention) == ("pad", "slow")
    assert [RELEASES[name].clip_tokens for name in (VIDEO_128, VIDEO_32, INTERLEAVE)] == [
        128,
        32,
        0,
    ]


def test_sizes_in_the_files_take_precedence() -> None:
    stated = RELEASED | {
        "text_config": {"num_hidden_layers": 2, "initial_tokenizer_len": 500},
        "vision_encoder_config": {"image_size": 42},
    }
    config = from_json(stated, {"grids": [[42, 84]], "image_mean": [0, 0, 0]})
    assert config.decoder.num_layers == 2
    assert config.tiling.grids == ((42, 84),)
    assert config.tiling.mean == (0, 0, 0)
    assert next(iter(config.additional_ids.items())) == ("<image>", 500)


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("text_config", "num_hidden_layers", "32", "'32', but should be a valid integer"),
        ("text_config", "num_hidden_layers", 10**12, "but should be less than or equal to 1024"),
        ("text_config", "num_attention_heads", 5, r"5, but should divide hidden_size \(3072\)"),
        ("text_config", "num_key_value_heads", 8, "8, but only 32 is supported"),
        ("text_config", "rms_norm_eps", -1e-5, "-1e-05, but should be greater than 0"),
        ("text_config", "rope_theta", float("nan"), "nan, but should be"),
        ("text_config", "initial_tokenizer_len", 40000, "but should be at most vocab_size"),
        ("text_config", "max_position_embeddings", 640, "640, but should be more than the 640 "),
        ("text_config", "sliding_window", -1, "-1, but should be greater than or equal to 1"),
        ("vision_encoder_config", "patch_size", 500, r"but should be at most image_size \(384\)"),
        ("vision_tokenizer_config", "masked", 1, "1, but should be a valid boolean"),
        ("temporal_encoder_config", "kind", "perceiver", "but should be 'gttm' or 'token_lear"),
        ("temporal_encoder_config", "num_heads", 7, "7, but should divide hidden_size"),
    ],
)
def test_impossible_value_in_config_is_named_in_the_error(
    section: str, field: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {section}\.{field} is .*{message}"):
        from_json(RELEASED | {section: {field: value}}, {"grids": GRIDS})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_std", [0.5, 0, 0.5], "image_std.1 is 0, but should be greater than or equal to"),
        ("image_mean", [123, 116, 103], "image_mean.0 is 123, but should be less than or equal"),
        ("image_mean", "half", "image_mean is 'half', but should be a list"),
        ("grids", [[384, 768, 1]], "grids.0 is .*, but should have at most 2 items"),
        ("grids", [[384, 700]], r"grids has \[384, 700\], but should have multiples of 384"),
        ("grids", [], "grids is empty"),
    ],
)
def test_impossible_value_in_preprocessor_config_is_named_in_the_error(
    field: str, value: object, message: str
) -> None:
    preprocessor = {"grids": GRIDS, field: value}
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: {message}"):
        from_json(RELEASED, preprocessor)


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
    with pytest.raises(
        CheckpointError, match=r"config\.json: it is \[1\], but should be an object"
    ):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)


def test_demo_is_marked_as_a_demonstration() -> None:
    config = read_config(DEMO)
    assert config.demo
    assert config.text == RELEASES[INTERLEAVE].text
    assert config.decoder.window_keys == 2048
