"""`xgenmm finetune`: killed and resumed, on several devices, on a full disk, and with faults."""

import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import xgenmm
from tests.support import processes
from tests.support.tiny import checkpoint
from xgenmm.__main__ import main
from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.registry import read_config
from xgenmm.errors import CheckpointError, InputError
from xgenmm.finetuning.adapters import TrainingTarget, select_parameters
from xgenmm.finetuning.batch import IGNORED
from xgenmm.finetuning.checkpoint import read_trained
from xgenmm.finetuning.dataset import read_dataset
from xgenmm.finetuning.images import ImageReader
from xgenmm.finetuning.loader import RowReader
from xgenmm.finetuning.plots import draw_losses
from xgenmm.finetuning.progress import RunFolder
from xgenmm.finetuning.training import Training, TrainingSettings
from xgenmm.models.xgenmm import XGenMM

OPTIONS = ["--batch-size", "4", "--epochs", "2", "--save-every", "2", "--learning-rate", "1e-3"]
OPTIONS += ["--validation", "0.15"]
SAMPLES, STEPS = 14, 6
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as the processes do: the number of threads changes how sums are rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, `tiny`, and samples of 0 to 2 images, `data.jsonl`."""
    folder = tmp_path_factory.mktemp("finetuning")
    checkpoint(folder / "tiny")
    write_samples(folder)
    return folder


def write_samples(folder: Path) -> None:
    lines = []
    for number in range(SAMPLES):
        Image.new("RGB", (40 + number, 50), (12 * number, 0, 99)).save(folder / f"{number}.png")
        images = [f"{number}.png"] * (number % 3)
        turns = [
            {"role": "user", "content": "<image>" * len(images) + "What is this?"},
            {"role": "assistant", "content": f"Number {number}."},
        ]
        lines.append(json.dumps({"messages": turns, "images": images}))
    (folder / "data.jsonl").write_text("\n".join(lines))


def arguments(folder: Path, output: Path, *options: str) -> list[str]:
    names = [str(folder / "tiny"), str(folder / "data.jsonl"), "-o", str(output)]
    return ["finetune", *names, *OPTIONS, *options]


def read_log(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "seconds"} for line in lines]


def lines_of(output: Path) -> int:
    log = output / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_until(condition: Callable[[], bool], process: Any) -> None:
    """Wait for a condition or the end of a process."""
    while not condition() and process.is_alive():
        time.sleep(0.002)


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """The output of a run that was not killed."""
    output = folder / "finished"
    assert main(arguments(folder, output)) == 0
    return output


@pytest.fixture(scope="module")
def full(folder: Path) -> Path:
    """The output of full training."""
    output = folder / "full"
    assert main(arguments(folder, output, "--full")) == 0
    return output


def assert_same_weights(output: Path, expected: Path) -> None:
    found, wanted = load_file(output / WEIGHTS), load_file(expected / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_losses_fall_and_the_log_is_whole(finished: Path) -> None:
    log = read_log(finished)
    steps = [line["step"] for line in log if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    validated = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert validated[-1] < validated[0]
    names = {"adapter", "log.jsonl", "loss.png", "settings.json", "state"}
    assert {path.name for path in finished.iterdir()} == names


def test_killed_run_resumes_to_the_same_losses(folder: Path, finished: Path) -> None:
    output, exit_codes = folder / "killed", []
    for lines in sorted(random.Random(5).sample(range(1, 7), 3)):
        process = processes.start(arguments(folder, output), folder / "killed.txt")
        wait_until(lambda lines=lines: lines_of(output) >= lines, process)  # type: ignore[misc]
        process.kill()
        process.join()
        exit_codes.append(process.exitcode)
    assert exit_codes == [-signal.SIGKILL] * 3
    assert main(arguments(folder, output)) == 0
    assert read_log(output) == read_log(finished)
    assert_same_weights(output, finished)


def test_interrupted_run_says_how_to_resume(folder: Path) -> None:
    output, said = folder / "interrupted", folder / "interrupted.txt"
    endless = arguments(folder, output, "--epochs", "1000")
    process = processes.start(endless, said)
    wait_until(lambda: lines_of(output) >= 1, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert said.read_text().splitlines()[-1] == "interrupted; the same command resumes"
    assert "Traceback" not in said.read_text()


def run_group(arguments: list[str], said: Path) -> None:
    """Run two processes to the end."""
    store, group = processes.start_group(arguments, said)
    for process in group:
        process.join()
    del store
    assert [process.exitcode for process in group] == [0, 0], said.read_text()


def assert_close(output: Path, expected: Path) -> None:
    found, wanted = read_log(output), read_log(expected)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=2e-4)


def test_two_devices_give_the_losses_of_one(folder: Path, finished: Path) -> None:
    output = folder / "two"
    run_group(arguments(folder, output), folder / "two.txt")
    assert_close(output, finished)


@pytest.mark.parametrize("name", ["finished", "full"])
def test_model_split_over_two_devices_gives_the_losses_of_one(
    folder: Path, name: str, request: pytest.FixtureRequest
) -> None:
    expected: Path = request.getfixturevalue(name)
    output, said = folder / f"sharded-{name}", folder / f"sharded-{name}.txt"
    options = ["--shard", *(["--full"] if name == "full" else [])]
    store, group = processes.start_group(arguments(folder, output, *options), said)
    saved = output / "state" / "step-00000002"
    wait_until(lambda: saved.exists(), group[0])
    for process in group:
        process.kill()
    for process in group:
        process.join()
    del store
    assert group[0].exitcode == -signal.SIGKILL, said.read_text()
    run_group(arguments(folder, output, *options), said)
    assert_close(output, expected)
    assert "split over 2 devices" in said.read_text()


def test_bfloat16_changes_the_losses_little(folder: Path, finished: Path) -> None:
    output = folder / "bf16"
    assert main(arguments(folder, output, "--precision", "bf16")) == 0
    exact, rounded = (
        [line["loss"] for line in read_log(run) if "loss" in line] for run in (finished, output)
    )
    assert exact != rounded
    assert rounded == pytest.approx(exact, abs=3e-3)
    state = output / f"state/step-{STEPS:08}/trained.safetensors"
    assert {t.dtype for t in load_file(state).values()} == {torch.float32}
    assert {t.dtype for t in load_file(output / WEIGHTS).values()} == {torch.bfloat16}


def test_full_disk_loses_nothing(folder: Path, finished: Path) -> None:
    def run_on_full_disk(output: Path, max_file_bytes: int, *options: str) -> str:
        said, command = folder / f"{output.name}.txt", arguments(folder, output, *options)
        process = processes.start(command, said, max_file_bytes=max_file_bytes)
        process.join()
        assert process.exitcode == 1, said.read_text()
        error = said.read_text().splitlines()[-1]
        assert error.startswith(f"error: {output}")
        assert error.endswith("free some disk space and run the same command again, it resumes")
        return error

    long = ["--epochs", "6", "--save-every", "100"]  # a log of 2.5 kB, and no state before
    assert "/log.jsonl: " in run_on_full_disk(folder / "full-log", 2000, *long)
    output, states = folder / "full-disk", finished / "state/step-00000006"
    weights, moments = (
        (states / name).stat().st_size for name in ("trained.safetensors", "optimizer.safetensors")
    )
    assert "/optimizer.safetensors: " in run_on_full_disk(output, (weights + moments) // 2)
    assert not any((output / "state").glob("step*"))
    shutil.copytree(finished, output, dirs_exist_ok=True)  # all but the result
    shutil.rmtree(output / "adapter")
    assert "/adapter: " in run_on_full_disk(output, weights // 2)
    assert main(arguments(folder, output)) == 0
    assert read_log(output) == read_log(finished)
    assert_same_weights(output, finished)


def test_full_training_writes_a_whole_checkpoint(folder: Path, full: Path) -> None:
    before = load_file(folder / "tiny" / "model.safetensors")
    after = load_file(full / "checkpoint" / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "vision_encoder" in name} <= same
    assert "vlm.lang_model.lm_head.weight" not in same
    assert main(["verify", str(full / "checkpoint")]) == 0


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


def test_adapter_of_another_checkpoint_is_refused(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, target = checkpoint(tmp_path / "other", seed=4), tmp_path / "merged"
    assert main(["merge", str(other), str(finished / "adapter"), "-o", str(target)]) == 1
    assert re.search("error: adapter: .* is for .*tiny.*, not for ", capsys.readouterr().err)
    assert not target.exists()


def test_target_that_matches_nothing_is_an_error(folder: Path) -> None:
    model = XGenMM(read_config(folder / "tiny"))
    with pytest.raises(InputError, match="no layer is named q_proj; use some of qkv_proj"):
        select_parameters(model, TrainingTarget(targets=("q_proj", "o_proj")))


def test_step_without_labels_has_no_loss(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log({"step": 1, "loss": math.nan})
    assert run.read_log() == [{"step": 1}]
    draw_losses(run.read_log(), tmp_path / "loss.png")


def test_other_settings_do_not_continue_a_run(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, finished, "--lora-rank", "4")) == 1
    assert "a run with other settings: target" in capsys.readouterr().err


def test_sharding_by_accelerate_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(arguments(folder, folder / "refused")) == 1
    assert "leave FSDP out of accelerate's configuration" in capsys.readouterr().err


def test_base_model_is_served_as_it_was_trained(folder: Path) -> None:
    base, output = checkpoint(folder / "base", base=True), folder / "tuned-base"
    command = arguments(folder, output, "--epochs", "1")
    command[1] = str(base)
    assert main(command) == 0
    assert not (output / "adapter").exists()
    assert main(["verify", str(output / "checkpoint")]) == 0
    trained, sample = read_trained(base), read_dataset(folder / "data.jsonl").samples[5]
    row = RowReader(trained.config, trained.tokenizer, ImageReader()).read(sample)
    engine = xgenmm.load(output / "checkpoint", device="cpu")
    question, answer = (turn.text for turn in sample.sample.turns[1:])
    images = [Image.open(folder / "5.png")] * 2
    request = xgenmm.Request(question, images)
    start = next(place for place, label in enumerate(row.labels) if label != IGNORED)
    assert engine.prompt(request).ids == row.ids[:start]
    assert engine.tokenizer.decode(row.ids[start:-1]) == answer
    for served, seen in zip(engine.preprocess_images(request), row.images, strict=True):
        assert served.columns * served.rows > 1
        assert np.array_equal(served.pixels, seen.pixels)
    engine.close()


def test_tokenizer_beside_the_checkpoint_goes_with_the_result(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny/tokenizer.model").rename(tmp_path / "tokenizer.model")
    command = arguments(folder, tmp_path / "output", "--full", "--epochs", "1")
    command[1] = str(tmp_path / "tiny")
    assert main(command) == 0
    assert read_trained(tmp_path / "output/checkpoint").tokenizer.encode("What?")


def test_images_of_urls_are_downloaded_once(folder: Path, tmp_path: Path, file_server: str) -> None:
    source = (folder / "data.jsonl").read_text()
    data, image = tmp_path / "data.jsonl", tmp_path / "1.png"
    shutil.copy(folder / "1.png", image)
    data.write_text(source.splitlines()[1].replace("1.png", f"{file_server}/1.png"))
    command = arguments(folder, tmp_path / "output", "--validation", "0")
    command[2] = str(data)
    assert main(command) == 0
    kept = list((tmp_path / "output/downloads").iterdir())
    assert [path.read_bytes() for path in kept] == [image.read_bytes()]
    image.unlink()
    assert main(command) == 0  # the same run again: checks the data, and has nothing left to do
    assert len(read_log(tmp_path / "output")) == 2


def test_image_lost_after_the_check_is_named(folder: Path, tmp_path: Path) -> None:
    write_samples(tmp_path)
    trained, dataset = read_trained(folder / "tiny"), read_dataset(tmp_path / "data.jsonl")
    reader = RowReader(trained.config, trained.tokenizer, ImageReader())
    (tmp_path / "4.png").unlink()
    settings, output = TrainingSettings(validation=0), tmp_path / "output"
    training = Training(trained, reader, dataset.samples, settings, output)
    with pytest.raises(InputError, match=r"data\.jsonl:5: image 4\.png: cannot open"):
        training.run()
    write_samples(tmp_path)
    Training(trained, reader, dataset.samples, settings, output).run()
    assert (output / "adapter").exists()


@pytest.mark.parametrize(
    "options", [{"version": "v1"}, {"version": "v1", "base": True}, {"temporal": "gttm"}]
)
def test_models_that_the_authors_did_not_finetune_are_refused(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match="cannot be fine-tuned: only the image models"):
        read_trained(checkpoint(tmp_path / "tiny", **options))
