"""The example images and questions that are shipped with the checkpoint."""

import json
import random
from pathlib import Path

from scripts.demo_model.drawing import draw
from scripts.demo_model.fonts import held_out_fonts
from scripts.demo_model.sampling import sample_scene

# Seeds of scenes, a question, and the right answer.
EXAMPLES: tuple[tuple[tuple[int, ...], str, str], ...] = (
    ((8,), "What is to the left of the orange star?", "yellow circle"),
    ((8,), "What color is the star?", "orange"),
    ((8,), "How many circles are there?", "2"),
    ((8,), "Is there a blue square?", "no"),
    ((5,), "How many red shapes are there?", "1"),
    ((5,), "What shape is purple?", "triangle"),
    ((12,), "What is to the right of the green square?", "green star"),
    ((8,), "What does the sign say?", "STAY"),
    ((5, 19), "Which image has more circles?", "first"),
    ((5, 19), "Is the second image the same as the first?", "no"),
)


def write_examples(folder: Path) -> None:
    """Write the images of `EXAMPLES` below `folder`, and their questions as `questions.json`."""
    target = folder / "examples"
    target.mkdir(exist_ok=True)
    fonts = held_out_fonts()
    for seed in {seed for seeds, _, _ in EXAMPLES for seed in seeds}:
        scene = sample_scene(random.Random(seed), fonts, level=0.8, with_sign=seed % 2 == 0)
        draw(scene).save(target / f"scene-{seed}.png", optimize=True)
    entries = [
        {"images": [f"scene-{seed}.png" for seed in seeds], "question": question, "answer": answer}
        for seeds, question, answer in EXAMPLES
    ]
    (target / "questions.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
