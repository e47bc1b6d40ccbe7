"""Turns and examples -> a `Prompt`: token ids, and where in them each image goes.

Two styles, as the models were trained: a chat for the instruct models, few-shot examples for the
base models. The template's own marks are the only special tokens of a prompt. Whatever a person
wrote - the question, the system prompt, earlier turns - is text, also where it spells a special
token, so nobody can forge a turn. The one exception is `<image>` in a question or an earlier user
message, which places an image.

Pure: knows ids and counts, nothing of pixels or models.
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
    """An earlier turn, or half of a few-shot example."""

    role: Role
    content: str


@dataclass(frozen=True)
class Prompt:
    """`ids` with, for each image, the run of them that its vision tokens replace.

    `spans` holds (start, length) of each run, in the order of the images. The length is 1 in a
    chat and the number of latents in a few-shot prompt.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def parse_messages(raw: Sequence[Any]) -> tuple[Message, ...]:
    """Earlier turns as a client sends them, `{"role": ..., "content": ...}`, checked.

    Raises InputError("messages", ...), which names the message by its number from 1.
    """
    messages = []
    for number, item in enumerate(raw, start=1):
        if not isinstance(item, dict):
            kind = type(item).__name__
            raise InputError("messages", f"number {number} must be an object, not {kind}")
        if item.keys() != {"role", "content"}:
            keys = ", ".join(map(str, item)) or "nothing"
            raise InputError("messages", f"number {number} must have role and content, not {keys}")
        if not isinstance(item["content"], str):
            kind = type(item["content"]).__name__
            raise InputError("messages", f"the content of number {number} must be text, not {kind}")
        messages.append(Message(item["role"], item["content"]))
    _check_turns(messages)
    return tuple(messages)


def request_prompt(
    tokens: Tokenizer,
    config: XGenMMConfig,
    question: str,
    *,
    images: int,
    system_prompt: str | None = None,
    messages: Sequence[Message] = (),
) -> Prompt:
    """The prompt in the style of the checkpoint: `chat_prompt` or `few_shot_prompt`.

    Few-shot prompts have no system prompt. Raises InputError as those do.
    """
    if config.text.prompt == "few_shot":
        latents = config.resampler.num_latents
        return few_shot_prompt(
            tokens, question, images=images, num_latents=latents, messages=messages
        )
    return chat_prompt(
        tokens, question, images=images, system_prompt=system_prompt, messages=messages
    )


def chat_prompt(
    tokens: Tokenizer,
    question: str,
    *,
    images: int,
    system_prompt: str | None = None,
    messages: Sequence[Message] = (),
) -> Prompt:
    """The prompt of an instruct model, up to where its answer begins.

    `system_prompt` None is `DEFAULT_SYSTEM_PROMPT`, "" leaves the system turn out. `messages` are
    the earlier turns: user, assistant, user, assistant, ... `<image>` in the question and in user
    messages places the images, in order; without any, all go first in the first user turn, each
    on a line of its own. Raises InputError for turns in the wrong order, text that is not valid
    Unicode, and a number of images that is not the number of `<image>`.
    """
    system = DEFAULT_SYSTEM_PROMPT if system_prompt is None else system_prompt
    _check_turns(messages)
    _check_text("system_prompt", system)
    _check_text("question", question)

    users = [m.content for m in messages if m.role == "user"] + [question]
    answers = [m.content for m in messages if m.role == "assistant"]
    if not any(IMAGE in user for user in users):
        users[0] = f"{IMAGE}\n" * images + users[0]
    _check_count(users, images)

    pieces: list[Segment] = [SYSTEM, "\n", system, END, "\n"] if system else []
    for i, user in enumerate(users):
        pieces += [USER, "\n", *_with_images(user, [IMAGE]), END, "\n", ASSISTANT, "\n"]
        if i < len(answers):
            pieces += [answers[i], END, "\n"]
    return _prompt(tokens, pieces, run=1)


def few_shot_prompt(
    tokens: Tokenizer,
    question: str,
    *,
    images: int,
    num_latents: int,
    messages: Sequence[Message] = (),
) -> Prompt:
    """The prompt of a base model: examples, then the question, for it to continue.

    `messages` are the examples, a user message and the assistant's answer each. `<image>` in the
    question and in user messages places the images, in order. Without any, there is one for each
    example and one for the question, or without examples all go in front of the question. Raises
    InputError as `chat_prompt` does.
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
    _check_count(users, images)

    run = [IMAGE] + [IMAGE_PLACEHOLDER] * (num_latents - 1)
    pieces: list[Segment] = []
    for user, answer in zip(users, answers, strict=False):
        pieces += [*_with_images(user, run), answer, END_OF_CHUNK]
    pieces += _with_images(users[-1], run)
    return _prompt(tokens, pieces, run=num_latents)


def _prompt(tokens: Tokenizer, pieces: Sequence[Segment], run: int) -> Prompt:
    ids = tuple(tokens.encode_segments(pieces))
    image = tokens.id(IMAGE)
    return Prompt(ids, tuple((start, run) for start, id in enumerate(ids) if id == image))


def _with_images(text: str, run: Sequence[Segment]) -> list[Segment]:
    """The text in pieces, each `<image>` in it replaced by `run`."""
    first, *rest = text.split(IMAGE)
    pieces: list[Segment] = [first]
    for part in rest:
        pieces += [*run, part]
    return pieces


def _check_turns(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, start=1):
        role: str = message.role
        if role == "system":
            raise InputError(
                "messages", f"number {number} has the role system: give that text as system_prompt"
            )
        if role not in get_args(Role):
            raise InputError(
                "messages", f"number {number} has the role {role!r}, not user or assistant"
            )
        expected = "user" if number % 2 else "assistant"
        if role != expected:
            raise InputError(
                "messages",
                f"number {number} must be from {expected}, not {role}: turns alternate, "
                "starting with user",
            )
        _check_text("messages", message.content)
    if len(messages) % 2:
        raise InputError(
            "messages",
            f"number {len(messages)}, the last, must be from assistant: what the user asks next "
            "is the question",
        )


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            name, f"half a character (a lone surrogate) at position {error.start}"
        ) from error


def _check_count(users: Sequence[str], images: int) -> None:
    places = sum(user.count(IMAGE) for user in users)
    if places != images:
        raise InputError(
            "images", f"{images} given, but {places} {IMAGE} in the question and user messages"
        )
