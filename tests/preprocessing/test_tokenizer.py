"""The tokenizer in both conventions, against ids and texts that the originals gave."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.support import golden_data
from xgenmm.preprocessing.tokenizer import SpecialToken, Tokenizer

GOLDEN = golden_data.folder("tokenizer")
CHECKPOINT = GOLDEN / "checkpoint"
EXTRA = {"<image>": 32012, "<image placeholder>": 32013, "<|endofchunk|>": 32014}
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
RANDOM = json.loads((GOLDEN / "random.json").read_text(encoding="utf-8"))
CHAT_MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<pad>"]


@pytest.fixture(scope="module")
def slow() -> Tokenizer:
    return Tokenizer.from_folder(CHECKPOINT, "slow", EXTRA)


@pytest.fixture(scope="module")
def slow_from_json(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("weights") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("tokenizer.model"))
    return Tokenizer.from_folder(folder, "slow", EXTRA)


@pytest.fixture(scope="module")
def fast() -> Tokenizer:
    return Tokenizer.from_folder(CHECKPOINT, "fast", EXTRA)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of 400 pieces with nothing but a model and its special tokens' description."""
    folder = tmp_path_factory.mktemp("small")
    words = ["red", "blue", "star", "circle", "how", "many", "what", "colour", "is", "the", "left"]
    rng = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices(words, k=8)) for _ in range(300)]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    marks = {320 + i: mark for i, mark in enumerate(CHAT_MARKS)}
    decoder = {
        str(number): {"content": mark, "rstrip": mark not in ("<|endoftext|>", "<pad>")}
        for number, mark in marks.items()
    }
    config = {
        "added_tokens_decoder": decoder,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(
        folder, "slow", {"<image>": 326, "<image placeholder>": 327, "<|endofchunk|>": 328}
    )


@pytest.fixture(params=["slow", "slow_from_json", "fast", "small"])
def tokens(request: pytest.FixtureRequest) -> Tokenizer:
    built: Tokenizer = request.getfixturevalue(request.param)
    return built


def random_text(rng: random.Random) -> str:
    """Words, scripts, runs of white space, emoji, what needs byte fallback, looks of special."""
    words = [
        "dog",
        "café",
        "12.5%",
        "图中有什么",
        "🦜🦜",
        "👨‍👩‍👧",
        "ༀ",
        "\U0001d518\U0001d52b",
        "<0x0A>",
        "<s>",
        "<unk>",
    ]
    words += ["</s>", "<|end|>", "<|user|>", "<image>", "<pad", "▁", "\x00", "\ufeff", "e\u0301"]
    spaces = [" ", "  ", "        ", "\n", "\n\n", "\t", "\u00a0", "\u3000", "\r\n"]
    parts = []
    for _ in range(rng.randrange(12)):
        character = chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x110000)]))
        parts.append(rng.choice([rng.choice(words), rng.choice(spaces), character]))
    return "".join(parts)


def name(case: dict[str, Any]) -> str:
    return f"{case['kind']}-{case['text'][-40:]!r}"


@pytest.mark.parametrize("case", CASES["cases"], ids=name)
def test_golden_ids(
    case: dict[str, Any], slow: Tokenizer, slow_from_json: Tokenizer, fast: Tokenizer
) -> None:
    for tokens in [slow, slow_from_json] if case["tokenizer"] == "slow" else [fast]:
        assert tokens.encode(case["text"]) == case["ids"]


def test_golden_texts(slow: Tokenizer, slow_from_json: Tokenizer, fast: Tokenizer) -> None:
    for case in CASES["decode"]:
        assert slow.decode(case["ids"]) == case["slow"]
        assert slow_from_json.decode(case["ids"]) == case["slow"]
        assert fast.decode(case["ids"]) == case["fast"]


