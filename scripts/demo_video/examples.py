"""The example clips and questions that are shipped with the checkpoint."""

import json
import random
from pathlib import Path

from PIL import Image

from scripts.demo_model.drawing import draw
from scripts.demo_video.clip import Clip
from scripts.demo_video.losses import MAX_FRAMES
from scripts.demo_video.sampling import sample_clip
from scripts.demo_video.video_files import RATE, write_video
from xgenmm.preprocessing.frame_indices import frame_indices

FRAMES = 40
# Seeds of clips, a question, and the right answer. The first is what `make predict` asks.
EXAMPLES: tuple[tuple[int, str, str], ...] = (
    (12, "Which way does the star move?", "right"),
    (12, "What appears?", "black circle"),
    (12, "What changes color and into what?", "the orange circle turns green"),
    (12, "What happens first?", "the orange circle turns green"),
    (12, "How many shapes are there at the end?", "4"),
    (9, "Which way does the yellow star move?", "up"),
    (9, "What disappears?", "orange triangle"),
    (9, "What happens last?", "the black square appears"),
    (9, "How many shapes are there at the end?", "3"),
    (3, "What color does the black circle become?", "green"),
    (3, "What happens first?", "the orange star appears"),
    (3, "How many shapes are there at the start?", "3"),
)
GIF_SEED, GIF_WIDTH = 12, 320


def example_clip(seed: int) -> Clip:
    """The clip of `EXAMPLES` with this seed."""
    return sample_clip(random.Random(f"example {seed}"))


def write_examples(folder: Path) -> None:
    """Write the clips of `EXAMPLES` below `folder`, their questions, and one of them as a GIF."""
    target = folder / "examples"
    target.mkdir(exist_ok=True)
    for seed in {seed for seed, _, _ in EXAMPLES}:
        write_video(example_clip(seed), target / f"clip-{seed}.mp4", FRAMES)
    entries = [
        {"video": f"clip-{seed}.mp4", "question": question, "answer": answer}
        for seed, question, answer in EXAMPLES
    ]
    (target / "questions.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    write_gif(example_clip(GIF_SEED), target / f"clip-{GIF_SEED}.gif")


def write_gif(clip: Clip, path: Path) -> None:
    """Write the clip as an endless animation, `GIF_WIDTH` pixels wide."""
    size = (GIF_WIDTH, round(clip.height * GIF_WIDTH / clip.width))
    seen = frame_indices(FRAMES, MAX_FRAMES)
    times = [(number - seen[0]) / (seen[-1] - seen[0]) for number in range(FRAMES)]
    first, *rest = [
        draw(clip.scene(time)).resize(size).quantize(32, dither=Image.Dither.NONE) for time in times
    ]
    first.save(
        path, save_all=True, append_images=rest, duration=1000 // RATE, loop=0, optimize=True
    )
