"""The tokenizer in both conventions, against ids and texts of the original tokenizers."""

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
CHAT_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<pad>"]


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
    """A tokenizer of 320 pieces that has only `tokenizer.model` and `tokenizer_config.json`."""
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
    special_tokens = {320 + i: token for i, token in enumerate(CHAT_TOKENS)}
    decoder = {
        str(token_id): {"content": token, "rstrip": token not in ("<|endoftext|>", "<pad>")}
        for token_id, token in special_tokens.items()
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
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    built: Tokenizer = request.getfixturevalue(request.param)
    return built


def random_text(rng: random.Random) -> str:
    """Words, scripts, white space, emoji, byte-fallback characters, spelled-out special tokens."""
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
    white_space = [" ", "  ", "        ", "\n", "\n\n", "\t", "\u00a0", "\u3000", "\r\n"]
    parts = []
    for _ in range(rng.randrange(12)):
        character = chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x110000)]))
        parts.append(rng.choice([rng.choice(words), rng.choice(white_space), character]))
    return "".join(parts)


def case_name(case: dict[str, Any]) -> str:
    return f"{case['kind']}-{case['text'][-40:]!r}"


@pytest.mark.parametrize("case", CASES["cases"], ids=case_name)
def test_golden_texts_encode_to_the_original_ids(
    case: dict[str, Any], slow: Tokenizer, slow_from_json: Tokenizer, fast: Tokenizer
) -> None:
    for tokenizer in [slow, slow_from_json] if case["tokenizer"] == "slow" else [fast]:
        assert tokenizer.encode(case["text"]) == case["ids"]


def test_golden_ids_decode_to_the_original_texts(
    slow: Tokenizer, slow_from_json: Tokenizer, fast: Tokenizer
) -> None:
    for case in CASES["decode"]:
        assert slow.decode(case["ids"]) == case["slow"]
        assert slow_from_json.decode(case["ids"]) == case["slow"]
        assert fast.decode(case["ids"]) == case["fast"]


def test_random_texts_encode_to_the_original_ids(
    slow: Tokenizer, slow_from_json: Tokenizer, fast: Tokenizer
) -> None:
    for case in RANDOM["encode"]:
        assert slow.encode(case["text"]) == case["slow"]
        assert slow_from_json.encode(case["text"]) == case["slow"]
        assert fast.encode(case["text"]) == case["fast"]


def test_random_ids_decode_to_the_original_texts(
    slow: Tokenizer, slow_from_json: Tokenizer, fast: Tokenizer
) -> None:
    for case in RANDOM["decode"]:
        assert slow.decode(case["ids"]) == case["slow"]
        assert slow_from_json.decode(case["ids"]) == case["slow"]
        if "fast" in case:
            assert fast.decode(case["ids"]) == case["fast"]


def test_slow_convention_gives_the_same_ids_from_either_file(
    slow: Tokenizer, slow_from_json: Tokenizer
) -> None:
    rng = random.Random(1)
    for _ in range(4000):
        text = random_text(rng)
        assert slow.encode(text) == slow_from_json.encode(text)
        assert slow.encode_segments([text]) == slow_from_json.encode_segments([text])


def test_segments_encode_like_the_whole_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    special_tokens = list(tokenizer.specials)
    for _ in range(500):
        # Without `<` the text contains no special token, and none forms across a boundary.
        texts = [random_text(rng).replace("<", "(") for _ in range(rng.randrange(6))]
        segments = [rng.choice([t, SpecialToken(rng.choice(special_tokens))]) for t in texts]
        assert tokenizer.encode_segments(segments) == tokenizer.encode("".join(segments))