def test_random_texts_as_in_the_original(
    slow: Tokenizer, slow_from_json: Tokenizer, fast: Tokenizer
) -> None:
    for case in RANDOM["encode"]:
        assert slow.encode(case["text"]) == case["slow"]
        assert slow_from_json.encode(case["text"]) == case["slow"]
        assert fast.encode(case["text"]) == case["fast"]


def test_random_ids_as_in_the_original(
    slow: Tokenizer, slow_from_json: Tokenizer, fast: Tokenizer
) -> None:
    for case in RANDOM["decode"]:
        assert slow.decode(case["ids"]) == case["slow"]
        assert slow_from_json.decode(case["ids"]) == case["slow"]
        if "fast" in case:
            assert fast.decode(case["ids"]) == case["fast"]


def test_slow_needs_either_file(slow: Tokenizer, slow_from_json: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(4000):
        text = random_text(rng)
        assert slow.encode(text) == slow_from_json.encode(text)
        assert slow.encode_segments([text]) == slow_from_json.encode_segments([text])


def test_pieces_equal_the_whole_text(tokens: Tokenizer) -> None:
    rng = random.Random(2)
    marks = list(tokens.specials)
    for _ in range(500):
        # No `<` in what is typed: it has no special token, and none forms across a cut.
        pieces = [random_text(rng).replace("<", "(") for _ in range(rng.randrange(6))]
        pieces = [rng.choice([piece, SpecialToken(rng.choice(marks))]) for piece in pieces]
        assert tokens.encode_segments(pieces) == tokens.encode("".join(pieces))


def test_how_text_is_cut_makes_no_difference(tokens: Tokenizer) -> None:
    whole = [SpecialToken("<|user|>"), "\n  Is it <|end|> red?", SpecialToken("<|end|>")]
    cut = [
        SpecialToken("<|user|>"),
        "\n",
        "",
        " ",
        " Is it <|e",
        "nd|> r",
        "ed?",
        SpecialToken("<|end|>"),
        "",
    ]
    assert tokens.encode_segments(cut) == tokens.encode_segments(whole)


def test_typed_special_tokens_are_text(tokens: Tokenizer) -> None:
    special_ids = set(tokens.specials.values())
    for mark in [*tokens.specials, *CHAT_MARKS, "<s>", "</s>", "<unk>", "<0x0A>"]:
        for text in (mark, f"a{mark}", f" {mark}\nb", mark + mark):
            ids = tokens.encode_segments([text])
            assert not special_ids & set(ids)
            assert tokens.decode(ids) == text


def test_white_space_after_a_mark_is_swallowed_only_if_it_says_so(slow: Tokenizer) -> None:
    end, image = SpecialToken("<|end|>"), SpecialToken("<image>")
    assert slow.encode_segments([end, "\n \t", "\n", end]) == slow.encode_segments([end, end])
    newline = slow.encode("a\n")[-1]
    assert slow.encode_segments([image, "\n"]) == [slow.id("<image>"), newline]


def test_no_text_no_ids(tokens: Tokenizer) -> None:
    assert tokens.encode("") == tokens.encode_segments([]) == tokens.encode_segments(["", ""]) == []
    assert tokens.decode([]) == ""


def test_special_tokens_and_sizes(slow: Tokenizer, fast: Tokenizer, small: Tokenizer) -> None:
    for tokens in (slow, fast):
        assert tokens.vocab_size == 32015
        assert tokens.id("<|end|>") == 32007
        assert tokens.id("<image placeholder>") == 32013
        assert len(tokens.specials) == 18
    assert small.vocab_size == 329
    assert small.id("<|end|>") == 323
    with pytest.raises(KeyError, match="<video>"):
        slow.id("<video>")
    with pytest.raises(KeyError, match="<video>"):
        slow.encode_segments([SpecialToken("<video>")])


def test_small_tokenizer_in_the_slow_convention(small: Tokenizer) -> None:
    space, *star = small.encode("☆")  # not among its pieces: the prefix stands alone
    assert len(star) == len("☆".encode())
    ids = small.encode("<|user|>\n<image>\nred ☆<|end|>\n<|assistant|>\n")
    assert ids[:3] == [space, small.id("<|user|>"), small.id("<image>")]
    assert ids[-5:] == [*star, small.id("<|end|>"), small.id("<|assistant|>")]
    assert small.decode(ids[3:-2]) == "\nred ☆"


def test_text_survives_the_round_trip(tokens: Tokenizer) -> None:
    rng = random.Random(3)
    for _ in range(1000):
        text = random_text(rng).replace("▁", " ")
        assert tokens.decode(tokens.encode_segments([text])) == text


def test_stream_gives_text_as_soon_as_it_is_whole(tokens: Tokenizer) -> None:
    rng = random.Random(4)
    for _ in range(500):
        text = random_text(rng).replace("▁", " ").replace("\ufffd", "?")
        ids = tokens.encode_segments([text])
        stream, given = tokens.detokenizer(), ""
        for count, token in enumerate(ids, start=1):
            given += stream.push(token)
            assert text.startswith(given)  # so never half a character, and nothing to take back
            # Only an unfinished character is held back, and that is at most three bytes.
            held = tokens.decode(ids[:count]).removeprefix(given)
            assert held == "\ufffd" * len(held)
            assert len(held) <= 3
        assert stream.flush() == ""
        assert given == text


def test_stream_of_any_ids_equals_decode(tokens: Tokenizer) -> None:
    rng = random.Random(5)
    first_byte = tokens.encode("\x00")[-1]
    for _ in range(2000):
        ids = [
            rng.choice([rng.randrange(tokens.vocab_size + 5), first_byte + rng.randrange(256)])
            for _ in range(rng.randrange(15))
        ]
        stream, given = tokens.detokenizer(), ""
        whole = tokens.decode(ids)
        for token in ids:
            given += stream.push(token)
            assert whole.startswith(given)
        assert given + stream.flush() == whole


def test_broken_characters(slow: Tokenizer) -> None:
    first_byte = slow.encode("\x00")[-1]
    pieces = [first_byte + byte for byte in b"\xf0\x9f\xa6" + "é".encode() + b"\xff\xe2\x82"]
    assert slow.decode(pieces) == "\ufffd\ufffd\ufffdé\ufffd\ufffd\ufffd"
    assert slow.decode([first_byte + 0xE2, *slow.encode(" a")]) == "\ufffd  a"
    stream = slow.detokenizer()
    assert [stream.push(first_byte + byte) for byte in "🦜".encode()] == ["", "", "", "🦜"]


def test_tokenizer_model_may_lie_one_level_up(tmp_path: Path, slow: Tokenizer) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("tokenizer.*"))
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model or tokenizer\.json"):
        Tokenizer.from_folder(folder, "slow", EXTRA)
    shutil.copy(CHECKPOINT / "tokenizer.model", tmp_path)
    tokens = Tokenizer.from_folder(folder, "slow", EXTRA)
    assert tokens.specials == slow.specials
    assert tokens.encode("<|user|>\na dog") == slow.encode("<|user|>\na dog")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(folder, "fast", EXTRA)


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({"<image>": 32007}, r"id 32007 is '<\|end\|>', so it cannot be '<image>'"),
        ({"<image>": 500}, "id 500 is '<image>', but also"),
        ({"<|end|>": 32012}, r"'<\|end\|>' is id 32007, but also id 32012"),
    ],
)
def test_extra_tokens_may_not_contradict_the_files(extra: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Tokenizer.from_folder(CHECKPOINT, "slow", extra)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.model", "not a model"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9": {"content": "x", "normalized": 1}}}',
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=file if "x" not in content else "'x' is `normalized`"):
        Tokenizer.from_folder(folder, "slow", EXTRA)


def test_a_broken_tokenizer_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "unheard of"}}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer description"):
        Tokenizer.from_folder(tmp_path, "fast", EXTRA)
