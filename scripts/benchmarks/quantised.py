"""The part `quantised`: how many right answers quantised weights cost the demo."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn

import xgenmm
from scripts.benchmarks.report import Options, Row
from scripts.demo_model.evaluation_set import Case, evaluation_groups
from xgenmm import Engine, Request
from xgenmm.engine.reference import next_logits, prompt_embeddings
from xgenmm.models.attention import GrowingCache
from xgenmm.models.quantization import QUANTIZATIONS, drift

MAX_NUM_SEQS = 16
INT4 = "int4"  # simulated: the engine does not have it, see docs/benchmarks.md
INT4_GROUP = 32  # neighbouring weights that share a scale


def quantised(options: Options) -> list[Row]:
    """Measure right answers, and the drift of the first token's logits from float32."""
    groups = evaluation_groups(options.scenes)
    rows: list[Row] = []
    exact = torch.empty(0)
    for kind in (None, *QUANTIZATIONS, INT4):
        engine = xgenmm.load(
            "demo",
            device="cpu",
            max_num_seqs=MAX_NUM_SEQS,
            quantize=None if kind == INT4 else kind,
        )
        if kind == INT4:
            _round_to_int4(engine)
        with ThreadPoolExecutor(engine.max_num_seqs) as pool:
            right = [ok for results in pool.map(partial(_right, engine), groups) for ok in results]
        logits = torch.cat([_first_logits(engine, group[0]) for group in groups])
        engine.close()
        name = kind or "float32"
        share = 100 * sum(right) / len(right)
        rows.append(Row("quantised", f"{name}: right ({len(right)} questions)", share, "%"))
        if kind is None:
            exact = logits
            continue
        moved = drift(exact, logits)
        rows += [
            Row("quantised", f"{name}: drift of the logits", 100 * moved.relative, "%"),
            Row("quantised", f"{name}: same first token", 100 * moved.agreement, "%"),
        ]
    return rows


def _round_to_int4(engine: Engine) -> None:
    """Round the weights of the decoder's layers to 4 bits, stored as floats."""
    for module in engine.model.decoder.model.layers.modules():
        if isinstance(module, nn.Linear):
            groups = module.weight.data.unflatten(1, (-1, INT4_GROUP))
            scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
            module.weight.data = ((groups / scale).round() * scale).flatten(1)


def _right(engine: Engine, group: Sequence[Case]) -> list[bool]:
    images = group[0].images
    answers = [engine.stream(Request(case.question, images)) for case in group]
    return [
        answer.text().lower() == case.answer.lower()
        for answer, case in zip(answers, group, strict=True)
    ]


def _first_logits(engine: Engine, case: Case) -> torch.Tensor:
    """Logits [1, vocab] of the first token of an answer."""
    embeds = prompt_embeddings(engine, Request(case.question, case.images))
    return next_logits(
        engine.model, embeds[None], 0, GrowingCache(engine.config.decoder.window_keys)
    )