def test_boundaries_between_text_segments_make_no_difference(tokenizer: Tokenizer) -> None:
    whole = [SpecialToken("<|user|>"), "\n  Is it <|end|> red?", SpecialToken("<|end|>")]
    split = [
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
    assert tokenizer.encode_segments(split) == tokenizer.encode_segments(whole)


def test_special_tokens_in_text_segments_are_text(tokenizer: Tokenizer) -> None:
    special_ids = set(tokenizer.specials.values())
    for token in [*tokenizer.specials, *CHAT_TOKENS, "<s>", "</s>", "<unk>", "<0x0A>"]:
        for text in (token, f"a{token}", f" {token}\nb", token + token):
            ids = tokenizer.encode_segments([text])
            assert not special_ids & set(ids)
            assert tokenizer.decode(ids) == text


def test_only_special_tokens_with_rstrip_absorb_white_space(slow: Tokenizer) -> None:
    end, image = SpecialToken("<|end|>"), SpecialToken("<image>")
    assert slow.encode_segments([end, "\n \t", "\n", end]) == slow.encode_segments([end, end])
    newline = slow.encode("a\n")[-1]
    assert slow.encode_segments([image, "\n"]) == [slow.id("<image>"), newline]


def test_empty_text_has_no_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.encode_segments([]) == tokenizer.encode_segments(["", ""]) == []
    assert tokenizer.decode([]) == ""


def test_special_token_ids_and_vocabulary_size(
    slow: Tokenizer, fast: Tokenizer, small: Tokenizer
) -> None:
    for tokenizer in (slow, fast):
        assert tokenizer.vocab_size == 32015
        assert tokenizer.id("<|end|>") == 32007
        assert tokenizer.id("<image placeholder>") == 32013
        assert len(tokenizer.specials) == 18
    assert small.vocab_size == 329
    assert small.id("<|end|>") == 323
    with pytest.raises(KeyError, match="<video>"):
        slow.id("<video>")
    with pytest.raises(KeyError, match="<video>"):
        slow.encode_segments([SpecialToken("<video>")])


def test_small_tokenizer_in_the_slow_convention(small: Tokenizer) -> None:
    space, *star = small.encode("☆")  # encoded as bytes, so the prefix stands alone
    assert len(star) == len("☆".encode())
    ids = small.encode("<|user|>\n<image>\nred ☆<|end|>\n<|assistant|>\n")
    assert ids[:3] == [space, small.id("<|user|>"), small.id("<image>")]
    assert ids[-5:] == [*star, small.id("<|end|>"), small.id("<|assistant|>")]
    assert small.decode(ids[3:-2]) == "\nred ☆"


def test_encoding_then_decoding_restores_the_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    for _ in range(1000):
        text = random_text(rng).replace("▁", " ")
        assert tokenizer.decode(tokenizer.encode_segments([text])) == text


def test_stream_returns_text_as_soon_as_it_is_final(tokenizer: Tokenizer) -> None:
    rng = random.Random(4)
    for _ in range(500):
        text = random_text(rng).replace("▁", " ").replace("\ufffd", "?")
        ids = tokenizer.encode_segments([text])
        stream, returned = tokenizer.detokenizer(), ""
        for count, token in enumerate(ids, start=1):
            returned += stream.push(token)
            assert text.startswith(returned)  # whole characters only, and nothing to revise
            # Only an incomplete character is held back: at most three bytes.
            held_back = tokenizer.decode(ids[:count]).removeprefix(returned)
            assert held_back == "\ufffd" * len(held_back)
            assert len(held_back) <= 3
        assert stream.flush() == ""
        assert returned == text


def test_stream_of_random_ids_equals_decode(tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    first_byte = tokenizer.encode("\x00")[-1]
    for _ in range(2000):
        ids = [
            rng.choice([rng.randrange(tokenizer.vocab_size + 5), first_byte + rng.randrange(256)])
            for _ in range(rng.randrange(15))
        ]
        stream, returned = tokenizer.detokenizer(), ""
        expected = tokenizer.decode(ids)
        for token in ids:
            returned += stream.push(token)
            assert expected.startswith(returned)
        assert returned + stream.flush() == expected


def test_invalid_utf8_becomes_replacement_characters(slow: Tokenizer) -> None:
    first_byte = slow.encode("\x00")[-1]
    ids = [first_byte + byte for byte in b"\xf0\x9f\xa6" + "é".encode() + b"\xff\xe2\x82"]
    assert slow.decode(ids) == "\ufffd\ufffd\ufffdé\ufffd\ufffd\ufffd"
    assert slow.decode([first_byte + 0xE2, *slow.encode(" a")]) == "\ufffd  a"
    stream = slow.detokenizer()
    assert [stream.push(first_byte + byte) for byte in "🦜".encode()] == ["", "", "", "🦜"]


def test_tokenizer_model_is_also_looked_for_in_the_parent_folder(
    tmp_path: Path, slow: Tokenizer
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("tokenizer.*"))
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model or tokenizer\.json"):
        Tokenizer.from_folder(folder, "slow", EXTRA)
    shutil.copy(CHECKPOINT / "tokenizer.model", tmp_path)
    tokenizer = Tokenizer.from_folder(folder, "slow", EXTRA)
    assert tokenizer.specials == slow.specials
    assert tokenizer.encode("<|user|>\na dog") == slow.encode("<|user|>\na dog")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(folder, "fast", EXTRA)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"<image>": 32007}, r"id 32007 is '<\|end\|>', so it cannot be '<image>'"),
        ({"<image>": 500}, "id 500 is '.*', so it cannot be '<image>'"),
        ({"<|end|>": 32012}, r"'<\|end\|>' is id 32007, but also id 32012"),
    ],
)
def test_extra_tokens_that_contradict_the_files_are_rejected(
    extra: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(CHECKPOINT, "slow", extra)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.model", "not a model", "is not a SentencePiece model"),
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        ("tokenizer_config.json", "{", r"is not valid JSON \(EOF"),
        ("tokenizer_config.json", "[]", "but should be an object"),
        ("tokenizer_config.json", '{"eos_token": 7}', "eos_token.* is 7, but should be"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9": {"content": "x", "normalized": true}}}',
            "added_tokens_decoder.9.normalized is True, but should be False",
        ),
        ("added_tokens.json", '{"<|a|>": "7"}', r"<\|a\|> is '7', but should be a valid integer"),
        ("added_tokens.json", '{"<|a|>": 32013}', "id 32013 is '<|a|>', so it cannot be '<image"),
        ("added_tokens.json", '{"<|a|>": 40000}', "'<|a|>', but ids should be below 32012"),
    ],
)
def test_malformed_file_is_named_in_the_error(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=rf"/{file}.*{message}"):
        Tokenizer.from_folder(folder, "slow", EXTRA)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("model", {"type": "unheard of"}, "model.type is 'unheard of', but should be 'BPE'"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+"}}, ".* should be"),
        ("pre_tokenizer", {"type": "Split"}, "pre_tokenizer.type is 'Split', but should be"),
        ("added_tokens", [{"id": -1, "content": "a"}], r"added_tokens.0.id is -1, but should be"),
    ],
)
def test_unsupported_tokenizer_json_is_named_in_the_error(
    tmp_path: Path, part: str, value: object, message: str
) -> None:
    description = json.loads((CHECKPOINT / "tokenizer.json").read_text()) | {part: value}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=rf"/tokenizer\.json: {message}"):
        Tokenizer.from_folder(tmp_path, "fast", EXTRA)
