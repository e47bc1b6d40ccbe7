"""vLLM with an adapter answers like the package's engine with it; a wrong one is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams

import xgenmm
from tests.support import adapters, tiny
from tests.support.paths import DEMO
from tests.support.server import data_url
from tests.vllm_plugin.engines import vllm_engine

pytestmark = pytest.mark.timeout(900)

EXAMPLES = DEMO / "examples"
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the demo as a tar; its random weights leave the answers legible."""
    folder = tmp_path_factory.mktemp("adapter")
    content = adapters.tensors(DEMO, 0.1)
    return adapters.pack(folder / "adapter.tar", adapters.write(folder / "adapter", DEMO, content))


def answers(adapter: Path | None) -> list[str]:
    """The answers of the package's engine to the demo's examples."""
    engine = xgenmm.load(DEMO, device="cpu", dtype="float32", adapter=adapter)
    sampling = xgenmm.SamplingParams(max_new_tokens=NEW_TOKENS)
    requests = [
        xgenmm.Request(
            example["question"],
            [xgenmm.read_image(EXAMPLES / name) for name in example["images"]],
            sampling=sampling,
        )
        for example in examples()
    ]
    return [engine.stream(request).text() for request in requests]


def examples() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((EXAMPLES / "questions.json").read_text())
    return found


@pytest.mark.parametrize("devices", [1, 2])
def test_answers_equal_those_of_the_engine(adapter: Path, devices: int) -> None:
    messages = []
    for example in examples():
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(EXAMPLES / name)}}
            for name in example["images"]
        ]
        parts.append({"type": "text", "text": example["question"]})
        messages.append([{"role": "user", "content": parts}])
    options = {"hf_overrides": {"adapter": str(adapter)}, "tensor_parallel_size": devices}
    with vllm_engine(DEMO, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
        outputs = llm.chat(messages, params, use_tqdm=False)
    expected = answers(adapter)
    assert [output.outputs[0].text for output in outputs] == expected
    assert expected != answers(None)


def test_adapter_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    other = adapters.write(tmp_path / "adapter", tiny.checkpoint(tmp_path / "tiny"))
    with pytest.raises(ValueError, match=re.escape(f"adapter: {other} is for tiny, not for")):
        LLM(str(DEMO), hf_overrides={"adapter": str(other)})
