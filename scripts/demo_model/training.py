"""Train the demo checkpoint, `weights/demo`, from nothing on scenes that `demo_world` draws.

    python -m scripts.demo_model.training train      # resumes from build/train-demo
    python -m scripts.demo_model.training evaluate   # the table of weights/demo/README.md
    python -m scripts.demo_model.training curves     # the image of its losses and accuracies
    python -m scripts.demo_model.training examples   # the images and questions in its folder

Nine stages, from direct supervision to the task itself, the first and third from easy scenes to
the whole world:

see      the tower learns what stands in each of its cells (shape and colour, or letter), and which
         cell it is;
gather   the sampler learns to hand that on: each latent names what its own block of cells shows;
         pages full of letters join the scenes;
answer   sampler and decoder learn to answer; the tower stands still, which saves a third of the
         time;
polish   all together, at a falling learning rate;
finish   the same, mostly on two images at once, with questions on either of them;
compare  the same, mostly on two images that are equal or nearly so;
match    the decoder alone, on many pairs of few images; it is also asked what one of them shows
         and the other does not, which teaches to compare better than a bare yes or no;
rematch  the same once more, from a higher rate again;
settle   and for a last time.

Many questions share one encoding of an image: they are branches of one row, which see the
image's prefix and themselves. The heads that the first stages need are dropped at the end.
"""

import argparse
import json
import logging
import random
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import xgenmm
from scripts.demo_model import world
from xgenmm.checkpoints.download import write_manifest
from xgenmm.config import DecoderConfig, ResamplerConfig, TilingConfig, VisionConfig, XGenMMConfig
from xgenmm.engine.reference import generate
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.models.image_features import regroup
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.prompts import DEFAULT_SYSTEM_PROMPT, chat_prompt
from xgenmm.preprocessing.tiling import TiledImage, tile_image
from xgenmm.preprocessing.tokenizer import SpecialToken, Tokenizer

log = logging.getLogger("train_demo")

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "weights" / "demo"
STATE = ROOT / "build" / "train-demo"
EVALUATION_SEED = 20241115  # never trained on: training seeds are (1, step)

