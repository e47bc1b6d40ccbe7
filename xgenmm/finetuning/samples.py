"""One record of a data file, in one of two formats -> a sample, or what is wrong with the record.

* `messages`, a list of `role` and `content`, with `images`, a list, as in ms-swift and
  LLaMA-Factory; `content` may also be a list of parts as in OpenAI's API.
* LLaVA's `conversations`, a list of `from` and `value`, with `image`, a path or a list of paths.

The keys tell which it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xgenmm.errors import printable
from xgenmm.finetuning.conversation import Turn, with_system_turn
from xgenmm.preprocessing.prompts import IMAGE

MAX_IMAGES = 4
"""Of a sample; the authors' limit."""

LLAVA_ROLES = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
}
ROLES = ("system", "user", "assistant")
EXAMPLE = (
    '{"messages": [{"role": "user", "content": "<image>What is it?"}, '
    '{"role": "assistant", "content": "A mill."}], "images": ["mill.jpg"]}'
)


@dataclass
class Sample:
    """A conversation with its images, and everything that is wrong with it.

    Attributes:
        images: paths, URLs or data URLs, one for each `<image>` in order.
        faults: each says what is wrong and what would be right. A sample with faults is not
            trained on; its turns are those that could be read.
    """

    turns: tuple[Turn, ...] = ()
    images: tuple[str, ...] = ()
    faults: list[str] = field(default_factory=list)


def parse_sample(record: object, max_images: int = MAX_IMAGES) -> Sample:
    """Read a record of either format."""
    if not isinstance(record, dict):
        return Sample(faults=[f"must be an object such as {EXAMPLE}, not {_kind(record)}"])
    formats = [key for key in ("messages", "conversations") if key in record]
    if len(formats) != 1:
        found = "both messages and conversations" if formats else _keys(record)
        problem = f"must have messages (with images) or conversations (with image), not {found}"
        return Sample(faults=[problem])
    sample = _parse_messages(record) if formats == ["messages"] else _parse_llava(record)
    sample.turns = with_system_turn(sample.turns)
    if not sample.faults:
        sample.faults += _check_turns(sample.turns)
        sample.faults += _check_images(sample, max_images)
    return sample


def _parse_llava(record: Mapping[str, Any]) -> Sample:
    sample = Sample()
    image = record.get("image", [])
    sources = [image] if isinstance(image, str) else image
    sample.images = _strings(sources, "image", "a path or a list of paths", sample.faults)
    if "images" in record:
        sample.faults.append("has conversations, so its key must be image, not images")
    turns, is_human = list[Turn](), list[bool]()
    for number, item in _objects(record["conversations"], "conversations", sample.faults):
        if not {"from", "value"} <= item.keys():
            hint = "; rename conversations to messages and image to images"
            hint *= {"role", "content"} <= item.keys()
            problem = f"turn {number} must have from and value, not {_keys(item)}"
            sample.faults.append(problem + hint)
        elif not isinstance(item["value"], str):
            problem = f"the value of turn {number} must be text, not {_kind(item['value'])}"
            sample.faults.append(problem)
        elif item["from"] not in LLAVA_ROLES:
            name = printable(repr(item["from"]))
            sample.faults.append(f"turn {number} is from {name}; use human, gpt or system")
        else:
            turns.append(Turn(LLAVA_ROLES[item["from"]], item["value"]))
            is_human.append(item["from"] == "human")
    if len(sample.images) == 1 and any(is_human):
        first = is_human.index(True)
        turns[first] = Turn("user", _one_marker(turns[first].text))
    sample.turns = tuple(turns)
    return sample


def _one_marker(text: str) -> str:
    """Make a question about one image have one `<image>`: as LLaVA does, in front of it."""
    if text.count(IMAGE) == 1:
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}"


