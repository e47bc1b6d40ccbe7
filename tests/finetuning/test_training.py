"""`xgenmm finetune` as a process: killed and resumed, on two devices, merged, and with faults."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.tiny import checkpoint
from xgenmm.__main__ import main
from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.registry import read_config
from xgenmm.errors import InputError
from xgenmm.finetuning.adapters import TrainingTarget, select_parameters
from xgenmm.models.xgenmm import XGenMM

OPTIONS = ["--batch-size", "4", "--epochs", "2", "--save-every", "2", "--learning-rate", "1e-3"]
STEPS = 10
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, `tiny`, and 20 samples, `data.jsonl`."""
    folder = tmp_path_factory.mktemp("finetuning")
    checkpoint(folder / "tiny")
    lines = []
    for number in range(20):
        Image.new("RGB", (40 + number, 50), (12 * number, 0, 99)).save(folder / f"{number}.png")
        images = [f"{number}.png"] * (number % 3)  # with 0 to 2 images
        turns = [
            {"role": "user", "content": "<image>" * len(images) + "What is this?"},
            {"role": "assistant", "content": f"Number {number}."},
        ]
        lines.append(json.dumps({"messages": turns, "images": images}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def command(folder: Path, output: Path, *options: str) -> list[str]:
    return [
        *("-m", "xgenmm", "finetune", str(folder / "tiny"), str(folder / "data.jsonl")),
        *("-o", str(output), *OPTIONS, *options),
    ]


def run(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def losses(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """The output of a run that was not killed."""
    output = folder / "finished"
    run(command(folder, output))
    return output


def test_killed_run_resumes_to_the_same_losses(folder: Path, finished: Path) -> None:
    output, rng, kills = folder / "killed", random.Random(5), 0
    while not (output / "adapter").exists():
        target = rng.randint(1, 3) if kills < 4 else 99  # lines to wait for; then to the end
        process = subprocess.Popen(
            [sys.executable, *command(folder, output)],
            env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        began = len(losses(output)) if (output / "log.jsonl").exists() else 0
        while process.poll() is None and kills < 4:
            log = output / "log.jsonl"
            if log.exists() and log.read_text().count("\n") >= began + target:
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
    assert kills == 4
    assert losses(output) == losses(finished)
    name = "adapter/adapter_model.safetensors"
    assert (output / name).read_bytes() == (finished / name).read_bytes()


def test_two_processes_give_the_losses_of_one(folder: Path, finished: Path) -> None:
    output = folder / "two"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29571"]
    run([*launch, *command(folder, output)])
    one, two = losses(finished), losses(output)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=2e-4)


def test_losses_fall_and_the_log_is_whole(finished: Path) -> None:
    log = losses(finished)
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    validated = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert validated[-1] < validated[0]
    assert {path.name for path in finished.iterdir()} == {
        "adapter", "best", "log.jsonl", "loss.png", "settings.json", "state",
    }  # fmt: skip


def test_merged_checkpoint_equals_the_adapter_in_peft(folder: Path, finished: Path) -> None:
    from peft import PeftModel

    merged, base = folder / "merged", folder / "tiny"
    assert main(["merge", str(base), str(finished / "adapter"), "-o", str(merged)]) == 0
    assert main(["verify", str(merged)]) == 0
    model = XGenMM(read_config(base))
    load_parameters(model, base, device="cpu", dtype=torch.float32)
    expected = (
        PeftModel.from_pretrained(model, str(finished / "adapter")).merge_and_unload().state_dict()
    )
    found = load_file(merged / "model.safetensors")
    before = load_file(base / "model.safetensors")
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert any("qkv_proj" in name for name in changed)
    assert any("vision_tokenizer" in name for name in changed)
    assert not any("vision_encoder" in name or "embed" in name for name in changed)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_full_training_writes_a_whole_checkpoint(folder: Path) -> None:
    output = folder / "full"
    run(command(folder, output, "--full", "--authors", "--epochs", "1"))
    before = load_file(folder / "tiny" / "model.safetensors")
    after = load_file(output / "checkpoint" / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "vision_encoder" in name} <= same
    assert "vlm.lang_model.lm_head.weight" not in same
    assert main(["verify", str(output / "checkpoint")]) == 0


def test_target_that_matches_nothing_is_an_error(folder: Path) -> None:
    model = XGenMM(read_config(folder / "tiny"))
    with pytest.raises(InputError, match="no layer is named q_proj; use some of qkv_proj"):
        select_parameters(model, TrainingTarget(targets=("q_proj", "o_proj")))


def test_other_settings_do_not_continue_a_run(folder: Path, finished: Path) -> None:
    done = subprocess.run(
        [sys.executable, *command(folder, finished, "--lora-rank", "4")],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "a run with other settings: target" in done.stderr
