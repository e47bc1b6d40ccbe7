"""Text <-> token ids, from a checkpoint's own tokenizer files, in one of two conventions.

The released models were trained with two tokenizers that give different ids for the same text.
Current `transformers` (5.17) reproduces neither, so their rules are implemented here:

* **slow** (instruct models): `LlamaTokenizer(legacy=False)` of transformers 4.41. The text as a
  whole gets one `▁` prefix; text after a special token gets none. If a special token opens the
  text, a lone `▁` precedes it, unless it is the unk, bos, eos or pad token or an additional token.
* **fast** (base models): `LlamaTokenizerFast` of transformers 4.41. Every stretch of text between
  special tokens gets its own `▁` prefix.

Both first split the text at its special tokens (leftmost, then longest match), and a special token
with `rstrip` absorbs the white space after it: `<|user|>\\n` is one token, `<image>\\n` is not.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

from xgenmm.preprocessing.detokenizer import DecodingTable, Detokenizer
from xgenmm.preprocessing.tokenizer_files import (
    SPACE,
    AddedToken,
    Convention,
    Encode,
    read_added_tokens,
    read_vocabulary,
)


class SpecialToken(str):
    """A special token in a list of segments, e.g. `SpecialToken("<|end|>")`."""

    __slots__ = ()


Segment = str | SpecialToken
"""One part of a prompt: a special token, or text, in which special tokens are not recognized."""


class Tokenizer:
    """A checkpoint's tokenizer. Immutable, so threads may share it.

    Attributes:
        specials: the id of every special token, `extra` ones included.
        pieces: the SentencePiece piece or special token of every id.
        vocab_size: the highest id plus one.
    """

    def __init__(
        self,
        convention: Convention,
        encode_text: Encode,
        vocabulary: Mapping[int, str],
        added_tokens: Sequence[AddedToken],
    ) -> None:
        """Build from the parts that `tokenizer_files` reads; see `from_folder`."""
        self.convention = convention
        self.specials: Mapping[str, int] = MappingProxyType({t.text: t.id for t in added_tokens})
        self.pieces: Mapping[int, str] = MappingProxyType(
            {**vocabulary, **{token.id: token.text for token in added_tokens}}
        )
        self.vocab_size = max(*vocabulary, *self.specials.values()) + 1
        self._encode_text = encode_text
        self._added_tokens = {token.text: token for token in added_tokens}
        self._special_ids = frozenset(self.specials.values())
        self._decoding_table = DecodingTable.build(convention, vocabulary, added_tokens)
        longest_first = sorted(self.specials, key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @classmethod
    def from_folder(
        cls, folder: Path, convention: Convention, extra: Mapping[str, int]
    ) -> "Tokenizer":
        """Read the tokenizer files of a checkpoint folder.

        Args:
            extra: ids of the additional tokens, which are not part of the language model's
                vocabulary, e.g. `<image>`.

        Raises:
            FileNotFoundError: the files that the convention needs are missing.
            ValueError: a file is malformed, or files contradict each other or `extra`.
        """
        folder = Path(folder)
        encode_text, vocabulary = read_vocabulary(folder, convention)
        return cls(
            convention, encode_text, vocabulary, read_added_tokens(folder, vocabulary, extra)
        )

    def id(self, token: str) -> int:
        """Return a special token's id; raise KeyError if there is no such special token."""
        try:
            return self.specials[token]
        except KeyError:
            names = " ".join(self.specials)
            raise KeyError(f"{token!r} is not one of the special tokens {names}") from None

    def encode(self, text: str) -> list[int]:
        """Encode trusted text, recognizing every special token in it.

        Prompts that contain user text must go through `encode_segments`.
        """
        return self.encode_segments(list(self._split(text)))

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        """Encode text given as segments, of which only `SpecialToken` ones are special tokens.

        Adjacent plain strings are joined first, so where they are split makes no difference.
        Raises KeyError for a `SpecialToken` that this tokenizer does not have.
        """
        merged = self._merge(segments)
        if self.convention == "slow" and merged:
            # The text as a whole gets one prefix, even if a special token opens it.
            if not isinstance(merged[0], SpecialToken):
                merged[0] = SPACE + merged[0]
            elif not self._added_tokens[merged[0]].has_role:
                merged.insert(0, SPACE)
        ids: list[int] = []
        for segment in merged:
            if isinstance(segment, SpecialToken):
                ids.append(self.specials[segment])
            else:
                ids += self._encode_text(segment)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids; special tokens and unknown ids decode to nothing.

        As in the original, the slow convention omits only special tokens with a role (unk, bos,
        eos, pad, additional) and sets off the others, such as `<|end|>`, with spaces. A byte that
        is not part of a UTF-8 character becomes U+FFFD, and the bytes around it are still decoded
        (the original fast tokenizer replaces the whole run of bytes).
        """
        detokenizer = self.detokenizer()
        return "".join(map(detokenizer.push, ids)) + detokenizer.flush()

    def detokenizer(self) -> Detokenizer:
        """Return a new detokenizer, for one stream of ids."""
        return Detokenizer(self._decoding_table)

    def text_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to a text; none for a special token.

        `Detokenizer` drops one leading space at the start of the text.
        """
        if token in self._special_ids:
            return b""
        if token in self._decoding_table.byte_values:
            return bytes([self._decoding_table.byte_values[token]])
        return self._decoding_table.texts.get(token, "").encode()

    def _split(self, text: str) -> Iterator[Segment]:
        end = 0
        for match in self._any_special.finditer(text):
            yield text[end : match.start()]
            yield SpecialToken(match[0])
            end = match.end()
        yield text[end:]

    def _merge(self, segments: Sequence[Segment]) -> list[Segment]:
        """Join adjacent text, and remove the white space that special tokens absorb."""
        merged: list[Segment] = []
        for is_special, group in groupby(segments, key=lambda s: isinstance(s, SpecialToken)):
            if is_special:
                merged += group
            else:
                merged.append(self._replace_meta_spaces("".join(group)))
        for i, segment in enumerate(merged):
            if not isinstance(segment, SpecialToken):
                continue
            self.id(segment)  # raises KeyError if unknown
            token = self._added_tokens[segment]
            following = merged[i + 1] if i + 1 < len(merged) else None
            if token.rstrip and following is not None and not isinstance(following, SpecialToken):
                merged[i + 1] = following.lstrip()
            if token.lstrip and i > 0 and not isinstance(merged[i - 1], SpecialToken):
                merged[i - 1] = merged[i - 1].rstrip()
        return [segment for segment in merged if segment]

    def _replace_meta_spaces(self, text: str) -> str:
        """The slow convention reads a literal `▁` in the text as a space."""
        return text.replace(SPACE, " ") if self.convention == "slow" else text
