"""The model against `transformers`, batches against single rows, and the released layout."""

import json
from collections.abc import Sequence

import pytest
import torch

from tests.support import golden_data
from xgenmm.config import INTERLEAVE, RELEASES, DecoderConfig
from xgenmm.engine.reference import generate
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.evaluation.parity import golden_model
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.phi3 import Phi3Decoder, visible_keys
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
    """Final hidden states of one row that is prefilled in chunks of these lengths."""
    length = embeds.shape[0]
    cache = KVCache.allocate(
        decoder.config, 1, length, device=torch.device("cpu"), dtype=torch.float32
    )
    hidden, start = [], 0
    for chunk in chunks:
        positions = torch.arange(start, start + chunk)[None]
        chunk_embeds = embeds[None, start : start + chunk]
        hidden.append(decoder(chunk_embeds, positions, cache, start + chunk)[0])
        start += chunk
    assert start == length
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
    config = RELEASES[INTERLEAVE].decoder
    visible = visible_keys(torch.tensor([[0, 2047, 2048, 4095]]), 4096, config.window_keys)
    assert visible.sum(-1).flatten().tolist() == [1, 2048, 2048, 2048]
    assert visible[0, 0, 2].nonzero()[0].item() == 1  # position 2048 does not attend to position 0


def test_pass_without_a_cache_equals_one_with_it() -> None:
    decoder = random_decoder()
    embeds = torch.randn(30, TINY.hidden_size)
    positions = torch.arange(30)[None]
    mask = visible_keys(positions, 30, TINY.window_keys)
    found = decoder.forward_uncached(embeds[None], positions, mask)[0]
    torch.testing.assert_close(found, run(decoder, embeds, [30]), rtol=0, atol=1e-5)


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

    cache = golden.cache(4, 72)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = golden.prefill(prompts, cache).argmax(-1)
    found = [tokens]
    for step in range(11):
        tokens = golden.decode(tokens, lengths + step, cache).argmax(-1)
        found.append(tokens)
    assert torch.stack(found, dim=1).tolist() == expected


@pytest.mark.parametrize("room", [0, 1, 3, 100])
def test_padding_of_a_chunk_does_not_change_its_logits(golden: XGenMM, room: int) -> None:
    torch.manual_seed(3)
    embeds = torch.randn(13, golden.config.decoder.hidden_size)
    expected = golden.prefill([embeds], golden.cache(1, 16))
    cache = golden.cache(2, len(embeds) + room)
    golden.prefill_chunk([embeds[:9]], [0], [1], cache)
    logits = golden.prefill_chunk([embeds[9:]], [9], [1], cache)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_reused_cache_row_does_not_affect_the_next_sequence(golden: XGenMM) -> None:
    torch.manual_seed(7)
    prompt = torch.randn(9, 64)
    cache = golden.cache(1, 50)
    expected = golden.prefill([prompt], cache)
    golden.prefill([torch.randn(50, 64)], cache)
    torch.testing.assert_close(golden.prefill([prompt], cache), expected, rtol=0, atol=0)


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
    if "v1.5" in release:
        assert parts["vision_encoder"] == 428_225_600
        assert parts["vision_tokenizer"] == 109_901_568
        assert sum(parts.values()) == 4_359_257_219
    else:
        assert parts["vision_encoder"] == 632_682_240
        assert parts["vision_tokenizer"] == 135_549_952
