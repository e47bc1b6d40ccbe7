"""The engines that the part `peers` compares, behind one function each."""

import json
import logging
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import Phi3ForCausalLM

import xgenmm
from scripts.benchmarks.transformers_baseline import generate_ids
from scripts.local_server import ROOT
from xgenmm import Engine, Request, SamplingParams
from xgenmm.engine.reference import prompt_embeddings
from xgenmm.models.phi3_huggingface import to_transformers

MAX_TOKENS = 24
CACHE_GB = 2  # for keys and values

logger = logging.getLogger(__name__)

Question = tuple[Path, str]
"""Image file and text."""


@dataclass(frozen=True)
class Run:
    """What became of questions that were asked at once.

    seconds: until all are answered. first_tokens: seconds from the start to each first token.
    answers: texts in the order of the questions.
    """

    seconds: float
    first_tokens: list[float]
    answers: list[str]


Ask = Callable[[Sequence[Question]], Run]


@contextmanager
def engines(folder: Path, vllm: Path, max_num_seqs: int) -> Iterator[Mapping[str, Ask]]:
    """This package's engine for a checkpoint, then the others by name, in float32 on the CPU.

    vllm: the interpreter of vLLM's environment; if it does not exist, vLLM is left out.
    """
    with ExitStack() as stack:
        engine = xgenmm.load(
            folder,
            device="cpu",
            dtype="float32",
            max_num_seqs=max_num_seqs,
            cache_bytes=CACHE_GB << 30,
        )
        stack.callback(engine.close)
        asks: dict[str, Ask] = {"xgenmm": partial(_ask_engine, engine)}
        if vllm.exists():
            asks["vLLM"] = stack.enter_context(_vllm(vllm, folder, engine, max_num_seqs))
        else:
            logger.warning("peers: vLLM is left out, because there is no %s; see --vllm", vllm)
        asks["transformers"] = partial(_ask_transformers, engine, _transformers(engine))
        yield asks


def _requests(questions: Sequence[Question]) -> list[Request]:
    sampling = SamplingParams(max_new_tokens=MAX_TOKENS)
    return [
        Request(text, [xgenmm.read_image(file.read_bytes())], sampling=sampling)
        for file, text in questions
    ]


def _ask_engine(engine: Engine, questions: Sequence[Question]) -> Run:
    requests = _requests(questions)
    started = time.monotonic()
    asked, answers = [], []
    for request in requests:
        asked.append(time.monotonic() - started)
        answers.append(engine.stream(request))
    texts = [answer.text() for answer in answers]
    seconds = time.monotonic() - started
    first = [a + answer.usage.time_to_first_token for a, answer in zip(asked, answers, strict=True)]
    return Run(seconds, first, texts)


def _transformers(engine: Engine) -> Phi3ForCausalLM:
    """The Phi-3 of `transformers`, with the embedding and output rows of the additional tokens."""
    decoder = engine.model.decoder
    model = to_transformers(decoder, torch.float32)
    model.model.embed_tokens, model.lm_head = decoder.model.embed_tokens, decoder.lm_head
    return model


def _ask_transformers(engine: Engine, model: Phi3ForCausalLM, questions: Sequence[Question]) -> Run:
    """Answer one question after the other; vision tower and resampler are this package's."""
    requests = _requests(questions)
    end_ids = sorted(engine.end_ids)
    started = time.perf_counter()
    first, answers = [], []
    for request in requests:
        embeds = prompt_embeddings(engine, request)[None]
        ids, times = generate_ids(
            model, embeds, MAX_TOKENS, eos_token_id=end_ids, pad_token_id=end_ids[0]
        )
        first.append(times[0] - started)
        answers.append(_text(engine, ids))
    return Run(time.perf_counter() - started, first, answers)


@contextmanager
def _vllm(interpreter: Path, folder: Path, engine: Engine, max_num_seqs: int) -> Iterator[Ask]:
    """A process with vLLM; see `peers_vllm.py`."""
    settings = [str(n) for n in (MAX_TOKENS, max_num_seqs, CACHE_GB, *sorted(engine.end_ids))]
    program = ("-m", "scripts.benchmarks.peers_vllm")
    command = [str(interpreter), *program, str(folder), *settings]
    with (
        tempfile.NamedTemporaryFile() as log,
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        questions_pipe, answers_pipe = process.stdin, process.stdout
        assert questions_pipe is not None
        assert answers_pipe is not None

        def receive() -> dict[str, Any]:
            if line := answers_pipe.readline():
                answer: dict[str, Any] = json.loads(line)
                return answer
            raise RuntimeError(f"vLLM stopped: {Path(log.name).read_text(errors='replace')}")

        def ask(questions: Sequence[Question]) -> Run:
            batch = [(str(file), text) for file, text in questions]
            print(json.dumps(batch), file=questions_pipe, flush=True)
            answer = receive()
            texts = [_text(engine, ids) for ids in answer["ids"]]
            return Run(answer["seconds"], answer["first_tokens"], texts)

        receive()
        yield ask
        questions_pipe.close()


def _text(engine: Engine, ids: Iterable[int]) -> str:
    """The text of generated ids, as the engine makes it."""
    ids = list(takewhile(lambda token_id: token_id not in engine.end_ids, ids))
    special = engine.tokenizer.specials.values()
    return engine.tokenizer.decode([token_id for token_id in ids if token_id not in special])
