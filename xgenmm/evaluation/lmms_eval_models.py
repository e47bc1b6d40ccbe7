"""xGen-MM as a model of lmms-eval 0.7: its requests go through the engine, many at a time.

    lmms-eval --model xgenmm --model_args pretrained=NAME --tasks mmmu_val --output_path results

`ChatModel` answers all tasks that generate. Multiple choice by likelihood needs `--force_simple`,
for `SimpleModel`. The base models take `fewshot=4` and more settings of `FewShot`.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Any, TypeVar

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

import xgenmm
from xgenmm.errors import InputError
from xgenmm.evaluation.few_shot import FewShot
from xgenmm.evaluation.lmms_eval_requests import (
    JsonMessage,
    chat_request,
    sampling_params,
    user_message,
)

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024
"""Of the authors' evaluation, for tasks that do not set it."""

MAX_NUM_SEQS = 32
MAX_NUM_BATCHED_TOKENS = 4096

REQUESTS_PER_SEQ = 2
"""Requests in progress per sequence of the engine: images of some are read while others run. No
other images are in memory."""

Item = TypeVar("Item")
Output = TypeVar("Output")


class EngineModel(lmms):
    """What both kinds of models share: the engine, and the order of requests.

    Args:
        pretrained: a released name, `demo`, or a checkpoint folder.
        device: by default a GPU, each process of `torchrun` its own.
        dtype, quantize, adapter, max_num_seqs: see `xgenmm.load`.
        system_prompt: of chat models; by default the one they were trained with.
        fewshot, fewshot_seed, fewshot_split, fewshot_target: see `FewShot`.
        num_frames: to take from a video.
        batch_size, max_batch_size: of lmms-eval; ignored, because the engine forms batches.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        adapter: str | None = None,
        max_num_seqs: int = MAX_NUM_SEQS,
        system_prompt: str | None = None,
        fewshot: int = 0,
        fewshot_seed: int = 1234,
        fewshot_split: str | None = None,
        fewshot_target: str | None = None,
        num_frames: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.engine = xgenmm.load(
            pretrained,
            device,
            dtype,
            max_num_seqs=max_num_seqs,
            quantize=quantize,
            adapter=adapter,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        )
        self._system_prompt = system_prompt
        self._few_shot = FewShot(fewshot, fewshot_seed, fewshot_split, fewshot_target)
        self._num_frames = num_frames

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers the results of several processes."""
        return self.engine.model.device

    def clean(self) -> None:
        """Free the model's memory; lmms-eval calls this before it computes metrics."""
        self.engine.close()
        del self.engine
        super().clean()

    def _question(self, arguments: tuple[Any, ...]) -> tuple[list[JsonMessage], Any]:
        """The messages of a request to generate, and its `generation_kwargs`."""
        raise NotImplementedError

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests, in their order.

        Invalid input, such as a prompt beyond the context, is logged and answered by an empty text.
        """

        def answer(numbered: tuple[int, Instance]) -> GenerationResult:
            number, instance = numbered
            messages, settings = self._question(instance.args)
            text = self.engine.config.text
            sampling = sampling_params(settings or {}, text, MAX_NEW_TOKENS, seed=number)
            try:
                answer = self.engine.stream(self._request(messages, sampling))
                output = answer.text()
            except InputError as error:
                logger.warning("%s %s: no answer: %s", *_document(instance), error)
                return GenerationResult(text="")
            usage = answer.usage
            counts = TokenCounts(usage.prompt_tokens, usage.output_tokens)
            return GenerationResult(text=output, token_counts=counts)

        return self._map(answer, list(enumerate(requests)))

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Score continuations: negative log-probability, and whether it is the greedy answer.

        The sign is that of a loss, because lmms-eval's multiple choice takes the smallest. The end
        token is part of a continuation, white space around it is not. Continuations of one prompt
        are scored together. The two numbers are the `text` of a result, because lmms-eval 0.7.3
        makes a text of a pair.

        Raises InputError if a request is invalid.
        """
        groups = [list(group) for _, group in groupby(requests, _prompt_key)]

        def score(group: list[Instance]) -> list[GenerationResult]:
            text, _, doc_to_visual, doc_id, task, split = group[0].args
            doc = self.task_dict[task][split][doc_id]
            question = [user_message(doc_to_visual(doc), text)]
            messages = [*self._examples(doc_to_visual, split, doc_id, question), *question]
            choices = [_continuation(instance, doc) for instance in group]
            answer = self.engine.stream(self._request(messages, choices=choices))
            answer.text()
            scores = [answer.choice_scores[choice] for choice in choices]
            return [
                GenerationResult(text=(-score.log_probability, score.is_greedy)) for score in scores
            ]

        return [result for results in self._map(score, groups) for result in results]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported: a task that asks in rounds.

        Raises NotImplementedError.
        """
        raise NotImplementedError("xgenmm answers tasks of one round; use another model")

    def _request(
        self,
        messages: Sequence[JsonMessage],
        sampling: xgenmm.SamplingParams | None = None,
        choices: Sequence[str] = (),
    ) -> xgenmm.Request:
        request = chat_request(
            messages,
            self.engine.config.text,
            sampling or xgenmm.SamplingParams(),
            system_prompt=self._system_prompt,
            num_frames=self._num_frames,
        )
        return replace(request, choices=tuple(dict.fromkeys(choices)))

    def _examples(
        self, method: Any, split: str, doc_id: int, question: Sequence[JsonMessage]
    ) -> list[JsonMessage]:
        """The few-shot examples of a question; `method` is a bound method of its task."""
        return self._few_shot.messages(method.__self__, split, doc_id, question)

    def _map(self, function: Callable[[Item], Output], items: Sequence[Item]) -> list[Output]:
        """Apply `function` to all items in threads, so that the engine's batch stays full."""
        pool = ThreadPoolExecutor(REQUESTS_PER_SEQ * self.engine.max_num_seqs)
        try:
            outputs = pool.map(function, items)
            return list(tqdm(outputs, "xgenmm", len(items), disable=self.rank != 0))
        finally:
            pool.shutdown(cancel_futures=True)


class ChatModel(EngineModel):
    """Takes requests as messages, in which images may stand anywhere."""

    is_simple = False

    def _question(self, arguments: tuple[Any, ...]) -> tuple[list[JsonMessage], Any]:
        _, doc_to_messages, settings, doc_id, task, split = arguments
        question = list(doc_to_messages(self.task_dict[task][split][doc_id]))
        return [*self._examples(doc_to_messages, split, doc_id, question), *question], settings


class SimpleModel(EngineModel):
    """Takes requests as a text and what goes before it."""

    is_simple = True

    def _question(self, arguments: tuple[Any, ...]) -> tuple[list[JsonMessage], Any]:
        text, settings, doc_to_visual, doc_id, task, split = arguments
        question = [user_message(doc_to_visual(self.task_dict[task][split][doc_id]), text)]
        return [*self._examples(doc_to_visual, split, doc_id, question), *question], settings


def _document(instance: Instance) -> tuple[str, int]:
    return instance.task_name, instance.doc_id


def _prompt_key(instance: Instance) -> tuple[Any, ...]:
    """What requests that differ only in the continuation have in common."""
    text, _, _, *place = instance.args
    return text, *place


def _continuation(instance: Instance, doc: Any) -> str:
    continuation = instance.args[1]
    return str(continuation(doc) if callable(continuation) else continuation).strip()
