"""The package's tokenizer behind the interface that vLLM expects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import sentencepiece
from transformers import BatchEncoding
from vllm.tokenizers import TokenizerLike

from xgenmm.checkpoints.checks import read_tokenizer
from xgenmm.checkpoints.registry import read_config
from xgenmm.config import XGenMMConfig
from xgenmm.preprocessing.tokenizer import Tokenizer


class VllmTokenizer(TokenizerLike):
    """A checkpoint's tokenizer, as vLLM calls it.

    tokenizer, config: the package's own, for `PromptRenderer`.
    """

    is_fast = True  # else vLLM puts spaces between special tokens when it decodes
    truncation_side = "left"
    # By this attribute xgrammar, which vLLM uses for structured output, recognizes SentencePiece's
    # spelling of spaces and bytes (`▁`, `<0x0A>`).
    sp_model = sentencepiece.SentencePieceProcessor()

    def __init__(self, tokenizer: Tokenizer, config: XGenMMConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._ids = {piece: id_ for id_, piece in tokenizer.pieces.items()}
        self._special_ids = frozenset(tokenizer.specials.values())

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path, *_: Any, **__: Any) -> "VllmTokenizer":
        """Read the tokenizer of a checkpoint folder."""
        folder = Path(path_or_repo_id)
        config = read_config(folder)
        return cls(read_tokenizer(folder, config), config)

    @property
    def eos_token_id(self) -> int:
        """The id that ends an answer; `generation_config.json` may name others."""
        return self.tokenizer.id(self.config.text.stop_tokens[0])

    @property
    def bos_token_id(self) -> int:
        """Required by vLLM but unused: prompts have no beginning-of-sequence token."""
        return self.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """Required by vLLM but unused: prompts are not padded."""
        return self.eos_token_id

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, including the additional ones."""
        return list(self.tokenizer.specials)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`, in the same order."""
        return list(self.tokenizer.specials.values())

    @property
    def vocab_size(self) -> int:
        """The highest id plus one."""
        return self.tokenizer.vocab_size

    @property
    def max_token_id(self) -> int:
        """The highest id."""
        return self.tokenizer.vocab_size - 1

    @property
    def max_chars_per_token(self) -> int:
        """The length of the longest piece."""
        return max(map(len, self._ids))

    def num_special_tokens_to_add(self) -> int:
        """Return 0: `encode` adds no special tokens."""
        return 0

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all pieces except special tokens."""
        return {piece: id_ for piece, id_ in self._ids.items() if id_ not in self._special_ids}

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of all special tokens."""
        return dict(self.tokenizer.specials)

    def __call__(self, text: str, *_: Any, **options: Any) -> BatchEncoding:
        """Return `encode` in the form of a transformers tokenizer."""
        return BatchEncoding({"input_ids": self.encode(text, **options)})

    def encode(
        self,
        text: str,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Return the ids of a complete prompt, such as a completion request's.

        Special tokens that are spelled out in it are recognized. Chat messages do not pass through
        here (see `PromptRenderer`).
        """
        ids = self.tokenizer.encode(text)
        return ids[:max_length] if truncation else ids

    def decode(self, ids: Sequence[int] | int, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`."""
        return self.convert_tokens_to_string(
            self.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids, skip_special_tokens)
        )

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """Return the ids of pieces. Raises KeyError for an unknown piece."""
        return self._ids[tokens] if isinstance(tokens, str) else [self._ids[t] for t in tokens]

    def convert_ids_to_tokens(
        self, ids: Sequence[int], skip_special_tokens: bool = False
    ) -> list[str]:
        """Return the pieces of ids; without special tokens, only those after the last one.

        vLLM detokenizes an answer together with the end of its prompt. Text after a special token
        starts anew: its first piece must lose the space of its `▁`, which it would keep if pieces
        of the prompt preceded it.
        """
        if skip_special_tokens:
            special_indices = [i for i, id_ in enumerate(ids) if id_ in self._special_ids]
            ids = ids[special_indices[-1] + 1 :] if special_indices else ids
        return [self.tokenizer.pieces.get(id_, "") for id_ in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of pieces."""
        return self.tokenizer.decode([self._ids[token] for token in tokens if token])
