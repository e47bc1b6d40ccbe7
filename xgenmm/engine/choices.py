"""Multiple choice: the likelihood of each given answer after a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xgenmm.config import TextConfig
from xgenmm.engine.request import ChoiceScore
from xgenmm.models.transfer import to_device
from xgenmm.preprocessing.prompts import ASSISTANT, END_OF_CHUNK
from xgenmm.preprocessing.tokenizer import SpecialToken, Tokenizer


@dataclass
class PartialScore:
    """The score of the first tokens of a choice, see `ChoiceScore`.

    log_probability: float32 []. is_greedy: bool [].
    """

    log_probability: torch.Tensor
    is_greedy: torch.Tensor


def choice_token_ids(tokenizer: Tokenizer, text: TextConfig, choice: str) -> list[int]:
    """The token ids with which the model would write a choice, its end token included."""
    if text.prompt == "few_shot":
        before = after = END_OF_CHUNK
    else:
        before, after = ASSISTANT, SpecialToken(text.stop_tokens[0])
    ids = tokenizer.encode_segments([before, choice, after])
    return ids[ids.index(tokenizer.id(before)) + 1 :]


def first_choice_scores(
    choices: Sequence[Sequence[int]], logits: torch.Tensor
) -> list[PartialScore]:
    """Score the first token of each choice.

    logits: float32 [vocab], the logits after the prompt.
    """
    first = to_device(torch.tensor([choice[0] for choice in choices]), logits.device)
    log_probabilities = logits.log_softmax(-1)[first]
    return list(map(PartialScore, log_probabilities, first == logits.argmax()))


def add_choice_scores(
    scores: Sequence[PartialScore],
    choices: Sequence[Sequence[int]],
    start: int,
    stop: int,
    logits: torch.Tensor,
) -> None:
    """Add the further tokens of the choices `start` to `stop` to their scores.

    logits: float32 [tokens, vocab], after each token but the last of each of these choices.
    """
    end = 0
    for index in range(start, stop):
        following = choices[index][1:]
        rows = logits[end : end + len(following)]
        end += len(following)
        if following:
            ids, score = to_device(torch.tensor(following), rows.device), scores[index]
            score.log_probability = (
                score.log_probability + rows.log_softmax(-1).gather(1, ids[:, None]).sum()
            )
            score.is_greedy = score.is_greedy & (rows.argmax(-1) == ids).all()


def finished_scores(scores: Sequence[PartialScore]) -> list[ChoiceScore]:
    """Copy the scores of whole choices to the host."""
    log_probabilities = torch.stack([score.log_probability for score in scores]).tolist()
    is_greedy = torch.stack([score.is_greedy for score in scores]).tolist()
    return list(map(ChoiceScore, log_probabilities, is_greedy))
