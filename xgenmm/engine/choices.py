"""Multiple choice: the likelihood of each given answer after a prompt."""

from collections.abc import Sequence

import torch

from xgenmm.config import TextConfig
from xgenmm.models.transfer import to_device
from xgenmm.preprocessing.prompts import ASSISTANT, END_OF_CHUNK
from xgenmm.preprocessing.tokenizer import SpecialToken, Tokenizer


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
) -> list[torch.Tensor]:
    """Log-probability of the first token of each choice, float32 [] each.

    logits: float32 [vocab], the logits after the prompt.
    """
    first = to_device(torch.tensor([choice[0] for choice in choices]), logits.device)
    return list(logits.log_softmax(-1)[first])


def add_choice_scores(
    scores: list[torch.Tensor],
    choices: Sequence[Sequence[int]],
    start: int,
    stop: int,
    logits: torch.Tensor,
) -> None:
    """Add the log-probabilities of the further tokens of the choices `start` to `stop`.

    logits: float32 [tokens, vocab], after each token but the last of each of these choices.
    """
    end = 0
    for index in range(start, stop):
        following = choices[index][1:]
        rows = logits[end : end + len(following)].log_softmax(-1)
        end += len(following)
        if following:
            ids = to_device(torch.tensor(following), rows.device)
            scores[index] = scores[index] + rows.gather(1, ids[:, None]).sum()
