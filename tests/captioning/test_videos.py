"""`xgenmm caption` on videos: folders, tables and tars, and models that take no videos."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import av
import numpy as np
import pyarrow
import pytest
from PIL import Image

import xgenmm
from tests.captioning.dataset import NEW_TOKENS, caption, png, read_rows, write_tar
from tests.support import tiny
from xgenmm import Engine, InputError, Request, SamplingParams
from xgenmm.captioning.media import VIDEO_SUFFIXES, media_suffix
from xgenmm.captioning.pipeline import CaptionTask
from xgenmm.captioning.ray_pipeline import CaptionActor, preprocess_block
from xgenmm.captioning.sources import count_records, read_records
from xgenmm.config import INTERLEAVE, VIDEO_128
from xgenmm.preprocessing.tiling import tile_image

QUESTION = "What happens?"
SAMPLING = SamplingParams(max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def video_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("video"), temporal="gttm")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two clips, a damaged one, and an image."""
    folder = tmp_path_factory.mktemp("clips")
    frames = np.random.default_rng(0).integers(0, 256, (12, 32, 48, 3), dtype=np.uint8)
    with av.open(folder / "a.mp4", "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    first, *others = [Image.fromarray(frame) for frame in frames[:3]]
    first.save(folder / "b.gif", save_all=True, append_images=others, duration=100)
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:1000])
    (folder / "still.png").write_bytes(png())
    (folder / "notes.txt").write_text("no video")
    return folder


def answer(checkpoint: Path, request: Callable[[Engine], Request]) -> str:
    engine = xgenmm.load(checkpoint)
    text = engine.stream(request(engine)).text()
    engine.close()
    return text


def test_rows_of_a_folder_a_tar_and_ray_are_the_answers_about_its_clips(
    tmp_path: Path, clips: Path, video_checkpoint: Path
) -> None:
    assert caption(clips, tmp_path / "out", video_checkpoint, "--question", QUESTION) == 0
    rows = read_rows(tmp_path / "out")
    assert [row["image"] for row in rows] == ["a.mp4", "b.gif", "cut.mp4", "still.png"]
    assert rows[2]["error"].startswith("video: ")
    assert rows[2]["text"] is None
    engine = xgenmm.load(video_checkpoint)
    for row, frames in zip([*rows[:2], rows[3]], (8, 3, 1), strict=True):
        path = clips / row["image"]
        still = path.suffix == ".png"
        video = [xgenmm.read_image(path)] if still else xgenmm.read_video(path).frames
        assert len(video) == frames
        expected = engine.stream(Request(QUESTION, video=video, sampling=SAMPLING))
        assert (row["text"], row["error"]) == (expected.text(), None)
        assert row["image_tokens"] == engine.config.clip_tokens

    task = CaptionTask(str(video_checkpoint), sampling=SAMPLING)
    listed = read_records(str(clips), [QUESTION], "image", VIDEO_SUFFIXES)
    column = [json.dumps(asdict(record)) for record in listed]
    block = preprocess_block(pyarrow.table({"record": column}), task)
    of_ray = [json.loads(cell)[0] for cell in CaptionActor(task)(block)["rows"].to_pylist()]
    assert sorted(of_ray, key=lambda row: str(row["id"])) == rows

    content = {path.name: path.read_bytes() for path in clips.iterdir()}
    members = {"0.png": content["still.png"], "0.mp4": content["a.mp4"], "1.gif": content["b.gif"]}
    write_tar(tmp_path / "a.tar", [*members.items(), ("2.txt", b"nothing")])
    tar = tmp_path / "a.tar"
    assert caption(tar, tmp_path / "of_tar", video_checkpoint, "--question", QUESTION) == 0
    of_tar = read_rows(tmp_path / "of_tar")
    assert [row["image"] for row in of_tar] == ["0.mp4", "1.gif", ""]
    assert [row["text"] for row in of_tar[:2]] == [row["text"] for row in rows[:2]]
    assert of_tar[2]["error"] == "image: the sample of 2.txt has no image or video"


def test_frames_chosen_by_options_are_images_of_an_interleave_model(
    tmp_path: Path, clips: Path, file_server: str
) -> None:
    checkpoint = tiny.checkpoint(tmp_path / INTERLEAVE)
    shutil.copytree(clips, tmp_path / "clips")
    shutil.copy(clips / "a.mp4", tmp_path / "clip")
    sources = ["clips/a.mp4", f"{file_server}/clips/a.mp4?x=1.png", f"{file_server}/clip", "clip"]
    sources += ["clips/b.gif", f"{file_server}/no.mp4", "clips/notes.txt"]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps({"path": source}) + "\n" for source in sources))
    options = ["--image-column", "path", "--num-frames", "2", "--start", "0.2", "--end", "0.9"]
    options += ["--question", QUESTION]
    assert caption(table, tmp_path / "out", checkpoint, *options) == 0
    rows = read_rows(tmp_path / "out")

    def about_frames(engine: Engine) -> Request:
        tiling = replace(engine.config.tiling, mode="squash")
        size = engine.config.vision.image_size
        frames = xgenmm.read_video(clips / "a.mp4", 2, start=0.2, end=0.9).frames
        tiles = [tile_image(frame, tiling, size) for frame in frames]
        return Request(QUESTION, tiles, sampling=SAMPLING)

    expected = answer(checkpoint, about_frames)
    assert [row["text"] for row in rows[:4]] == [expected] * 4
    image = xgenmm.read_image(clips / "b.gif")
    about_image = Request(QUESTION, [image], sampling=SAMPLING)
    assert rows[4]["text"] == answer(checkpoint, lambda _: about_image)
    assert rows[5]["error"].startswith(f"video: {file_server}/no.mp4 returned HTTP 404")
    assert rows[6]["error"].startswith("video: is not a video")
    options[3] = "3"
    assert caption(table, tmp_path / "out", checkpoint, *options) == 1


def test_model_that_takes_no_videos_is_named(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "xgen-mm-phi3-mini-instruct-singleimg-r-v1.5")
    table = tmp_path / "table.csv"
    table.write_text(f"image\n{clips / 'a.mp4'}\n")
    assert caption(table, tmp_path / "out", checkpoint) == 0
    error = f"video: this model takes no videos; use {VIDEO_128} or {INTERLEAVE}"
    assert [row["error"] for row in read_rows(tmp_path / "out")] == [error]
    shutil.copytree(clips, tmp_path / "clips", ignore=lambda *_: ["b.gif", "still.png"])
    assert caption(tmp_path / "clips", tmp_path / "none", checkpoint) == 1
    assert f"contains no images; for videos, use {VIDEO_128}" in capsys.readouterr().err


def test_missing_pyav_stops_the_run(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgenmm.captioning.sources.find_spec", lambda name: None)
    assert count_records(str(clips), [], "image") == 2
    with pytest.raises(InputError, match=r"^INPUT: .* has videos, such as a\.mp4; .*install av`"):
        count_records(str(clips), [], "image", VIDEO_SUFFIXES)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.b/c.MP4", ".mp4"), ("http://x.y/a.mkv?b=c.png#d.jpg", ".mkv"), ("http://x.y/a", "")],
)
def test_suffix_of_a_path_or_url(name: str, suffix: str) -> None:
    assert media_suffix(name) == suffix
