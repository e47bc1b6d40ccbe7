"""Sampling and beams against `transformers`, stop sequences against a plain search."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xgenmm.engine.sampler import (
    BeamSearch,
    SamplingMetadata,
    StopStringChecker,
    apply_repetition_penalty,
    sample_tokens,
    uniform_noise,
)
from xgenmm.engine.sampling_params import LIMITS, SamplingParams
from xgenmm.errors import InputError

VOCAB = 24


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def chosen(logits: Tensor, params: list[SamplingParams], uniform: list[float]) -> list[int]:
    settings = SamplingMetadata.of(params, logits.device)
    return sample_tokens(logits, settings, torch.tensor(uniform)).tolist()


# settings


def test_defaults() -> None:
    assert SamplingParams() == SamplingParams(768, 0.0, 1.0, 0, 1, 1.0, (), None)


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str) -> None:
    low, high = LIMITS[name]
    allowed: list[Any] = [0.1 if name == "top_p" else low, high]
    for value in allowed:
        assert getattr(SamplingParams(**{name: value}), name) == value
    wrong: list[Any] = [low - 1, high + 1, math.nan, "1", True]
    for value in wrong:
        with pytest.raises(InputError, match=f"^{name}: must be a .*number from"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 1.5}, "max_new_tokens: must be a whole number from 1 to 2048, not 1.5"),
        ({"top_p": 0}, "top_p: must be above 0"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams: 2 beams .* set temperature to 0"),
        ({"stop_sequences": "end"}, "stop_sequences: must be a list of texts, not 'end'"),
        ({"stop_sequences": ("a", "")}, "stop_sequences: each must be a non-empty text"),
        ({"stop_sequences": (3,)}, "stop_sequences: each must be a non-empty text, not 3"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences: 17 texts given; at most 16"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        SamplingParams(**settings)


def test_stop_sequences_become_a_tuple() -> None:
    from_a_list: Any = ["a", "b"]
    assert SamplingParams(stop_sequences=from_a_list).stop_sequences == ("a", "b")


# next tokens


def test_greedy_is_the_first_of_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0], [5.0, 2.0, 2.0, -1.0]])
    assert chosen(logits, [SamplingParams()] * 2, [0.9, 0.9]) == [1, 0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_the_distribution_is_that_of_transformers(
    temperature: float, top_k: int, top_p: float
) -> None:
    steps = 4096
    logits = random_logits(round(temperature * 10) + top_k)
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(dim=-1)[0]

    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    even = [step / steps for step in range(steps)]
    tokens = chosen(logits.expand(steps, -1), [params] * steps, even)
    shares = torch.bincount(torch.tensor(tokens), minlength=VOCAB) / steps
    assert (shares - expected).abs().max() <= 1.5 / steps
    assert (expected[tokens] > 0).all()
    assert expected[tokens[0]] == expected[expected > 0].min(), "0 is the least likely kept"


def test_top_k_keeps_ties_as_transformers_does() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    kept = TopKLogitsWarper(2)(None, logits)[0].isfinite().nonzero()[:, 0].tolist()
    params = [SamplingParams(temperature=1.0, top_k=2)] * 64
    tokens = chosen(logits.expand(64, -1), params, [step / 64 for step in range(64)])
    assert sorted(set(tokens)) == kept == [1, 2, 3]


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = random_logits(1)
    logits[0, ::2] = -math.inf
    logits[0, 5] = -200.0  # its probability is 0 in float32
    params = [SamplingParams(temperature=1.0)] * 3
    tokens = chosen(logits.expand(3, -1), params, [0.0, 0.5, 1 - 2**-24])
    assert all(token % 2 == 1 and token != 5 for token in tokens)


def test_extreme_settings_draw_the_most_likely() -> None:
    logits = random_logits(2)
    for params in (
        SamplingParams(temperature=1e-39),
        SamplingParams(temperature=2.0, top_p=1e-30),
        SamplingParams(temperature=2.0, top_k=1),
    ):
        assert chosen(logits, [params], [0.0]) == [int(logits.argmax())]


def test_rows_do_not_know_their_neighbours() -> None:
    rows = [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=1.5, top_k=3, seed=2),
        SamplingParams(temperature=1.0, top_p=0.5, seed=3, repetition_penalty=2.0),
        SamplingParams(repetition_penalty=1.3),
    ]
    logits = random_logits(4, rows=len(rows))
    seen = random_logits(5, rows=len(rows)) > 2
    uniform = torch.stack([uniform_noise(row)[0] for row in rows])

    def tokens(picked: list[int]) -> list[int]:
        settings = SamplingMetadata.of([rows[i] for i in picked], "cpu")
        penalised = apply_repetition_penalty(logits[picked], seen[picked], settings.penalty)
        return sample_tokens(penalised, settings, uniform[picked]).tolist()

    together = tokens([0, 1, 2, 3, 4])
    assert together == [tokens([i])[0] for i in range(len(rows))]
    assert together == tokens([4, 3, 2, 1, 0])[::-1]


def test_half_precision_logits() -> None:
    logits = random_logits(6).bfloat16()
    params = [SamplingParams(temperature=1.0)]
    assert chosen(logits, params, [0.4]) == chosen(logits.float(), params, [0.4])


def test_draws() -> None:
    short = uniform_noise(SamplingParams(max_new_tokens=5, seed=7))
    for length in (15, 16, 17, 100, 2048):
        longer = uniform_noise(SamplingParams(max_new_tokens=length, seed=7))
        assert longer.shape == (length,)
        assert torch.equal(longer[:5], short)
    assert (longer >= 0).all()
    assert (longer < 1).all()
    assert not torch.equal(short, uniform_noise(SamplingParams(max_new_tokens=5, seed=8)))
    unseeded = SamplingParams(max_new_tokens=5)
    assert not torch.equal(uniform_noise(unseeded), uniform_noise(unseeded))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(8, rows=3)
    history = torch.tensor([[1, 2, 2, 7], [0, 0, 0, 0], [23, 22, 21, 20]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, history, True)
    assert torch.equal(apply_repetition_penalty(logits, seen, torch.full((3,), penalty)), expected)


# beams


def beam_case(seed: int) -> tuple[Any, Tensor, dict[str, Any]]:
    """A random decoder, its prompt [1, 4, 16] and settings under which many answers end early."""
    phi3: tuple[Any, Any] = (Phi3Config, Phi3ForCausalLM)  # neither is typed as it is used
    make_config, make_model = phi3
    config = make_config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        pad_token_id=0,
        eos_token_id=3,
        attn_implementation="eager",
    )
    model = make_model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.copy_(0.35 * torch.randn(parameter.shape, generator=generator))
    return (
        model,
        torch.randn(1, 4, 16, generator=generator),
        {
            "num_beams": 2 + seed % 4,
            "max_new_tokens": 3 + seed % 11,
            "eos_token_id": [3] if seed % 3 else [3, 5],
            "repetition_penalty": 1.0 if seed % 5 else 1.5,
        },
    )


@torch.no_grad()
def beam_answer(seed: int) -> list[int]:
    model, embeddings, settings = beam_case(seed)
    search = BeamSearch(settings["num_beams"], settings["eos_token_id"], settings["max_new_tokens"])
    penalty = torch.tensor([settings["repetition_penalty"]])
    seen = torch.zeros(1, VOCAB, dtype=torch.bool)
    while not search.finished:
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        parents, tokens = search.advance(
            apply_repetition_penalty(logits.log_softmax(dim=-1), seen, penalty)
        )
        column = torch.tensor(tokens)[:, None]
        embeddings = torch.cat((embeddings[parents], model.model.embed_tokens(column)), dim=1)
        seen = seen[parents].scatter_(1, column, True)
    return search.best()


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")  # that is the point
@pytest.mark.parametrize("seed", range(100, 160))
def test_beams_equal_transformers(seed: int) -> None:
    model, embeddings, settings = beam_case(seed)
    expected = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(1, 4, dtype=torch.long),
        do_sample=False,
        early_stopping=False,
        length_penalty=1.0,
        pad_token_id=0,
        **settings,
    )
    assert beam_answer(seed) == expected[0].tolist()


RELEASE_4_41 = {
    248: [7, 17, 2, 8, 0, 3],
    580: [19, 10, 13, 15, 19, 7, 3],
    625: [4, 8, 21, 11, 9, 20, 19, 16, 3],
    1308: [1, 11, 0, 23, 22, 0, 14, 14, 11, 4, 22, 4, 23],
}


@pytest.mark.parametrize("seed", RELEASE_4_41)
def test_beams_equal_the_release_that_the_original_ran_on(seed: int) -> None:
    """`transformers` 4.41.1 goes on in these cases where 5.17 stops too early."""
    assert beam_answer(seed) == RELEASE_4_41[seed]


def test_one_beam_is_greedy() -> None:
    search = BeamSearch(1, end_ids=(), max_new_tokens=6)
    expected: list[int] = []
    while not search.finished:
        log_probs = random_logits(len(expected)).log_softmax(dim=-1)
        expected.append(int(log_probs.argmax()))
        assert search.advance(log_probs) == ([0], expected[-1:])
    assert search.best() == expected


def test_a_beam_search_may_end_at_once() -> None:
    log_probs = torch.full((1, VOCAB), -50.0)
    log_probs[0, 3] = 0.0
    search = BeamSearch(1, end_ids=[3], max_new_tokens=100)
    search.advance(log_probs)
    assert search.finished
    assert search.best() == [3]


# stop sequences


def cut_by_search(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        complete = [len(stop) for stop in stops if text.endswith(stop, 0, end)]
        if complete:
            return text[: end - max(complete)], True
    return text, False


def held_by_search(text: str, stops: list[str]) -> int:
    """How much of the end of a text might still become a stop sequence."""
    fronts = [stop[:size] for stop in stops for size in range(1, len(stop))]
    return max((len(front) for front in fronts if text.endswith(front)), default=0)


def test_stop_text_equals_a_plain_search() -> None:
    source = random.Random(0)

    def random_text(low: int, high: int) -> str:
        return "".join(source.choices("abc"[: source.choice((2, 3))], k=source.randint(low, high)))

    for _ in range(1000):
        stops = [random_text(1, 7) for _ in range(source.randint(0, 4))]
        text = random_text(0, 60)
        stop_text, given, passed = StopStringChecker(stops), 0, ""
        while given < len(text):
            size = source.randint(0, 5)
            passed += stop_text.push(text[given : given + size])
            given = min(given + size, len(text))
            expected, stopped = cut_by_search(text[:given], stops)
            assert stop_text.stopped == stopped
            held = 0 if stopped else held_by_search(expected, stops)
            assert passed == expected[: len(expected) - held], "no less and no more is held back"
        assert (passed + stop_text.flush(), stop_text.stopped) == cut_by_search(text, stops)
        assert stop_text.flush() == ""


def test_stop_text_examples() -> None:
    stop_text = StopStringChecker(["\n\n", "User:"])
    assert [
        stop_text.push(piece) for piece in ("A cat.", "\n", "Us", "e a", "\n", "\nMore", "x")
    ] == [
        "A cat.",
        "",
        "\n",
        "Use a",
        "",
        "",
        "",
    ]
    assert stop_text.stopped
    assert stop_text.flush() == ""


def test_the_first_complete_stop_counts() -> None:
    stop_text = StopStringChecker(["abcd", "bc"])
    assert stop_text.push("xabcd") == "xa"
    both = StopStringChecker(["c", "bc"])
    assert both.push("abc") == "a"


def test_stop_text_is_linear() -> None:
    """A stop sequence that nearly matches at every place of a long text."""
    stop_text = StopStringChecker(["a" * 20_000 + "b"])
    passed = "".join(stop_text.push("a") for _ in range(100_000))
    assert len(passed) == 80_000
    assert stop_text.push("b") == ""
    assert stop_text.stopped
