"""The training of the video demo, and the shipped checkpoint."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import xgenmm
from scripts.demo_model.checkpoint import DEMO, demo_tokenizer
from scripts.demo_model.packing import pack
from scripts.demo_model.wordings import QA
from scripts.demo_video import train as training
from scripts.demo_video.batches import Batches
from scripts.demo_video.checkpoint import CONFIG, DEMO_VIDEO, initial_model
from scripts.demo_video.evaluate import answers
from scripts.demo_video.examples import EXAMPLES, FRAMES, example_clip
from scripts.demo_video.frames import LabelledClip, labels, render
from scripts.demo_video.losses import Heads, choose_latents, clip_tokens, compute_losses
from scripts.demo_video.sampling import sample_clip
from scripts.demo_video.stages import STAGES
from scripts.demo_video.train import encode
from scripts.demo_video.video_files import write_video
from xgenmm.models.xgenmm import XGenMM

TINY = tuple(replace(stage, steps=2, clips=3, new_clips=2) for stage in STAGES)


@pytest.fixture(scope="module")
def model() -> XGenMM:
    torch.manual_seed(0)
    return initial_model()


def test_clips_are_encoded_together_as_one_by_one(model: XGenMM) -> None:
    latents = torch.randn(3, 5, CONFIG.resampler.num_latents, CONFIG.vision.hidden_size)
    kept = torch.rand(latents.shape[0], latents.shape[2]) < 0.5
    with torch.no_grad():
        together = clip_tokens(model, latents, kept)
        one_by_one = torch.stack([model.clip_tokens(list(clip)) for clip in latents])
    torch.testing.assert_close(together, one_by_one[kept], rtol=1e-4, atol=1e-5)


def test_the_decoder_does_not_see_latents_that_are_left_out(model: XGenMM) -> None:
    clip = sample_clip(random.Random(3))
    shown = LabelledClip(0, False, labels(clip, 8))
    kept = choose_latents(shown.labels[None], empty=0.0)
    assert 0 < int(kept.sum()) < CONFIG.resampler.num_latents
    rows = pack(demo_tokenizer(DEMO_VIDEO), [([shown], [QA("count", "How many?", "2")])])
    latents = encode(model, render(clip, 8, random.Random(0)))[None].float()
    changed = torch.where(kept[:, None, :, None], latents, latents + 1)
    found = [
        compute_losses(model, Heads(), each, shown.labels[None], rows, kept)[0]["answer"]
        for each in (latents, changed)
    ]
    assert found[0] == found[1]


def test_a_batch_asks_about_new_clips_and_earlier_ones() -> None:
    batches = Batches(TINY[1], demo_tokenizer(DEMO_VIDEO), seed=1)
    first, second = batches[0], batches[1]
    assert list(first.pixels) == [0, 1]
    assert list(second.pixels) == [2, 3]
    assert [clip.number for clip in second.clips[:2]] == [2, 3]
    assert second.clips[2].number in (0, 1)
    assert second.clips[0].labels.shape == (2, 8, CONFIG.resampler.num_latents)


def test_training_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "VALIDATION_CLIPS", 2)
    monkeypatch.setattr(training, "STAGES", TINY[:1])
    training.train(tmp_path / "demo-video", tmp_path / "state")
    monkeypatch.setattr(training, "STAGES", TINY)
    training.train(tmp_path / "demo-video", tmp_path / "state")
    history = json.loads((tmp_path / "state" / "history.json").read_text())
    assert [entry["stage"] for entry in history] == [stage.name for stage in STAGES]
    assert xgenmm.load(tmp_path / "demo-video").config == CONFIG
    before = load_file(DEMO / "model.safetensors")
    after = load_file(tmp_path / "demo-video" / "model.safetensors")
    changed = {
        name.split(".")[1]
        for name, tensor in before.items()
        if tensor.shape == after[name].shape and not torch.equal(tensor, after[name])
    }
    assert changed == {"vision_tokenizer", "lang_model"}  # the tower is frozen


@pytest.mark.parametrize("seed", sorted({seed for seed, _, _ in EXAMPLES}))
def test_the_shipped_checkpoint_answers_the_examples(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(example_clip(seed), path, FRAMES)
    frames = xgenmm.read_video(path).frames
    asked = [QA("", question, answer) for number, question, answer in EXAMPLES if number == seed]
    engine = xgenmm.load(DEMO_VIDEO)
    assert list(answers(engine, frames, asked)) == [qa.answer for qa in asked]
