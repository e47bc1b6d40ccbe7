"""`xgenmm parity` on the golden cases, and on modified ones."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import golden_data
from xgenmm.__main__ import main
from xgenmm.evaluation.golden import golden_config
from xgenmm.evaluation.parity import check_folder
from xgenmm.models.image_features import normalize
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.tiling import tile_image


def test_every_golden_case_is_reproduced() -> None:
    names = ("v15_anyres", "v1_instruct", "v15_video_gttm", "v15_video_tl")
    folders = [golden_data.folder(n) for n in (*names, "tokenizer", "tokenizer_video")]
    tokenizer = golden_data.folder("tokenizer") / "checkpoint"
    command = [sys.executable, "-m", "xgenmm", "parity", *map(str, folders)]
    command += ["--tokenizer", str(tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "50 passed, 0 failed", done.stdout + done.stderr
    assert done.returncode == 0
    panorama = next(line for line in done.stdout.splitlines() if "v15_anyres/panorama" in line)
    for stage in ("tiles", "mask", "features", "vision_tokens", "inputs_embeds", "logits"):
        assert f" {stage} " in panorama
    assert "greedy_ids 0 differ, beam3_ids 0 differ" in panorama
    clip = next(line for line in done.stdout.splitlines() if "v15_video_gttm/three" in line)
    for stage in ("tiles", "tiles_squash", "latents", "temporal", "vision_tokens", "logits"):
        assert f" {stage} " in clip
    assert "v15_video_gttm/frame_sampling: frame_ids 0 differ" in done.stdout


@pytest.mark.parametrize(
    ("stage", "error"),
    [("tiles.0", 2e-6), ("features.0", 2e-4), ("vision_tokens.0", 2e-4), ("logits", 2e-3)],
)
def test_difference_above_the_tolerance_fails(tmp_path: Path, stage: str, error: float) -> None:
    folder = copy_with_case(tmp_path, "panorama")
    activations = load_file(folder / "activations.safetensors")
    activations[f"panorama.{stage}"].view(-1)[0] += error
    save_file(activations, folder / "activations.safetensors")
    (case,) = check_folder(folder, None)
    assert not case.passed


def test_wrong_id_fails_and_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_with_case(tmp_path, "panorama")
    golden = json.loads((folder / "cases.json").read_text())
    golden["cases"][0]["beam3_ids"][-1] += 1
    (folder / "cases.json").write_text(json.dumps(golden))
    assert main(["parity", str(folder)]) == 1
    assert "beam3_ids 1 differ" in capsys.readouterr().out


def test_folder_without_golden_data_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", str(tmp_path)]) == 1
    assert main(["parity", str(golden_data.folder("tokenizer"))]) == 1  # without --tokenizer
    assert main(["parity", str(golden_data.folder("tokenizer")), "--tokenizer", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.count("0 passed, 1 failed") == 3
    assert f"FAIL {tmp_path}: its tokenizer needs tokenizer.model or tokenizer.json" in said


def test_base_preprocessing_equals_the_original() -> None:
    folder = golden_data.folder("v15_base")
    golden = json.loads((folder / "cases.json").read_text())
    activations = load_file(folder / "activations.safetensors")
    tiling = golden_config(golden).tiling
    compared = 0
    for case in golden["cases"]:
        image = read_image(folder / case["images"][0])
        for key, config in (
            ("pixel_values", tiling),
            ("pixel_values_pad", replace(tiling, mode="pad")),
        ):
            expected = activations.get(f"{case['name']}.{key}")
            if expected is not None:
                pixels = torch.from_numpy(tile_image(image, config, 42).pixels)
                found = normalize(pixels, config, torch.float32)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
                compared += 1
    assert compared == 3


def copy_with_case(target: Path, name: str) -> Path:
    """A copy of the any-resolution golden folder that holds one case only."""
    folder = target / "golden"
    shutil.copytree(golden_data.folder("v15_anyres"), folder)
    golden = json.loads((folder / "cases.json").read_text())
    golden["cases"] = [case for case in golden["cases"] if case["name"] == name]
    (folder / "cases.json").write_text(json.dumps(golden))
    return folder
