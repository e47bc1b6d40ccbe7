"""Prompt templates: a conversation -> token ids and the position of each image among them.

The instruct models take a chat, the base models few-shot examples. User text cannot inject control
tokens: only the template inserts special tokens, and a special token spelled out in a question,
system prompt or message is encoded as plain text. The one exception is `<image>` in a question or
an earlier user message, which marks where an image goes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from xgenmm.config import XGenMMConfig
from xgenmm.errors import InputError
from xgenmm.preprocessing.tokenizer import Segment, SpecialToken, Tokenizer

Role = Literal["user", "assistant"]

IMAGE = SpecialToken("<image>")
IMAGE_PLACEHOLDER = SpecialToken("<image placeholder>")
END_OF_CHUNK = SpecialToken("<|endofchunk|>")
SYSTEM = SpecialToken("<|system|>")
USER = SpecialToken("<|user|>")
ASSISTANT = SpecialToken("<|assistant|>")
END = SpecialToken("<|end|>")

DEFAULT_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Message:
    """An earlier turn of a chat, or one half of a few-shot example."""

    role: Role
    content: str


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and which of them the vision tokens replace.

    `spans` holds one (start, length) per image, in order: the range of `ids` that the image's
    vision tokens replace. The length is 1 in a chat and the number of latents in a few-shot
    prompt.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def text_tokens(self) -> int:
        """How many ids the vision tokens do not replace."""
        return len(self.ids) - sum(length for _, length in self.spans)


def parse_conversation(
    raw: Sequence[Any], question: str = "", system_prompt: str = DEFAULT_SYSTEM_PROMPT
) -> tuple[str, tuple[Message, ...], str]:
    """Validate earlier turns from a client, each `{"role": ..., "content": ...}`.

    They may also be a whole conversation as in OpenAI's API: a first message from `system`, if
    `system_prompt` is the default, and a last one from `user`, if `question` is empty.

    Returns the system prompt, the earlier turns and the question.

    Raises:
        InputError: names `messages` and the offending message, counted from 1.
    """
    messages = [_parse_message(item, number) for number, item in enumerate(raw, start=1)]
    first, role = 1, str(messages[0].role) if messages else ""
    if role == "system":
        if system_prompt != DEFAULT_SYSTEM_PROMPT:
            raise InputError(
                "messages", "message 1 has the role system, but system_prompt is given; give one"
            )
        system_prompt, first = messages.pop(0).content, 2
    _check_order(messages, first)
    if len(messages) % 2 and not question.strip():
        question = messages.pop().content
    _check_last(messages, first)
    return system_prompt, tuple(messages), question


def _parse_message(item: Any, number: int) -> Message:
    if not isinstance(item, dict):
        kind = type(item).__name__
        raise InputError("messages", f"message {number} must be an object, not {kind}")
    if item.keys() != {"role", "content"}:
        keys = ", ".join(map(str, item)) or "nothing"
        raise InputError("messages", f"message {number} must have role and content, not {keys}")
    if not isinstance(item["content"], str):
        kind = type(item["content"]).__name__
        raise InputError("messages", f"the content of message {number} must be text, not {kind}")
    return Message(item["role"], item["content"])


def request_prompt(
    tokenizer: Tokenizer,
    config: XGenMMConfig,
    question: str,
    *,
    images: int,
    system_prompt: str | None = None,
    messages: Sequence[Message] = (),
) -> Prompt:
    """Build the prompt in the checkpoint's style: `chat_prompt` or `few_shot_prompt`.

    `system_prompt` is ignored for few-shot prompts. Raises InputError as those functions do.
    """
    if config.text.prompt == "few_shot":
        latents = config.resampler.num_latents
        return few_shot_prompt(
            tokenizer, question, images=images, num_latents=latents, messages=messages
        )
    return chat_prompt(
        tokenizer, question, images=images, system_prompt=system_prompt, messages=messages
    )


def chat_prompt(
    tokenizer: Tokenizer,
    question: str,
    *,
    images: int,
    system_prompt: str | None = None,
    messages: Sequence[Message] = (),
) -> Prompt:
    """Build the prompt of an instruct model, up to the start of its answer.

    Each `<image>` in the question or a user message stands for one image, in order. If there
    is none, all images go to the start of the first user turn, each on its own line.

    Args:
        images: number of images.
        system_prompt: None means `DEFAULT_SYSTEM_PROMPT`; "" omits the system turn.
        messages: the earlier turns, alternating user and assistant.

    Raises:
        InputError: the turns do not alternate, a text is not valid Unicode, or the number of
            images differs from the number of `<image>`.
    """
    system = DEFAULT_SYSTEM_PROMPT if system_prompt is None else system_prompt
    _check_turns(messages)
    _check_text("system_prompt", system)
    _check_text("question", question)

    users = [m.content for m in messages if m.role == "user"] + [question]
    answers = [m.content for m in messages if m.role == "assistant"]
    if not any(IMAGE in user for user in users):
        users[0] = f"{IMAGE}\n" * images + users[0]
    _check_image_count(users, images)

    segments: list[Segment] = [SYSTEM, "\n", system, END, "\n"] if system else []
    for i, user in enumerate(users):
        segments += [USER, "\n", *_insert_images(user, [IMAGE]), END, "\n", ASSISTANT, "\n"]
        if i < len(answers):
            segments += [answers[i], END, "\n"]
    return _encode_prompt(tokenizer, segments, span_length=1)


def few_shot_prompt(
    tokenizer: Tokenizer,
    question: str,
    *,
    images: int,
    num_latents: int,
    messages: Sequence[Message] = (),
) -> Prompt:
    """Build the prompt of a base model: examples, then the question for the model to continue.

    Each `<image>` in the question or a user message stands for one image, in order. If there
    is none, each example and the question get one image at their start; without examples, all
    images go in front of the question.

    Args:
        images: number of images.
        num_latents: vision tokens per image.
        messages: the examples, a user message and an assistant message each.

    Raises:
        InputError: as `chat_prompt`.
    """
    _check_turns(messages)
    _check_text("question", question)

    users = [m.content for m in messages if m.role == "user"] + [question]
    answers = [m.content for m in messages if m.role == "assistant"]
    if images and not any(IMAGE in user for user in users):
        if not answers:
            users = [IMAGE * images + question]
        elif images == len(users):
            users = [IMAGE + user for user in users]
        else:
            raise InputError(
                "images",
                f"{images} given, {len(users)} needed: one for each of the {len(answers)} "
                f"examples and one for the question, or place them with {IMAGE}",
            )
    _check_image_count(users, images)

    image_tokens = [IMAGE] + [IMAGE_PLACEHOLDER] * (num_latents - 1)
    segments: list[Segment] = []
    for user, answer in zip(users, answers, strict=False):
        segments += [*_insert_images(user, image_tokens), answer, END_OF_CHUNK]
    segments += _insert_images(users[-1], image_tokens)
    return _encode_prompt(tokenizer, segments, span_length=num_latents)


def _encode_prompt(
    tokenizer: Tokenizer, segments: Sequence[Segment], *, span_length: int
) -> Prompt:
    ids = tuple(tokenizer.encode_segments(segments))
    image_id = tokenizer.id(IMAGE)
    spans = tuple((start, span_length) for start, token in enumerate(ids) if token == image_id)
    return Prompt(ids, spans)


def _insert_images(text: str, image_tokens: Sequence[Segment]) -> list[Segment]:
    """Split text at each `<image>` and put `image_tokens` in its place."""
    first, *rest = text.split(IMAGE)
    segments: list[Segment] = [first]
    for part in rest:
        segments += [*image_tokens, part]
    return segments


def _check_turns(messages: Sequence[Message]) -> None:
    _check_order(messages)
    _check_last(messages)


def _check_order(messages: Sequence[Message], first: int = 1) -> None:
    for number, message in enumerate(messages, start=first):
        role: str = message.role
        if role == "system":
            raise InputError(
                "messages", f"message {number} has the role system: use system_prompt instead"
            )
        if role not in get_args(Role):
            raise InputError(
                "messages", f"message {number} has the role {role!r}, not user or assistant"
            )
        expected = "assistant" if (number - first) % 2 else "user"
        if role != expected:
            raise InputError(
                "messages",
                f"message {number} must be from {expected}, not {role}: turns alternate, "
                "starting with user",
            )
        _check_text("messages", message.content)


def _check_last(messages: Sequence[Message], first: int = 1) -> None:
    if len(messages) % 2:
        raise InputError(
            "messages",
            f"message {len(messages) + first - 1}, the last, must be from assistant: put the "
            "user's next turn into question",
        )


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            name,
            f"invalid Unicode (a lone surrogate) at position {error.start}; send well-formed text",
        ) from error


def _check_image_count(users: Sequence[str], images: int) -> None:
    places = sum(user.count(IMAGE) for user in users)
    if places != images:
        raise InputError(
            "images",
            f"{images} given, but {places} {IMAGE} in question and user messages; "
            "the numbers must match",
        )
