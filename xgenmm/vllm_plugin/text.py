"""Messages -> ids and ids -> text, by the package's own prompts and tokenizer.

A chat request gets exactly the ids that `xgenmm.preprocessing.prompts` makes: there is no template,
and what a person wrote stays text, also where it spells a special token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import sentencepiece
from transformers import BatchEncoding
from vllm.inputs import MultiModalDataDict, MultiModalUUIDDict
from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import (
    ChatCompletionMessageParam,
    ConversationMessage,
    parse_chat_messages,
    parse_chat_messages_async,
)
from vllm.renderers.inputs import DictPrompt
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.params import ChatParams
from vllm.tokenizers import TokenizerLike

from xgenmm.checkpoints.registry import read_config
from xgenmm.config import TextConfig, XGenMMConfig
from xgenmm.errors import InputError
from xgenmm.preprocessing.prompts import IMAGE, Message, Prompt, request_prompt
from xgenmm.preprocessing.tokenizer import Tokenizer


class VllmTokens(TokenizerLike):
    """The package's tokenizer with the methods that vLLM calls."""

    is_fast = True  # no spaces of vLLM's own between special tokens
    truncation_side = "left"
    # By this xgrammar, which keeps answers to a choice or a schema, knows how pieces are spelled.
    sp_model = sentencepiece.SentencePieceProcessor()

    def __init__(self, tokens: Tokenizer, config: XGenMMConfig) -> None:
        self.tokens = tokens
        self.config = config
        self._ids = {piece: number for number, piece in tokens.pieces.items()}
        self._special_ids = frozenset(tokens.specials.values())

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path, *_: Any, **__: Any) -> "VllmTokens":
        """The tokenizer of a checkpoint folder."""
        folder = Path(path_or_repo_id)
        config = read_config(folder)
        tokens = Tokenizer.from_folder(folder, config.text.convention, config.additional_ids)
        return cls(tokens, config)

    @property
    def eos_token_id(self) -> int:
        """What ends an answer; `generation_config.json` may name more."""
        return self.tokens.id(self.config.text.stop_tokens[0])

    @property
    def bos_token_id(self) -> int:
        """Not used: no prompt begins with a token of its own."""
        return self.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """Not used: vLLM does not pad prompts unless it is asked to."""
        return self.eos_token_id

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, the additional ones included."""
        return list(self.tokens.specials)

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids, in the same order."""
        return list(self.tokens.specials.values())

    @property
    def vocab_size(self) -> int:
        """The highest id plus one."""
        return self.tokens.vocab_size

    @property
    def max_token_id(self) -> int:
        """The highest id."""
        return self.tokens.vocab_size - 1

    @property
    def max_chars_per_token(self) -> int:
        """Length of the longest piece."""
        return max(map(len, self._ids))

    def num_special_tokens_to_add(self) -> int:
        """None: a prompt says all that it wants."""
        return 0

    def get_vocab(self) -> dict[str, int]:
        """Ids of what can stand in a text, so without special tokens."""
        return {p: number for p, number in self._ids.items() if number not in self._special_ids}

    def get_added_vocab(self) -> dict[str, int]:
        """Every special token's id."""
        return dict(self.tokens.specials)

    def __call__(self, text: str, *_: Any, **options: Any) -> BatchEncoding:
        """`encode` as vLLM's other face wants it."""
        return BatchEncoding({"input_ids": self.encode(text, **options)})

    def encode(
        self,
        text: str,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Ids of a finished prompt: special tokens in it are recognised, whoever wrote them."""
        ids = self.tokens.encode(text)
        return ids[:max_length] if truncation else ids

    def decode(self, ids: Sequence[int] | int, skip_special_tokens: bool = False) -> str:
        """The text of `ids`."""
        return self.convert_tokens_to_string(
            self.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids, skip_special_tokens)
        )

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """Ids of pieces."""
        return self._ids[tokens] if isinstance(tokens, str) else [self._ids[t] for t in tokens]

    def convert_ids_to_tokens(
        self, ids: Sequence[int], skip_special_tokens: bool = False
    ) -> list[str]:
        """Pieces of ids; without special tokens, those after the last one.

        vLLM asks for the end of a prompt and then for each id of its answer. What follows a
        special token is a text of its own, so its first piece loses the space of its `▁`.
        """
        if skip_special_tokens:
            specials = [i for i, number in enumerate(ids) if number in self._special_ids]
            ids = ids[specials[-1] + 1 :] if specials else ids
        return [self.tokens.pieces.get(number, "") for number in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces."""
        return self.tokens.decode([self._ids[token] for token in tokens if token])


class PromptRenderer(BaseRenderer[VllmTokens]):
    """Makes the prompt of a chat request."""

    def render_messages(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        """Messages as the OpenAI API has them -> the same parsed, and a prompt of ids."""
        return self._rendered(*parse_chat_messages(messages, **self._parsing(params)))

    async def render_messages_async(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        """The same, while images are being fetched."""
        return self._rendered(*await parse_chat_messages_async(messages, **self._parsing(params)))

    def _parsing(self, params: ChatParams) -> dict[str, Any]:
        return {
            "model_config": self.model_config,
            "content_format": "openai",  # the text and the images of a message stay apart
            "media_io_kwargs": params.media_io_kwargs,
            "mm_processor_kwargs": params.mm_processor_kwargs,
        }

    def _rendered(
        self,
        conversation: list[ConversationMessage],
        data: MultiModalDataDict | None,
        uuids: MultiModalUUIDDict | None,
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        tokens = self.get_tokenizer()
        ids = prompt_of(conversation, tokens.tokens, tokens.config).ids
        prompt = parse_dec_only_prompt(list(ids))
        if data is not None:
            prompt["multi_modal_data"] = data
        if uuids is not None:
            prompt["multi_modal_uuids"] = uuids
        return conversation, prompt


def prompt_of(
    conversation: Sequence[ConversationMessage], tokens: Tokenizer, config: XGenMMConfig
) -> Prompt:
    """The prompt of a parsed conversation that ends with the user's question.

    The images of a message go where its text says `<image>`, or first in it. Without a system
    message the prompt has the one of the training; an empty one leaves it out. Raises InputError
    as `xgenmm.preprocessing.prompts` does.
    """
    turns = list(conversation)
    system = None
    if turns and turns[0]["role"] == "system":
        system = "\n".join(_texts(turns.pop(0)))
    if not turns or turns[-1]["role"] != "user":
        raise InputError("messages", "the last must be from user: it is the question")
    *earlier, (_, question) = [(turn["role"], _text(turn, config.text)) for turn in turns]
    images = sum(map(_images, turns))
    messages = [Message(role, text) for role, text in earlier]
    return request_prompt(
        tokens, config, question, images=images, system_prompt=system, messages=messages
    )


def _text(turn: ConversationMessage, config: TextConfig) -> str:
    """A message's text with an `<image>` for each of its images."""
    text, images = "\n".join(_texts(turn)), _images(turn)
    if images and not text.strip():
        text = config.caption_question
    if IMAGE in text:
        return text
    mark = IMAGE if config.prompt == "few_shot" else f"{IMAGE}\n"
    return mark * images + text


def _texts(turn: ConversationMessage) -> list[str]:
    return [part["text"] for part in _parts(turn) if part["type"] == "text"]


def _images(turn: ConversationMessage) -> int:
    return sum(part["type"] == "image" for part in _parts(turn))


def _parts(turn: ConversationMessage) -> list[dict[str, str]]:
    content: Any = turn.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
