"""Chat messages of OpenAI's API -> prompt ids, built by `xgenmm.preprocessing.prompts`.

No chat template is involved, and user text stays text even where it spells a special token.
"""

from collections.abc import Sequence
from typing import Any

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

from xgenmm.config import TextConfig, XGenMMConfig
from xgenmm.errors import InputError
from xgenmm.preprocessing.prompts import IMAGE, Message, Prompt, request_prompt
from xgenmm.preprocessing.tokenizer import Tokenizer
from xgenmm.vllm_plugin.tokenizer import VllmTokenizer


class PromptRenderer(BaseRenderer[VllmTokenizer]):
    """Builds the prompts of chat requests."""

    def render_messages(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        """Return the parsed messages and the prompt's ids, with the images of the messages."""
        return self._render(*parse_chat_messages(messages, **self._parse_options(params)))

    async def render_messages_async(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        """Do the same as `render_messages`, fetching images asynchronously."""
        options = self._parse_options(params)
        return self._render(*await parse_chat_messages_async(messages, **options))

    def _parse_options(self, params: ChatParams) -> dict[str, Any]:
        return {
            "model_config": self.model_config,
            "content_format": "openai",  # keeps the text and the images of a message apart
            "media_io_kwargs": params.media_io_kwargs,
            "mm_processor_kwargs": params.mm_processor_kwargs,
        }

    def _render(
        self,
        conversation: list[ConversationMessage],
        data: MultiModalDataDict | None,
        uuids: MultiModalUUIDDict | None,
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        tokenizer = self.get_tokenizer()
        ids = conversation_prompt(conversation, tokenizer.tokenizer, tokenizer.config).ids
        prompt = parse_dec_only_prompt(list(ids))
        if data is not None:
            prompt["multi_modal_data"] = data
        if uuids is not None:
            prompt["multi_modal_uuids"] = uuids
        return conversation, prompt


def conversation_prompt(
    conversation: Sequence[ConversationMessage], tokenizer: Tokenizer, config: XGenMMConfig
) -> Prompt:
    """Return the prompt of a conversation that ends with the user's question.

    The images of a message replace the `<image>`s in its text, or precede it if there are none.
    Without a system message the default system prompt is used; an empty one omits it.

    Raises InputError if the last message is not from the user, and as `request_prompt` does.
    """
    turns = list(conversation)
    system_prompt = None
    if turns and turns[0]["role"] == "system":
        system_prompt = "\n".join(_texts(turns.pop(0)))
    if not turns or turns[-1]["role"] != "user":
        raise InputError("messages", "the last must be from user: it is the question")
    *earlier, (_, question) = [(turn["role"], _turn_text(turn, config.text)) for turn in turns]
    return request_prompt(
        tokenizer,
        config,
        question,
        images=sum(map(_count_images, turns)),
        system_prompt=system_prompt,
        messages=[Message(role, text) for role, text in earlier],
    )


def _turn_text(turn: ConversationMessage, config: TextConfig) -> str:
    """Return a message's text with an `<image>` for each of its images."""
    text, images = "\n".join(_texts(turn)), _count_images(turn)
    if images and not text.strip():
        text = config.caption_question
    if IMAGE in text:
        return text
    placeholder = IMAGE if config.prompt == "few_shot" else f"{IMAGE}\n"
    return placeholder * images + text


def _texts(turn: ConversationMessage) -> list[str]:
    return [part["text"] for part in _parts(turn) if part["type"] == "text"]


def _count_images(turn: ConversationMessage) -> int:
    return sum(part["type"] == "image" for part in _parts(turn))


def _parts(turn: ConversationMessage) -> list[dict[str, str]]:
    content: Any = turn.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