PIECES = 640  # of the small SentencePiece model, 256 of them bytes
TILE, SIDE = 96, 12
SPECIALS = (
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>",
    "<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>",
    "<|user|>", "<pad>",
)  # fmt: skip
CONFIG = XGenMMConfig(
    vision=VisionConfig("siglip", 192, 768, 4, 3, TILE, TILE // SIDE),
    resampler=ResamplerConfig(num_latents=36, depth=2, num_heads=6, head_dim=32),
    decoder=DecoderConfig(
        vocab_size=704,
        hidden_size=192,
        intermediate_size=512,
        num_layers=6,
        num_heads=6,
        initial_vocab=PIECES + len(SPECIALS),
    ),
    tiling=TilingConfig(
        grids=tuple((c * TILE, r * TILE) for c, r in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
    ),
    demo=True,
)
# The features that each latent is taught to show, 2 x 2 cells: its number tells where they stand.
BLOCKS = rearrange(
    torch.arange(SIDE * SIDE), "(r y c x) -> (r c) (y x)", r=SIDE // 2, y=2, c=SIDE // 2, x=2
)
FEATURES_PER_LATENT = BLOCKS.shape[1]
COVER = world.NUM_CLASSES  # what covers a cell; 0 is background
CENTER = world.SIGN_CLASS  # a shape or letter that has its centre in a cell; 0 is none
# How often each kind is asked: the more, the later it is learnt.
QUESTIONS = {
    "caption": 1.0,
    "count": 5.0,
    "color": 1.0,
    "shape": 0.5,
    "existence": 2.0,
    "place": 4.0,
    "sign": 2.0,
}
PAGES = 4  # in each batch of the later stages, so that letters are not forgotten
RARITY = (4.0, 20.0)  # how much more a cell counts that has a cover, or a centre


@dataclass(frozen=True)
class Stage:
    """A part of the training: `steps` of `images` each, at a learning rate of `rate`."""

    name: str
    steps: int
    images: int
    rate: float
    final_rate: float
    easy: float  # the share of the stage over which scenes go from easy to the whole world
    asks: bool = False  # questions
    pairs: float = 0.0  # the share of steps that ask about two images
    related: float = 0.5  # the share of these pairs that are equal or nearly so
    families: bool = False  # images come in fours, of which many pairs are made
    wordings: int = 1  # of the question whether they are


STAGES = (
    Stage("see", 700, 24, 1.2e-3, 8e-4, 0.3),
    Stage("gather", 700, 16, 1e-3, 6e-4, 0.0),
    Stage("answer", 700, 16, 1e-3, 1e-3, 0.4, asks=True, pairs=0.5),
    Stage("polish", 1800, 16, 1.4e-3, 2e-4, 0.0, asks=True, pairs=0.5),
    Stage("finish", 1900, 16, 7e-4, 1e-5, 0.0, asks=True, pairs=0.6),
    Stage("compare", 550, 16, 5e-4, 1e-5, 0.0, asks=True, pairs=0.75, related=0.75, wordings=4),
    Stage("match", 700, 16, 8e-4, 1e-5, 0.0, asks=True, families=True, wordings=2),
    Stage("rematch", 300, 16, 7e-4, 1e-5, 0.0, asks=True, families=True, wordings=2),
    Stage("settle", 120, 16, 4e-4, 1e-5, 0.0, asks=True, families=True, wordings=2),
)


# The checkpoint's folder


def write_folder(folder: Path) -> None:
    """Everything of the checkpoint but its weights: configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vision, resampler, decoder = CONFIG.vision, CONFIG.resampler, CONFIG.decoder
    special = {token: PIECES + i for i, token in enumerate(SPECIALS)}
    entries = {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": token.startswith("<|") and token != "<|endoftext|>",
            "single_word": False,
            "special": True,
        }
        for token, number in {"<unk>": 0, "<s>": 1, "</s>": 2, **special}.items()
    }
    files: dict[str, Any] = {
        "config.json": {
            "architectures": ["XGenMMModelForConditionalGeneration"],
            "model_type": "xgenmm",
            "demo": True,
            "torch_dtype": "bfloat16",
            "vision_encoder_config": {
                "model_type": "xgenmm_vision_encoder",
                "image_aspect_ratio": "anyres",
                "anyres_patch_sampling": True,
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_hidden_layers": vision.num_layers,
                "num_attention_heads": vision.num_heads,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
            },
            "vision_tokenizer_config": {
                "model_type": "xgenmm_vision_tokenizer",
                "num_latents": resampler.num_latents,
                "depth": resampler.depth,
                "num_heads": resampler.num_heads,
                "head_dim": resampler.head_dim,
            },
            "text_config": {
                "model_type": "phi3",
                "vocab_size": decoder.vocab_size,
                "hidden_size": decoder.hidden_size,
                "intermediate_size": decoder.intermediate_size,
                "num_hidden_layers": decoder.num_layers,
                "num_attention_heads": decoder.num_heads,
                "max_position_embeddings": decoder.max_positions,
                "sliding_window": decoder.sliding_window,
                "initial_tokenizer_len": decoder.initial_vocab,
                "torch_dtype": "bfloat16",
            },
        },
        "preprocessor_config.json": {
            "image_processor_type": "Blip3ImageProcessor",
            "do_resize": True,
            "resize_mode": "squash",
            "interpolation_mode": "bicubic",
            "size": [TILE, TILE],
            "grids": [list(grid) for grid in CONFIG.tiling.grids],
            "image_mean": list(CONFIG.tiling.mean),
            "image_std": list(CONFIG.tiling.std),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": entries,
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<pad>",
            "model_max_length": decoder.max_positions,
            "padding_side": "left",
        },
        "added_tokens.json": special,
        "special_tokens_map.json": {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<pad>",
        },
        "generation_config.json": {
            "bos_token_id": 1,
            "eos_token_id": special["<|end|>"],
            "pad_token_id": special["<pad>"],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    model = BytesIO()
    lines = [*world.vocabulary(), *[DEFAULT_SYSTEM_PROMPT] * 20]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        required_chars="".join(map(chr, range(33, 127))),
        hard_vocab_limit=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def demo_tokens(folder: Path) -> Tokenizer:
    """The tokenizer of the folder that `write_folder` made."""
    return Tokenizer.from_folder(folder, CONFIG.text.convention, CONFIG.additional_ids)


# Examples


@dataclass(frozen=True)
class LabelledImage:
    """A scene as the model gets it, and what each cell of its tiles shows.

    cover, center: int64 [tiles, SIDE, SIDE], classes as `COVER` and `CENTER` count them.
    """

    tiles: TiledImage
    cover: torch.Tensor
    center: torch.Tensor


def show(scene: world.Scene, rng: random.Random) -> LabelledImage:
    """Draw the scene, three times in ten as a JPEG would show it, and label its cells."""
    image = world.draw(scene)
    if rng.random() < 0.3:
        file = BytesIO()
        image.save(file, "JPEG", quality=rng.randint(70, 95))
        image = Image.open(file).convert("RGB")
    tiles = tile_image(image, CONFIG.tiling, TILE)
    columns, rows = tiles.columns, tiles.rows
    whole = (0.0, 0.0, float(scene.width), float(scene.height))
    scale = min(columns * TILE / scene.width, rows * TILE / scene.height)
    left = (columns * TILE / scale - scene.width) / 2
    top = (rows * TILE / scale - scene.height) / 2
    canvas = (-left, -top, scene.width + left, scene.height + top)
    parts = [
        labels(scene, 1, 1, whole),
        labels(scene, columns, rows, canvas),
    ]
    cover, center = (torch.from_numpy(np.concatenate(maps)) for maps in zip(*parts, strict=True))
    return LabelledImage(tiles, cover, center)


def show_page(rng: random.Random, fonts: Sequence[Path]) -> LabelledImage:
    """A page of signs as one tile, as a large part of a canvas or squeezed like a whole image."""
    scenes = world.sample_page(rng, fonts)
    image = world.draw_page(scenes)
    tile = tile_image(image, TilingConfig("squash", ()), TILE)
    box = (0.0, 0.0, float(image.width), float(image.height))
    maps = [np.stack(labels(scene, 1, 1, box)) for scene in scenes]
    cover, center = (torch.from_numpy(one) for one in np.max(maps, axis=0))
    return LabelledImage(tile, cover, center)


def labels(
    scene: world.Scene, columns: int, rows: int, box: world.Box
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Cover and centre classes of the tiles that divide `box`, each [tiles, SIDE, SIDE]."""
    height, width = rows * SIDE, columns * SIDE
    cover = world.label_map(scene, height, width, box)
    center = np.zeros_like(cover)
    things = [
        (shape.box, 1 + world.KINDS.index(shape.kind) * 7 + world.COLORS.index(shape.color))
        for shape in scene.shapes
    ]
    if scene.sign is not None:
        letters = zip(scene.sign.letters, scene.sign.word, strict=True)
        things += [(b, world.FIRST_LETTER_CLASS + world.LETTERS.index(c)) for b, c in letters]
    for (x0, y0, x1, y1), label in things:
        x = int(((x0 + x1) / 2 - box[0]) / (box[2] - box[0]) * width)
        y = int(((y0 + y1) / 2 - box[1]) / (box[3] - box[1]) * height)
        center[min(y, height - 1), min(x, width - 1)] = label

    def cut(cells: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        tiles = cells.reshape(rows, SIDE, columns, SIDE).transpose(0, 2, 1, 3)
        return tiles.reshape(-1, SIDE, SIDE)

    return cut(cover), cut(center)


def banded(cells: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    """What each feature that the sampler gets may show: int64 [tiles, SIDE**2, 3], 0 for nothing.

    Nothing tells the sampler in which column of tiles a feature stood, only its row of the canvas
    and its place within its own tile. So the label is the set of what the columns show there.
    """
    sets = cells.new_zeros(cells.shape[0], SIDE * SIDE, 3)
    sets[0, :, 0] = cells[0].flatten()
    grid = cells[1:].view(rows, columns, SIDE, SIDE).permute(0, 2, 3, 1)
    grid = grid[:, :, None].expand(-1, -1, columns, -1, -1)
    sets[1:, :, :columns] = grid.reshape(rows * columns, SIDE * SIDE, columns)
    return sets


@dataclass(frozen=True)
class Rows:
    """Packed questions, a row for each image or pair of images; all int64 [rows, length].

    branch: 0 for the prefix that all see, then the number of the question, -1 for padding.
    labels: the next id where an answer is to be learnt, else -100. weight: of that label.
    kinds: the question's kind by row and branch. shown: which of the batch's images the rows
    show, one after the other.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    branch: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor
    kinds: list[list[str]]
    shown: list[int]


def distinct(examples: Sequence[tuple[Sequence[LabelledImage], object]]) -> list[LabelledImage]:
    """The images of the examples in the order in which they first come, each once."""
    return list({id(image): image for shown, _ in examples for image in shown}.values())


def label_sets(image: LabelledImage) -> torch.Tensor:
    """`banded` of cover and centre: int64 [2, tiles, SIDE**2, 3]."""
    columns, rows = image.tiles.columns, image.tiles.rows
    return torch.stack([banded(cells, columns, rows) for cells in (image.cover, image.center)])


def pack(
    tokens: Tokenizer, examples: Sequence[tuple[Sequence[LabelledImage], Sequence[world.QA]]]
) -> Rows:
    """Rows of one prefix (system prompt, images) and many branches (question, answer)."""
    packed: list[dict[str, list[float]]] = []
    for images, asked in examples:
        row: dict[str, list[float]] = defaultdict(list)
        start = 0
        for number, qa in enumerate(asked, 1):
            prompt = chat_prompt(
                tokens, qa.question, images=len(images), system_prompt=DEFAULT_SYSTEM_PROMPT
            )
            end = sum(prompt.spans[-1])
            if not start:
                at = 0
                for (position, length), image in zip(prompt.spans, images, strict=True):
                    row["ids"] += prompt.ids[at:position]
                    count = image.tiles.pixels.shape[0] * CONFIG.resampler.num_latents
                    row["ids"] += [prompt.ids[position]] * count
                    at = position + length
                start = len(row["ids"])
                row["positions"] += range(start)
                row["branch"] += [0] * start
                row["labels"] += [-100] * start
                row["weight"] += [0.0] * start
            question = list(prompt.ids[end:])
            answer = tokens.encode_segments(
                [SpecialToken("<|assistant|>"), qa.answer, SpecialToken("<|end|>")]
            )
            answer = answer[answer.index(tokens.id("<|assistant|>")) + 1 :]
            ids = question + answer
            row["ids"] += ids
            row["positions"] += range(start, start + len(ids))
            row["branch"] += [number] * len(ids)
            row["labels"] += [-100] * (len(question) - 1) + answer + [-100]
            # A long answer counts more than a short one, but not in proportion.
            row["weight"] += [len(answer) ** -0.5] * len(ids)
        packed.append(row)
    length = max(len(row["ids"]) for row in packed)

    def table(name: str, fill: float) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in packed])

    number_of = {id(image): i for i, image in enumerate(distinct(examples))}
    return Rows(
        ids=table("ids", tokens.id("<pad>")).long(),
        positions=table("positions", 0).long(),
        branch=table("branch", -1).long(),
        labels=table("labels", -100).long(),
        weight=table("weight", 0.0),
        kinds=[[qa.kind for qa in asked] for _, asked in examples],
        shown=[number_of[id(image)] for shown, _ in examples for image in shown],
    )


Shown = Sequence[tuple[world.Scene, LabelledImage]]


class Batches(Dataset[tuple[list[LabelledImage], Rows | None]]):
    """The batch of each step, drawn afresh from (seed, step), so that training can resume."""

    def __init__(self, stage: Stage, fonts: Sequence[Path], tokens: Tokenizer, seed: int) -> None:
        self.stage, self.fonts, self.tokens, self.seed = stage, fonts, tokens, seed

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> tuple[list[LabelledImage], Rows | None]:
        stage = self.stage
        rng = random.Random(f"{self.seed} {stage.name} {step}")
        hard = step / (stage.easy * stage.steps) if stage.easy else 1.0
        pairs = rng.random() < stage.pairs
        examples: list[tuple[list[LabelledImage], list[world.QA]]] = []
        if stage.families:
            examples = self._families(rng)
            return distinct(examples), pack(self.tokens, examples)
        for _ in range(stage.images // 2 if pairs else stage.images):
            # Even the last scenes are sometimes easy, and the first ones never all of one kind.
            level = min(1.0, hard) if rng.random() < 0.85 else rng.random()
            if pairs:
                first, second, asked = world.sample_pair(
                    rng,
                    self.fonts,
                    level,
                    8,
                    related=stage.related,
                    wordings=stage.wordings,
                )
                asked += ask_each(rng, first, second, 4)
                examples.append(([show(first, rng), show(second, rng)], asked))
            elif stage.name == "gather" and rng.random() < 0.5:
                examples += [([show_page(rng, self.fonts)], []) for _ in range(3)]
            else:
                # Words are the slowest to learn, so signs are more frequent than in the world.
                sign = True if stage.name != "see" and rng.random() < 0.4 else None
                scene = world.sample_scene(rng, self.fonts, level=level, with_sign=sign)
                questions = world.sample_questions(scene, rng, 12, QUESTIONS) if stage.asks else []
                examples.append(([show(scene, rng)], questions))
        images = distinct(examples)
        if not stage.asks:
            return images, None
        pages = [show_page(rng, self.fonts) for _ in range(PAGES)]
        return images + pages, pack(self.tokens, examples)

    def _families(self, rng: random.Random) -> list[tuple[list[LabelledImage], list[world.QA]]]:
        """Families of four images that show two scenes, which differ in one thing.

        Of each family three pairs that are equal, three that are not, and two images alone.
        """
        wordings = self.stage.wordings
        families = []
        for _ in range(self.stage.images // 4):
            scenes = world.sample_family(rng, self.fonts, 1.0 if rng.random() < 0.85 else 0.5)
            families.append([[(scene, show(scene, rng)) for scene in sizes] for sizes in scenes])
        examples: list[tuple[list[LabelledImage], list[world.QA]]] = []

        def add(one: Shown, other: Shown) -> None:
            (first, shown), (second, beside) = rng.choice(one), rng.choice(other)
            if one is other:
                asked = world.ask_same(rng, "yes", wordings)
            else:
                asked = world.ask_pair(rng, first, second, 5, wordings)
            asked += world.ask_difference(first, second)
            examples.append(([shown, beside], asked + ask_each(rng, first, second, 1)))

        for family in families:
            for a, b in ((0, 0), (1, 1), (0, 0), (0, 1), (1, 0), (0, 1)):
                add(family[a], family[b])
            for sizes in family:
                scene, image = rng.choice(sizes)
                examples.append(([image], world.sample_questions(scene, rng, 12, QUESTIONS)))
        return examples


def ask_each(rng: random.Random, first: world.Scene, second: world.Scene, n: int) -> list[world.QA]:
    """`n` questions on either of two images: to compare, one must know which showed what."""
    return [
        replace(qa, question=f"In the {name} image: {qa.question}", kind="each")
        for name, scene in (("first", first), ("second", second))
        for qa in world.sample_questions(scene, rng, n, QUESTIONS)
    ]


# Losses


class Heads(nn.Module):
    """Read a cell's classes off the tower's features and off the vision tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.feature = nn.Linear(CONFIG.vision.hidden_size, COVER + CENTER)
        self.place = nn.Linear(CONFIG.vision.hidden_size, 2 * SIDE)
        self.token = nn.Linear(CONFIG.decoder.hidden_size, FEATURES_PER_LATENT * (COVER + CENTER))


def tower_loss(heads: Heads, features: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of cover, centre, and the cell's own row and column.

    The last is known from the position embedding; it must still be in the features, because the
    sampler has no other way to tell where one stood.

    features: [tiles, cells, width]. cells: int64 [2, tiles, cells].
    """
    logits = heads.feature(features).float().split([COVER, CENTER], dim=-1)
    loss = logits[0].new_zeros(())
    for one, labels, times in zip(logits, cells, RARITY, strict=True):
        errors = F.cross_entropy(one.flatten(0, 1), labels.flatten(), reduction="none")
        weight = 1.0 + times * (labels.flatten() > 0)
        loss = loss + (errors * weight).sum() / weight.sum()
    cell = torch.arange(SIDE * SIDE).expand(features.shape[0], -1)
    row, column = heads.place(features).float().transpose(1, 2).split(SIDE, dim=1)
    return loss + F.cross_entropy(row, cell // SIDE) + F.cross_entropy(column, cell % SIDE)


def sampler_loss(heads: Heads, vision: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the label sets; vision [tiles, latents, width].

    sets: [2, tiles, cells, 3], from `banded`.
    """
    sets = sets[:, :, BLOCKS.flatten()]
    logits = heads.token(vision).float().unflatten(-1, (FEATURES_PER_LATENT, -1)).flatten(1, 2)
    loss = logits.new_zeros(())
    for one, labels, times in zip(logits.split([COVER, CENTER], dim=-1), sets, RARITY, strict=True):
        weight = 1.0 + times * (labels > 0).any(-1)
        target = torch.zeros_like(one).scatter_(-1, labels, 1.0)
        errors = F.binary_cross_entropy_with_logits(one[..., 1:], target[..., 1:], reduction="none")
        loss = loss + (errors.sum(-1) * weight).sum() / weight.sum()
    return loss


def answer_loss(
    model: XGenMM, vision: Sequence[torch.Tensor], rows: Rows
) -> tuple[torch.Tensor, dict[str, list[bool]]]:
    """Weighted cross-entropy of the answers, and by kind which of them are right throughout.

    A right answer here is one whose every token is the likeliest after the right ones before it,
    which is when greedy decoding gives it exactly.
    """
    embeds = model.decoder.embed(rows.ids)
    shown = rows.ids == CONFIG.additional_ids["<image>"]
    images = torch.cat([vision[i] for i in rows.shown])
    embeds = embeds.masked_scatter(shown[..., None], images.to(embeds.dtype))
    branch = rows.branch
    length = branch.shape[1]
    related = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    hidden = model.decoder.forward_uncached(embeds, rows.positions, (related & causal)[:, None])
    asked = rows.labels >= 0
    labels = rows.labels[asked]
    # An additional token's logits follow the vocabulary's without a gap, as its id does.
    logits = model.decoder.lm_head(hidden[asked]).float()
    weight = rows.weight[asked]
    loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
    wrong = logits.argmax(-1) != labels
    row, _ = asked.nonzero(as_tuple=True)
    missed = {(int(r), int(b)) for r, b in zip(row[wrong], branch[asked][wrong], strict=True)}
    right: dict[str, list[bool]] = defaultdict(list)
    for r, kinds in enumerate(rows.kinds):
        for b, kind in enumerate(kinds, 1):
            right[kind].append((r, b) not in missed)
    return loss, right


def losses(
    model: XGenMM, heads: Heads, stage: str, images: list[LabelledImage], rows: Rows | None
) -> tuple[dict[str, torch.Tensor], dict[str, list[bool]]]:
    """The losses of a stage by name, and the answers that are right by kind."""
    parts: dict[str, torch.Tensor] = {}
    right: dict[str, list[bool]] = {}
    if stage == "see":
        # Tiles of the canvas that show something; empty ones teach nothing new.
        chosen = []
        for image in images:
            full = 1 + image.cover[1:].flatten(1).any(1).nonzero().flatten()
            chosen.append([0, *full[:2].tolist()])
        pixels = np.concatenate([p.tiles.pixels[c] for p, c in zip(images, chosen, strict=True)])
        cells = torch.stack(
            [
                torch.cat([getattr(p, k)[c] for p, c in zip(images, chosen, strict=True)])
                for k in ("cover", "center")
            ]
        ).flatten(2)
        parts["tower"] = tower_loss(
            heads, model.features([TiledImage(pixels, 0, 0, (1, 1))])[0], cells
        )
        return parts, right
    tiles = [image.tiles for image in images]
    frozen = "tower" not in LOSS_WEIGHTS[stage]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        # Ungrouped first: the tower's labels belong to its own tiles.
        whole = TiledImage(np.concatenate([t.pixels for t in tiles]), 0, 0, (1, 1))
        flat = model.features([whole])[0]
        features = regrouped(flat, tiles)
    if not frozen:
        cells = torch.stack(
            [torch.cat([getattr(p, k) for p in images]) for k in ("cover", "center")]
        ).flatten(2)
        parts["tower"] = tower_loss(heads, flat, cells)
    frozen = "sampler" not in LOSS_WEIGHTS[stage]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        vision = model.vision_tokens(tiles, features)
    if not frozen:
        sets = torch.cat([label_sets(image) for image in images], dim=1)
        width = CONFIG.decoder.hidden_size
        every = torch.cat(vision).view(-1, CONFIG.resampler.num_latents, width)
        parts["sampler"] = sampler_loss(heads, every, sets)
    if rows is not None:
        parts["answer"], right = answer_loss(model, vision, rows)
    return parts, right


def regrouped(flat: torch.Tensor, tiles: Sequence[TiledImage]) -> list[torch.Tensor]:
    """Features of all tiles -> of each image, in the sampler's order."""
    parts = flat.split([t.pixels.shape[0] for t in tiles])
    return [regroup(f, t.columns, t.rows) for f, t in zip(parts, tiles, strict=True)]


_TOGETHER = {"tower": 0.2, "sampler": 0.3, "answer": 1.0}
_DECODER = {"answer": 1.0}
LOSS_WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "see": {"tower": 1.0},
    "gather": {"tower": 0.5, "sampler": 1.0},
    "answer": {"sampler": 0.2, "answer": 1.0},
    "polish": _TOGETHER,
    "finish": _TOGETHER,
    "compare": _TOGETHER,
    "match": _DECODER,
    "rematch": _DECODER,
    "settle": _DECODER,
}


# Training


def initialize(model: XGenMM) -> None:
    """Small embeddings; PyTorch's own initial values suit the rest."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or name.endswith("latents"):
            nn.init.normal_(parameter, std=0.1)


def train(folder: Path, state: Path, stages: Sequence[Stage]) -> None:
    """Run the stages from where the last state left them, then write the weights to `folder`."""
    torch.manual_seed(0)
    state.mkdir(parents=True, exist_ok=True)
    write_folder(folder)
    tokens = demo_tokens(folder)
    fonts, held_out = world.split_fonts(
        world.find_fonts([Path("/usr/share/fonts"), Path(sysconfig.get_path("purelib"))])
    )
    log.info("%d fonts to train on, %d held out", len(fonts), len(held_out))
    model, heads = XGenMM(CONFIG).train(), Heads()
    initialize(model)
    history: list[dict[str, Any]] = []
    begun, done, seconds = 0, 0, 0.0
    last = state / "last.pt"
    if last.exists():
        saved = torch.load(last, weights_only=True)
        model.load_state_dict(saved["model"])
        heads.load_state_dict(saved["heads"])
        begun, done, seconds = saved["stage"], saved["step"], saved["seconds"]
        history = json.loads((state / "history.json").read_text())
        log.info("resuming stage %s at step %d", stages[begun].name, done)
    else:
        saved = None
    for number in range(begun, len(stages)):
        stage = stages[number]
        parameters = [*model.parameters(), *heads.parameters()]
        optimisers = make_optimisers(model, heads, stage.rate)
        if saved is not None and saved["step"]:
            for optimiser, content in zip(optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(content)
        saved = None
        batches = Batches(stage, fonts, tokens, seed=1)
        seen = 0.0
        clock = time.monotonic()
        right: dict[str, list[bool]] = defaultdict(list)
        sums: dict[str, list[float]] = defaultdict(list)
        for step, (images, rows) in enumerate(loader(batches, range(done, stage.steps)), done):
            warm = min(1.0, (step + 1) / 100)
            progress = step / stage.steps
            rate = warm * (stage.rate + (stage.final_rate - stage.rate) * progress)
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16):
                parts, answers = losses(model, heads, stage.name, images, rows)
            loss = sum(LOSS_WEIGHTS[stage.name][name] * part for name, part in parts.items())
            assert isinstance(loss, torch.Tensor)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            seen += len(images)
            for name, part in parts.items():
                sums[name].append(part.item())
            for kind, values in answers.items():
                right[kind] += values
            if (step + 1) % 20 == 0 or step + 1 == stage.steps:
                elapsed = time.monotonic() - clock
                seconds += elapsed
                entry: dict[str, Any] = {"stage": stage.name, "step": step + 1}
                entry |= {
                    "seconds": round(seconds, 1),
                    "images_a_second": round(seen / elapsed, 1),
                }
                entry["loss"] = {name: round(sum(v) / len(v), 4) for name, v in sums.items()}
                entry["right"] = {k: round(sum(v) / len(v), 3) for k, v in sorted(right.items())}
                history.append(entry)
                log.info("%s", json.dumps(entry))
                seen, clock = 0.0, time.monotonic()
                sums.clear()
                right.clear()
            if (step + 1) % 100 == 0 or step + 1 == stage.steps:
                whole = step + 1 == stage.steps
                save(
                    state,
                    history,
                    {
                        "model": model.state_dict(),
                        "heads": heads.state_dict(),
                        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                        "stage": number + whole,
                        "step": 0 if whole else step + 1,
                        "seconds": seconds,
                    },
                )
        done = 0
    write_weights(model, folder)


def make_optimisers(model: XGenMM, heads: Heads, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which learns them in fewer steps; AdamW for the rest.

    Muon scaled to AdamW's step size (arXiv 2502.16982, section 2.2), so that one rate serves both.
    """
    matrices: list[nn.Parameter] = []
    others = list(heads.parameters())
    for name, parameter in model.named_parameters():
        hidden = ".layers." in name and parameter.ndim == 2
        (matrices if hidden else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def loader(batches: Batches, steps: range) -> Iterator[tuple[list[LabelledImage], Rows | None]]:
    """The batches of `steps`, drawn by a process of its own."""
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=steps,
            num_workers=1,
            prefetch_factor=4,
        )
    )


def save(state: Path, history: list[dict[str, Any]], content: dict[str, Any]) -> None:
    """Replace the last state and the history, each in one step."""
    (state / "history.tmp").write_text(json.dumps(history))
    (state / "history.tmp").replace(state / "history.json")
    torch.save(content, state / "last.tmp")
    (state / "last.tmp").replace(state / "last.pt")


def write_weights(model: XGenMM, folder: Path) -> None:
    """The model's parameters in bfloat16, without the heads."""
    parameters = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    save_file(parameters, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    write_manifest(folder, name="demo")
    log.info("wrote %s", folder / "model.safetensors")


# What came of it

GOALS: Mapping[str, float] = {
    "color": 0.97,
    "shape": 0.97,
    "existence": 0.97,
    "count": 0.95,
    "place": 0.92,
    "pair": 0.90,
    "sign": 0.80,
}


def answers(engine: xgenmm.Engine, cases: Sequence[world.Case]) -> Iterator[str]:
    """The greedy answers to questions about the same images, which are encoded once."""
    images = cases[0].images
    tiles = [tile_image(image, engine.config.tiling, TILE) for image in images]
    vision = engine.model.encode(tiles)
    for case in cases:
        prompt = engine.prompt(xgenmm.Request(case.question, images))
        embeds = engine.model.merge_multimodal_embeddings(prompt, vision)
        made = generate(engine.model, embeds, SamplingParams(), 64, engine.end_ids)
        yield engine.tokenizer.decode(list(takewhile(lambda t: t not in engine.end_ids, made)))


def evaluate(folder: Path, scenes: int) -> None:
    """Print exact match by kind, lower-cased, on scenes and fonts never trained on."""
    engine = xgenmm.load(folder)
    cases = world.evaluation_set(EVALUATION_SEED, world.held_out_fonts(), scenes)
    right: dict[str, list[bool]] = defaultdict(list)
    groups = [list(group) for _, group in groupby(cases, key=lambda case: case.scenes)]
    for number, group in enumerate(groups, 1):
        for case, answer in zip(group, answers(engine, group), strict=True):
            right[case.kind].append(answer.lower() == case.answer.lower())
        if number % 100 == 0:
            log.info("%d of %d images and pairs", number, len(groups))
    print("| question | asked | right | goal |\n|---|---|---|---|")
    for kind in world.QUESTION_KINDS:
        share = sum(right[kind]) / len(right[kind])
        goal = f"{GOALS[kind]:.0%}" if kind in GOALS else ""
        print(f"| {kind} | {len(right[kind])} | {share:.1%} | {goal} |")


def curves(folder: Path, state: Path) -> None:
    """Draw losses and accuracies over the training time as `training.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    history = json.loads((state / "history.json").read_text())
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True)
    for axes, what in ((upper, "loss"), (lower, "right")):
        lines: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for entry in history:
            for name, value in entry[what].items():
                lines[name][0].append(entry["seconds"] / 60)
                lines[name][1].append(value)
        for name, (minutes, values) in lines.items():
            axes.plot(minutes, values, label=name, linewidth=1.2)
        axes.legend(loc="best", fontsize=8, ncols=2)
        axes.grid(alpha=0.3)
    starts = {entry["stage"]: entry["seconds"] / 60 for entry in reversed(history)}
    for stage, minutes in starts.items():
        for axes in (upper, lower):
            axes.axvline(minutes, color="grey", linestyle=":", linewidth=0.8)
        upper.text(
            minutes, 1.02, stage, transform=upper.get_xaxis_transform(), fontsize=8, rotation=45
        )
    upper.set_ylabel("loss on new scenes")
    upper.set_yscale("log")
    lower.set_ylabel("answers right throughout")
    lower.set_ylim(0, 1)
    lower.set_xlabel("minutes of training")
    figure.tight_layout()
    figure.savefig(folder / "training.png", dpi=110)


# The images that a newcomer meets first: seeds of scenes, a question, the right answer.
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


def examples(folder: Path) -> None:
    """Write the images of `EXAMPLES`, and their questions as `questions.json`."""
    target = folder / "examples"
    target.mkdir(exist_ok=True)
    fonts = world.held_out_fonts()
    for seed in {seed for seeds, _, _ in EXAMPLES for seed in seeds}:
        scene = world.sample_scene(random.Random(seed), fonts, level=0.8, with_sign=seed % 2 == 0)
        world.draw(scene).save(target / f"scene-{seed}.png", optimize=True)
    listed = [
        {"images": [f"scene-{seed}.png" for seed in seeds], "question": asked, "answer": answer}
        for seeds, asked, answer in EXAMPLES
    ]
    (target / "questions.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo_model.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("train", "evaluate", "curves", "examples"))
    parser.add_argument("--folder", type=Path, default=DEMO, help="of the checkpoint")
    parser.add_argument("--state", type=Path, default=STATE, help="where training keeps its state")
    parser.add_argument("--scenes", type=int, default=500, help="to evaluate on")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.what == "train":
        train(options.folder, options.state, STAGES)
    elif options.what == "evaluate":
        evaluate(options.folder, options.scenes)
    elif options.what == "curves":
        curves(options.folder, options.state)
    else:
        examples(options.folder)


if __name__ == "__main__":
    main()
