"""Few-shot prompts from a task of lmms-eval, with images.

lmms-eval's own `--num_fewshot` makes text only. Examples are drawn for each question from its
number and a seed, so they depend neither on the order of the questions nor on the number of
processes. No example is the question itself or shows one of its images.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from xgenmm.errors import InputError, listed
from xgenmm.evaluation.lmms_eval_requests import JsonMessage, message_images, user_message

SPARE = 16
"""Examples to draw beyond those needed, to replace some that show the question's image."""


@dataclass(frozen=True)
class FewShot:
    """How to make examples.

    count: of each prompt. seed: of the draw.
    split: where they come from; by default the task's split for examples or training, or `train`.
    target: column of the answer; by default the task's target. The most frequent text of a list.
    """

    count: int = 0
    seed: int = 1234
    split: str | None = None
    target: str | None = None

    def messages(
        self, task: Any, split: str, doc_id: int, question: Sequence[JsonMessage]
    ) -> list[JsonMessage]:
        """Draw the examples of a question: a message from the user and an answer each.

        task: of lmms-eval. split, doc_id: of the question. question: its own messages.

        Raises:
            InputError: the task has no split for examples, or too few, or no text as an answer.
        """
        if not self.count:
            return []
        source = self._split(task)
        docs = task.dataset[source]
        shown = [image for message in question for image in message_images(message)]
        rng = random.Random(f"{self.seed} {task.config.task} {split} {doc_id}")
        examples: list[JsonMessage] = []
        for index in rng.sample(range(len(docs)), min(len(docs), self.count + SPARE)):
            if source == split and index == doc_id:
                continue
            asked = _question(task, docs[index])
            if _share_an_image(shown, [i for message in asked for i in message_images(message)]):
                continue
            answer = f"{task.config.target_delimiter}{self._answer(task, docs[index])}"
            examples += [*asked, {"role": "assistant", "content": answer}]
            if len(examples) == 2 * self.count:
                return examples
        raise InputError(
            "fewshot",
            f"{self.count} examples wanted, but the split {source} of {task.config.task} has only "
            f"{len(docs)}, questions on the same image included",
        )

    def _split(self, task: Any) -> str:
        config = task.config
        for name in (self.split, config.fewshot_split, config.training_split):
            if name is not None and name in task.dataset:
                return str(name)
        if self.split is None and "train" in task.dataset:
            return "train"
        wanted = "no split for examples" if self.split is None else f"no split {self.split}"
        raise InputError(
            "fewshot_split",
            f"{config.task} has {wanted}; name one of {listed(list(task.dataset))}",
        )

    def _answer(self, task: Any, doc: Any) -> str:
        if self.target is not None:
            target = doc[self.target]
        else:
            target = task.doc_to_target(doc)
            if target == task.config.doc_to_target and target not in task.features:
                raise InputError(
                    "fewshot_target",
                    f"{task.config.task} takes its answer from a column {target}, which its data "
                    f"does not have; name one of {listed(task.features)}",
                )
        if isinstance(target, int) and task.config.doc_to_choice is not None:
            target = task.doc_to_choice(doc)[target]
        if isinstance(target, list):
            target = Counter(target).most_common(1)[0][0]
        return str(target)


def _question(task: Any, doc: Any) -> list[JsonMessage]:
    """The messages of an example without its answer."""
    if hasattr(task, "doc_to_messages"):  # a task of chat models
        return list(task.doc_to_messages(doc))
    return [user_message(task.doc_to_visual(doc), task.doc_to_text(doc))]


def _share_an_image(shown: Sequence[Image.Image], others: Sequence[Image.Image]) -> bool:
    return any(
        image.size == other.size and image.tobytes() == other.tobytes()
        for image in shown
        for other in others
    )
