"""Hostile values: `config.json`, `preprocessor_config.json` and the tokenizer's files."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from scripts.hostile.checkpoint_damage import Case, remove_token, set_value, value_case, write_file

BAD_INTEGERS: tuple[Any, ...] = ("32", 2.5, True, [2], {"a": 2}, 0, -1, 10**12, 10**30)
BAD_NUMBERS: tuple[Any, ...] = ("1e-5", True, [1.0], {}, -1.0, float("nan"), float("inf"), 10**400)
SECTIONS: dict[str, tuple[str, ...]] = {
    "vision_encoder_config": (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "image_size", "patch_size",
    ),
    "vision_tokenizer_config": ("num_latents", "depth", "num_heads", "head_dim"),
    "text_config": (
        "vocab_size", "initial_tokenizer_len", "hidden_size", "intermediate_size",
        "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "sliding_window",
    ),
}  # fmt: skip


def config_values() -> Iterator[Case]:
    value: Any
    for section, fields in SECTIONS.items():
        for field in fields:
            for value in BAD_INTEGERS:
                yield value_case("config.json", (section, field), value)
    for field in ("rms_norm_eps", "rope_theta"):
        for value in (*BAD_NUMBERS, 0.0):
            yield value_case("config.json", ("text_config", field), value)
    for section in SECTIONS:
        for value in (["a"], "text", 7, True):
            yield value_case("config.json", (section,), value)
    for value in ("yes", 1, []):
        yield value_case("config.json", ("demo",), value)
    for value in ("text", 7, [7], {"a": 1}, [None]):
        yield value_case("config.json", ("architectures",), value)


def contradictions() -> Iterator[Case]:
    """Values that are possible but are not those of the tensors, or not supported."""
    group = "config.json against the tensors"
    for section, field, value in (
        ("vision_encoder_config", "hidden_size", 64),
        ("vision_encoder_config", "intermediate_size", 65),
        ("vision_encoder_config", "num_hidden_layers", 3),
        ("vision_encoder_config", "num_hidden_layers", 1),
        ("vision_encoder_config", "num_attention_heads", 3),
        ("vision_encoder_config", "image_size", 42),
        ("vision_encoder_config", "patch_size", 7),
        ("vision_encoder_config", "tower", "vit"),
        ("vision_tokenizer_config", "num_latents", 5),
        ("vision_tokenizer_config", "depth", 2),
        ("vision_tokenizer_config", "num_heads", 3),
        ("vision_tokenizer_config", "head_dim", 16),
        ("text_config", "vocab_size", 705),
        ("text_config", "initial_tokenizer_len", 705),
        ("text_config", "initial_tokenizer_len", 100),
        ("text_config", "hidden_size", 64),
        ("text_config", "intermediate_size", 64),
        ("text_config", "num_hidden_layers", 40),
        ("text_config", "num_hidden_layers", 1),
        ("text_config", "num_attention_heads", 5),
        ("text_config", "num_attention_heads", 32),
        ("text_config", "max_position_embeddings", 16),
        ("text_config", "num_key_value_heads", 1),
        ("text_config", "additional_tokens", 2),
        ("text_config", "rope_scaling", {"type": "su", "long_factor": [1.0]}),
        ("text_config", "hidden_act", "relu"),
        ("text_config", "tie_word_embeddings", True),
    ):
        yield value_case("config.json", (section, field), value, group)
    for section, field, value in (
        ("vision_encoder_config", "tower", "open_clip"),
        ("vision_tokenizer_config", "text_tokens", 4),
    ):
        damage = partial(set_value, file="config.json", path=(section, field), value=value)
        yield Case(group, f"{section}.{field} = {value}", damage, ("safetensors", "missing"))


def preprocessor() -> Iterator[Case]:
    value: Any
    file = "preprocessor_config.json"
    for field in ("image_mean", "image_std"):
        for value in ("half", 0.5, [0.5], [0.5] * 4, [0.5, "x", 0.5], [0.5, None, 0.5],
                      [0.5, True, 0.5], [0.5, float("nan"), 0.5], [0.5, float("inf"), 0.5],
                      [0.5, -0.5, 0.5], [123.0, 116.0, 103.0], {"r": 0.5}):  # fmt: skip
            yield value_case(file, (field,), value)
    yield value_case(file, ("image_std",), [0.5, 0.0, 0.5])
    yield value_case(file, ("image_std",), [0.5, 1e-300, 0.5])
    for value in ("all", 7, [], [7], [[28]], [[28, 28, 28]], [["28", 56]], [[28.5, 56]],
                  [[True, 28]], [[0, 28]], [[-28, 28]], [[28, 30]], [[28, 10**9]], [[10**30, 28]],
                  [[28 * 200, 28]], [[28, 56]] * 100_000, {"a": [28, 56]}):  # fmt: skip
        yield value_case(file, ("grids",), value)


def tokenizer_entries() -> Iterator[Case]:
    value: Any
    wrong: Any
    file = "added_tokens.json"
    for value in ("7", 1.5, True, None, [], {}, -1, 10**12, 5, 652, 690):
        yield value_case(file, ("<|new|>",), value)
    yield value_case(file, ("",), 651)
    file = "tokenizer_config.json"
    for value in ([], "text", 7, {"x": {"content": "a"}}, {"-1": {"content": "a"}},
                  {"651": "text"}, {"651": []}, {"651": {}}, {"651": {"content": 7}},
                  {"651": {"content": ""}}, {"651": {"content": None}},
                  {"999999999999": {"content": "a"}}):  # fmt: skip
        yield value_case(file, ("added_tokens_decoder",), value)
    for token in ("690", "5"):
        yield value_case(file, ("added_tokens_decoder", token), {"content": "a"})
    for field in ("lstrip", "rstrip", "special", "normalized", "single_word"):
        for wrong in ("yes", 1, []):
            entry = {"content": "<pad>", field: wrong}
            case = value_case(file, ("added_tokens_decoder", "651"), entry)
            yield Case(case.group, f"{field} = {wrong!r}", case.damage, (file, field))
    for field in ("normalized", "single_word"):
        entry = {"content": "<pad>", field: True}
        case = value_case(file, ("added_tokens_decoder", "651"), entry)
        yield Case(case.group, f"{field} = True", case.damage, (field,))
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for value in (7, [], ["<s>"], {"text": "<s>"}, {"content": 7}, True):
            yield value_case(file, ("bos_token",), value)
    for token in ("<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "<|endoftext|>"):
        yield Case("missing special token", token, partial(remove_token, token=token), (token,))


def tokenizer_json() -> Iterator[Case]:
    value: Any
    for path, value in (
        (("model",), None), (("model",), []), (("model",), {"type": "BPE"}),
        (("model", "type"), "WordPiece"), (("model", "vocab"), {}), (("model", "vocab"), []),
        (("model", "vocab", "<unk>"), "0"), (("model", "vocab", "<unk>"), -1),
        (("model", "vocab", "new"), 10**12), (("model", "vocab", "new"), 690),
        (("model", "vocab", "new"), 1.5), (("model", "merges"), 7),
        (("model", "merges"), [["a", "b", "c"]]),
        (("pre_tokenizer",), {"type": "Split", "pattern": {"Regex": "(a+)+$"},
                              "behavior": "Isolated", "invert": False}),
        (("normalizer",), {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}),
        (("normalizer",), "NFC"), (("added_tokens",), 7), (("added_tokens",), [7]),
        (("added_tokens",), [{"id": 1}]), (("added_tokens",), [{"content": "<s>"}]),
        (("added_tokens",), [{"id": "1", "content": "<s>"}]),
        (("added_tokens",), [{"id": 1, "content": 7}]),
        (("added_tokens",), [{"id": -1, "content": "<s>"}]),
    ):  # fmt: skip
        yield value_case("tokenizer.json", path, value, base=True)
    for merge in ("x", "nope nope", ""):
        damage = partial(set_value, file="tokenizer.json", path=("model", "merges"), value=[merge])
        yield Case("tokenizer.json", f"merges {merge!r}", damage, ("tokenizer.json",), True)


def tokenizer_model() -> Iterator[Case]:
    def cut(folder: Path) -> None:
        path = folder / "tokenizer.model"
        path.write_bytes(path.read_bytes()[:4321])

    def flip(folder: Path, start: int) -> None:
        path = folder / "tokenizer.model"
        content = bytearray(path.read_bytes())
        for place in range(start, start + 64):
            content[place] ^= 0xFF
        path.write_bytes(content)

    words = ("tokenizer.model",)
    for name, content in (("random bytes", bytes(range(256)) * 40), ("text", b"hello " * 100)):
        damage = partial(write_file, name="tokenizer.model", content=content)
        yield Case("tokenizer.model", name, damage, words)
    yield Case("tokenizer.model", "cut", cut, words)
    for start in (0, 100, 3000, 9000):
        yield Case("tokenizer.model", f"flipped from {start}", partial(flip, start=start), words)