def _parse_messages(record: Mapping[str, Any]) -> Sample:
    sample = Sample()
    listed_images = record.get("images", [])
    images = list(_strings(listed_images, "images", "a list of paths or URLs", sample.faults))
    if "image" in record:
        sample.faults.append("has messages, so its key must be images (a list), not image")
    turns, used, placed = list[Turn](), 0, list[str]()
    for number, item in _objects(record["messages"], "messages", sample.faults):
        if not {"role", "content"} <= item.keys():
            problem = f"message {number} must have role and content, not {_keys(item)}"
            sample.faults.append(problem)
            continue
        if item["role"] not in ROLES:
            name = printable(repr(item["role"]))
            sample.faults.append(f"message {number} has the role {name}, not {', '.join(ROLES)}")
            continue
        text, own = _content(item["content"], number, sample.faults)
        for source in own:  # None: the next of `images`
            if source is not None:
                placed.append(source)
            elif used < len(images):  # if there are too few, `_check_images` says so
                placed.append(images[used])
                used += 1
        turns.append(Turn(item["role"], text))
    placed += images[used:]
    first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
    if first is not None and not any(IMAGE in turn.text for turn in turns):
        turns[first] = Turn("user", f"{IMAGE}\n" * len(placed) + turns[first].text)
    sample.turns, sample.images = tuple(turns), tuple(placed)
    return sample


def _content(content: object, number: int, faults: list[str]) -> tuple[str, list[str | None]]:
    """Return a message's text with `<image>` in place of images, and where each image is."""
    if isinstance(content, str):
        return content, [None] * content.count(IMAGE)
    text, images = "", list[str | None]()
    for item in content if isinstance(content, list) else [content]:
        part: Mapping[str, Any] = item if isinstance(item, dict) else {}
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
            images += [None] * part["text"].count(IMAGE)
        elif kind in ("image", "image_url"):
            text += IMAGE
            images.append(_part_source(part))
        else:
            shown = printable(repr(item), 60)
            problem = f"the content of message {number} must be text, or a list of parts of the "
            faults.append(f"{problem}type text, image or image_url, not {shown}")
    return text, images


def _part_source(part: Mapping[str, Any]) -> str | None:
    """Where the image of a part is; None if it has no place of its own."""
    for key in ("image_url", "image", "path", "url"):
        value = part.get(key)
        value = value.get("url") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return None


def _check_turns(turns: Sequence[Turn]) -> list[str]:
    faults = []
    for number, turn in enumerate(turns):
        if turn.role == "system" and number:
            faults.append(f"turn {number} is a system prompt; it must be the first")
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:
            faults.append(
                f"a text of {turn.role} is not valid Unicode at position {error.start}; remove "
                "the lone surrogate there"
            )
    if not any(turn.role == "assistant" for turn in turns):
        faults.append("has no answer, so there is nothing to learn; add a turn of the assistant")
    return faults


def _check_images(sample: Sample, max_images: int) -> list[str]:
    faults = []
    markers = sum(turn.text.count(IMAGE) for turn in sample.turns)
    misplaced = sum(turn.text.count(IMAGE) for turn in sample.turns if turn.role != "user")
    if misplaced:
        faults.append(f"has {IMAGE} outside of the user's turns; images belong in questions")
    elif markers != len(sample.images):
        faults.append(
            f"has {_count(len(sample.images), 'image')}, but {markers} {IMAGE}; each {IMAGE} must "
            "stand for one image"
        )
    if len(sample.images) > max_images:
        faults.append(f"has {len(sample.images)} images, more than {max_images}; use fewer")
    return faults


def _objects(value: object, name: str, faults: list[str]) -> "list[tuple[int, Mapping[str, Any]]]":
    """Return the objects of a list with their numbers from 1."""
    if not isinstance(value, list) or not value:
        faults.append(f"{name} must be a list of turns, not {_kind(value) if value else 'empty'}")
        return []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            faults.append(f"turn {number} of {name} must be an object, not {_kind(item)}")
    return [(number, item) for number, item in enumerate(value, 1) if isinstance(item, dict)]


def _strings(value: object, name: str, right: str, faults: list[str]) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        faults.append(f"{name} must be {right}, not {printable(repr(value), 60)}")
        return ()
    return tuple(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(printable(key, 40) for key in record) or "nothing"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
