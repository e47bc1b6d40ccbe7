"""Pack many questions on an image into one row, so that they share its encoding.

A row is a prefix (system prompt and images) followed by branches (a question and its answer). A
branch attends to the prefix and to itself.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from scripts.demo_model.wordings import QA
from xgenmm.preprocessing.prompts import DEFAULT_SYSTEM_PROMPT, Prompt, chat_prompt
from xgenmm.preprocessing.tokenizer import SpecialToken, Tokenizer

IGNORED = -100  # label of positions without a loss


@dataclass(frozen=True)
class Rows:
    """Packed questions, a row for each image or pair of images; tensors are [rows, length].

    ids, positions: int64.
    branch: int64; 0 for the prefix, then the number of the question, -1 for padding.
    labels: int64; the next id where an answer is learnt, else `IGNORED`.
    weight: float32, of that label.
    kinds: the question's kind by row and branch.
    shown: which of the batch's images the rows show, one after the other.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    branch: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor
    kinds: list[list[str]]
    shown: list[int]


class Shown(Protocol):
    """An image or a clip, as far as packing is concerned."""

    @property
    def num_tokens(self) -> int:
        """How many vision tokens it has."""


ShownT = TypeVar("ShownT", bound=Shown)
Example = tuple[Sequence[Shown], Sequence[QA]]


def distinct(examples: Sequence[tuple[Sequence[ShownT], object]]) -> list[ShownT]:
    """The images of the examples, each once, in order of first appearance."""
    return list({id(image): image for images, _ in examples for image in images}.values())


def pack(tokenizer: Tokenizer, examples: Sequence[Example]) -> Rows:
    """Pack each example, one or two images with their questions, into a row."""
    packed = [_pack_row(tokenizer, images, asked) for images, asked in examples]
    length = max(len(row["ids"]) for row in packed)

    def table(name: str, fill: float) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in packed])

    number_of = {id(image): i for i, image in enumerate(distinct(examples))}
    return Rows(
        ids=table("ids", tokenizer.id("<pad>")).long(),
        positions=table("positions", 0).long(),
        branch=table("branch", -1).long(),
        labels=table("labels", IGNORED).long(),
        weight=table("weight", 0.0),
        kinds=[[qa.kind for qa in asked] for _, asked in examples],
        shown=[number_of[id(image)] for images, _ in examples for image in images],
    )


def _pack_row(
    tokenizer: Tokenizer, images: Sequence[Shown], asked: Sequence[QA]
) -> dict[str, list[float]]:
    """The columns of one row, by the name of the field of `Rows`."""
    row: dict[str, list[float]] = defaultdict(list)
    start = 0
    for number, qa in enumerate(asked, 1):
        prompt = chat_prompt(
            tokenizer, qa.question, images=len(images), system_prompt=DEFAULT_SYSTEM_PROMPT
        )
        if not start:
            row["ids"] = _prefix_ids(prompt, images)
            start = len(row["ids"])
            row["positions"] += range(start)
            row["branch"] += [0] * start
            row["labels"] += [IGNORED] * start
            row["weight"] += [0.0] * start
        question = list(prompt.ids[sum(prompt.spans[-1]) :])
        answer = tokenizer.encode_segments(
            [SpecialToken("<|assistant|>"), qa.answer, SpecialToken("<|end|>")]
        )
        answer = answer[answer.index(tokenizer.id("<|assistant|>")) + 1 :]
        ids = question + answer
        row["ids"] += ids
        row["positions"] += range(start, start + len(ids))
        row["branch"] += [number] * len(ids)
        row["labels"] += [IGNORED] * (len(question) - 1) + answer + [IGNORED]
        # A long answer counts more than a short one, but less than proportionally.
        row["weight"] += [len(answer) ** -0.5] * len(ids)
    return row


def _prefix_ids(prompt: Prompt, images: Sequence[Shown]) -> list[float]:
    """The prompt's ids up to its last image, each image's id repeated for all its tokens."""
    ids: list[float] = []
    end = 0
    for (position, length), image in zip(prompt.spans, images, strict=True):
        ids += prompt.ids[end:position]
        ids += [prompt.ids[position]] * image.num_tokens
        end = position + length
    return ids
