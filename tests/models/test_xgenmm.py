"""The model against `transformers`, batches against single rows, and the released layout."""

import json
import math
from collections.abc import Sequence

import pytest
import torch

from tests.support import golden_data
from xgenmm.checkpoints.registry import releases
from xgenmm.config import BLOCK_SIZE, INTERLEAVE, RELEASES, VIDEO_128, DecoderConfig
from xgenmm.engine.reference import generate
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.evaluation.golden import golden_model
from xgenmm.models.attention import (
    GrowingCache,
    PagedAttention,
    UncachedAttention,
    prompt_segment,
    sliding_window_mask,
)
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.phi3 import Phi3Decoder
from xgenmm.models.phi3_huggingface import to_transformers
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.tiling import tile_image

TINY = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    max_positions=4096,
    sliding_window=40,
    initial_vocab=90,
)


def random_decoder(config: DecoderConfig = TINY) -> Phi3Decoder:
    torch.manual_seed(5)
    decoder = Phi3Decoder(config).eval().requires_grad_(False)
    decoder.lm_head.bias.zero_()
    return decoder


def run(decoder: Phi3Decoder, embeds: torch.Tensor, chunks: Sequence[int]) -> torch.Tensor:
    """Final hidden states of one sequence that is prefilled in chunks of these lengths."""
    config, start, hidden = decoder.config, 0, []
    num_blocks = -(-len(embeds) // BLOCK_SIZE)
    cache = KVCache.allocate(
        config, num_blocks + 1, device=torch.device("cpu"), dtype=torch.float32
    )
    table = 1 + torch.randperm(num_blocks)
    for chunk in chunks:
        segment = prompt_segment(start, chunk, table, config.window_keys, torch.float32)
        new = embeds[start : start + chunk]
        hidden.append(decoder(new, segment.positions, PagedAttention(cache, [segment])))
        start += chunk
    assert start == len(embeds)
    return torch.cat(hidden)


@pytest.mark.parametrize("length", [1, 7, 41, 42, 130])
def test_decoder_equals_transformers_within_and_beyond_the_window(length: int) -> None:
    decoder = random_decoder()
    ids = torch.randint(0, TINY.initial_vocab, (length,))
    with torch.no_grad():
        expected = to_transformers(decoder, torch.float32)(input_ids=ids[None]).logits[
            0, :, : TINY.initial_vocab
        ]
    found = decoder.lm_head(run(decoder, decoder.embed(ids), [length]))
    torch.testing.assert_close(found[:, : TINY.initial_vocab], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * 90, [50, 40], [3, 60, 1, 1, 25]])
def test_chunked_prefill_and_decode_steps_equal_a_single_pass(chunks: list[int]) -> None:
    decoder = random_decoder()
    embeds = torch.randn(90, TINY.hidden_size)
    whole = run(decoder, embeds, [90])
    torch.testing.assert_close(run(decoder, embeds, chunks), whole, rtol=0, atol=1e-5)


def test_window_of_the_released_models_covers_2048_keys() -> None:
    window = RELEASES[INTERLEAVE].decoder.window_keys
    positions = torch.tensor([0, 2047, 2048, 4095])
    visible = sliding_window_mask(positions, torch.arange(4096), window)
    assert visible.sum(-1).tolist() == [1, 2048, 2048, 2048]
    assert visible[2].nonzero()[0].item() == 1  # position 2048 does not attend to position 0


@pytest.mark.parametrize("passes", [[90], [50, 40], [60, 1, 29]])
def test_growing_cache_and_none_equal_the_paged_cache(passes: list[int]) -> None:
    decoder = random_decoder()
    embeds, positions = torch.randn(90, TINY.hidden_size), torch.arange(90)
    expected = run(decoder, embeds, [90])
    mask = sliding_window_mask(positions, positions, TINY.window_keys)
    found = decoder(embeds[None], positions[None], UncachedAttention(mask))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    cache = GrowingCache(TINY.window_keys)
    parts = [
        decoder(part[None], where[None], cache)[0]
        for part, where in zip(embeds.split(passes), positions.split(passes), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def golden() -> XGenMM:
    folder = golden_data.folder("v15_anyres")
    return golden_model(folder, json.loads((folder / "cases.json").read_text()))


def test_batched_generation_equals_generation_of_single_rows(golden: XGenMM) -> None:
    torch.manual_seed(6)
    prompts = [torch.randn(length, 64) for length in (3, 60, 17, 1)]
    expected = []
    for prompt in prompts:
        params = SamplingParams(max_new_tokens=12)
        expected.append(list(generate(golden, prompt, params, 12, ())))

    cache = golden.cache(4 * 3 + 1)
    tables = 1 + torch.randperm(12).view(4, 3)
    positions = torch.tensor([len(prompt) for prompt in prompts])
    window = golden.config.decoder.window_keys
    segments = [
        prompt_segment(0, len(prompt), table, window, torch.float32)
        for prompt, table in zip(prompts, tables, strict=True)
    ]
    hidden = golden.forward(torch.cat(prompts), segments, cache)
    tokens = golden.logits(hidden[positions.cumsum(0) - 1]).argmax(-1)
    found = [tokens]
    for step in range(11):
        tokens = golden.decode(tokens, positions + step, tables, cache).argmax(-1)
        found.append(tokens)
    assert torch.stack(found, dim=1).tolist() == expected


def test_batched_image_encoding_equals_encoding_of_single_images(golden: XGenMM) -> None:
    folder = golden_data.folder("v15_anyres") / "images"
    tiles = [
        tile_image(read_image(folder / name), golden.config.tiling, 42)
        for name in ("panorama_0.png", "tall_0.png", "one_pixel_0.png")
    ]
    batched = golden.encode(tiles)
    for image, expected in zip(tiles, batched, strict=True):
        torch.testing.assert_close(golden.encode([image])[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("manifest", "release"),
    [
        ("xgen-mm-phi3-mini-r-v1.5", INTERLEAVE),
        ("xgen-mm-phi3-mini-r-v1.5", "xgen-mm-phi3-mini-base-r-v1.5"),
        ("blip3-phi3-mini-instruct-r-v1", "xgen-mm-phi3-mini-instruct-r-v1"),
        (VIDEO_128, VIDEO_128),
    ],
)
def test_parameter_names_and_shapes_equal_the_released_ones(manifest: str, release: str) -> None:
    path = golden_data.folder("manifests") / f"{manifest}.json"
    expected = {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}
    with torch.device("meta"):
        model = XGenMM(RELEASES[release])
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == expected
    parts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.vlm.named_children()
    }
    assert parts["lang_model"] == 3_821_130_051
    if release == VIDEO_128:
        assert len(expected) == 768
        assert sum(math.prod(shape) for shape in expected.values()) == 4_418_604_771
        assert sum(parts.values()) == 4_418_604_771 - 576  # inv_freq is a buffer
        assert releases()[release].parameters == sum(parts.values())
    elif "v1.5" in release:
        assert parts["vision_encoder"] == 428_225_600
        assert parts["vision_tokenizer"] == 109_901_568
        assert sum(parts.values()) == 4_359_257_219
    else:
        assert parts["vision_encoder"] == 632_682_240
        assert parts["vision_tokenizer"] == 135_549_952
