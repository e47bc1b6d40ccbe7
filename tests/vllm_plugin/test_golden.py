"""vLLM generates the golden models' ids, and each deviation from the original changes them."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig
from vllm import LLM, SamplingParams
from vllm.model_executor.models.phi3 import Phi3ForCausalLM

from tests.support import golden_data
from tests.vllm_plugin import golden_checkpoint
from tests.vllm_plugin.engines import vllm_engine
from xgenmm.config import DecoderConfig
from xgenmm.models.phi3_huggingface import phi3_config
from xgenmm.preprocessing.images import read_image
from xgenmm.vllm_plugin import configuration, model

pytestmark = pytest.mark.timeout(900)

FULL = Path(os.environ.get("XGENMM_GOLDEN", "../shared/reference/golden"))
"""All golden data, if this folder exists; tests/golden has a subset."""

ANYRES = FULL / "v15_anyres" if FULL.is_dir() else golden_data.folder("v15_anyres")
BASE = [FULL / "v15_base"] if FULL.is_dir() else []  # the subset has no weights of it


def engine(golden: Path, folder: Path, **options: Any) -> Any:
    """vLLM's engine with a golden model, which is written to `folder` first."""
    checkpoint = golden_checkpoint.write(golden, folder)
    text = {"head_dim": golden_checkpoint.head_dim(golden)}
    return vllm_engine(
        checkpoint, skip_tokenizer_init=True, hf_overrides={"text_config": text}, **options
    )


def read_cases(golden: Path) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((golden / "cases.json").read_text())["cases"]
    return cases


def generate(llm: LLM, golden: Path, cases: Iterable[dict[str, Any]]) -> dict[str, list[int]]:
    """The greedy ids of each case by its name, generated in one batch."""
    cases = list(cases)
    prompts = [
        {
            "prompt_token_ids": case["input_ids"],
            "multi_modal_data": {"image": [read_image(golden / file) for file in case["images"]]},
        }
        for case in cases
    ]
    for prompt in prompts:
        if not prompt["multi_modal_data"]["image"]:
            del prompt["multi_modal_data"]
    params = [
        SamplingParams(
            temperature=0, max_tokens=len(case["greedy_ids"]), ignore_eos=True, detokenize=False
        )
        for case in cases
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return {
        case["name"]: list(output.outputs[0].token_ids)
        for case, output in zip(cases, outputs, strict=True)
    }


def expected(golden: Path) -> dict[str, list[int]]:
    return {case["name"]: case["greedy_ids"] for case in read_cases(golden)}


@pytest.mark.parametrize("golden", [ANYRES, *BASE], ids=lambda golden: golden.name)
def test_ids_equal_the_original_in_a_batch_and_alone(golden: Path, tmp_path: Path) -> None:
    with engine(golden, tmp_path) as llm:
        assert generate(llm, golden, read_cases(golden)) == expected(golden)
        alone: dict[str, list[int]] = {}
        for case in read_cases(golden):
            alone |= generate(llm, golden, [case])
        assert alone == expected(golden)


def test_ids_equal_the_original_on_two_devices(tmp_path: Path) -> None:
    with engine(ANYRES, tmp_path, tensor_parallel_size=2) as llm:
        assert generate(llm, ANYRES, read_cases(ANYRES)) == expected(ANYRES)


def ignore_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        model,
        "padding_mask",
        lambda columns, rows, image_size, side: torch.ones(
            1 + columns * rows, side * side, dtype=torch.bool
        ),
    )


def skip_regrouping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "regroup", lambda features, columns, rows: features)


def drop_bias(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.Phi3WithBias, "compute_logits", Phi3ForCausalLM.compute_logits)


def drop_additional_rows(patch: pytest.MonkeyPatch) -> None:
    """Use rows of the vocabulary in place of those of the additional tokens."""

    def only_vocabulary(
        weights: Iterable[tuple[str, torch.Tensor]], initial_vocab: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, rows in weights:
            if "additional" not in name:
                vocabulary = "lm_head" in name or "embed_tokens" in name
                yield name, rows[: initial_vocab + 3] if vocabulary else rows

    patch.setattr(model, "append_additional_rows", only_vocabulary)


def shorten_window(patch: pytest.MonkeyPatch) -> None:
    def shorter(config: DecoderConfig, vocab_size: int) -> PretrainedConfig:
        return phi3_config(replace(config, sliding_window=config.sliding_window - 1), vocab_size)

    patch.setattr(configuration, "phi3_config", shorter)


@pytest.mark.parametrize(
    ("deviate", "case"),
    [
        (ignore_mask, "panorama"),
        (skip_regrouping, "landscape"),
        (drop_bias, "text_only"),
        (drop_additional_rows, "text_only"),
        (shorten_window, "long_text"),
    ],
)
def test_each_deviation_from_the_original_changes_the_ids(
    deviate: Callable[[pytest.MonkeyPatch], None],
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    deviate(monkeypatch)
    with engine(ANYRES, tmp_path) as llm:
        ids = generate(llm, ANYRES, read_cases(ANYRES))
    assert ids[case] != expected(ANYRES)[case], ids
