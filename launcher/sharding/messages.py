"""A chat's messages: the shapes in which data sets have them, made into one, `role` and `content` as text."""

from collections.abc import Iterator
from typing import Any

from launcher.sharding.problems import Where, kind_of
from llmtrain.errors import SourceError

CALLS = "tool_calls"
_SPEAKERS = {"human": "user", "gpt": "assistant"} | {name: name for name in ("system", "user", "assistant", "tool")}
"""ShareGPT's names for who speaks."""


class _Unfit(Exception):
    """What is wrong with a message, to follow its number."""


def read(value: Any, field: str, where: Where) -> list[dict[str, Any]]:
    """The messages of a field.

    Raises:
        SourceError: it holds something else; says what.
    """
    wanted = f"'{field}' must be a list of messages with 'role' and 'content' as text"
    if not isinstance(value, list):
        raise SourceError(f"{where()}: {wanted}, and is {kind_of(value)}")
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(value, start=1):
        try:
            messages.append(_read_one(message))
        except _Unfit as why:
            raise SourceError(
                f"{where()}: {wanted}: message {number} {why} (docs/finetuning.md says what else is known)"
            ) from None
    return messages


def is_learned(message: dict[str, Any]) -> bool:
    """What the assistant says, unless the record gives it no weight."""
    return message["role"] == "assistant" and message.get("weight") != 0


def hint_at_messages(value: Any) -> str:
    """What to do, where a field that should hold text holds messages."""
    if isinstance(value, list) and value and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in value):
        return (
            ". These are messages: make one list of them all and set data.format.kind=chat (docs/finetuning.md has a "
            "script for it)"
        )
    return ""


def _read_one(message: Any) -> dict[str, Any]:
    """The message itself where it is of our shape."""
    if not isinstance(message, dict):
        raise _Unfit(f"is {kind_of(message)}")
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise _Unfit(f"has no 'role'; it has {_keys(message)}")
    if isinstance(content, list):
        content = "".join(_texts_of_parts(content))
    elif content is None and message.get(CALLS):
        content = ""  # an assistant that only calls tools says nothing beside it
    elif content is None:
        raise _Unfit(f"({role}) has no 'content'; it has {_keys(message)}")
    elif not isinstance(content, str):
        raise _Unfit(f"({role}) has {kind_of(content)} as its 'content'")
    weight = message.get("weight")
    if role == "assistant" and weight is not None and weight not in (0, 1):
        raise _Unfit(f"({role}) has weight {weight!r}; what is known is 0, which is not learned, and 1")
    return message if content is message.get("content") else {**message, "content": content}


def _from_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise _Unfit(f"is from {speaker!r}; known are {', '.join(_SPEAKERS)}")
    if "value" not in message:
        raise _Unfit(f"has no 'value' beside 'from'; it has {_keys(message)}")
    rest = {name: each for name, each in message.items() if name not in ("from", "value")}
    return {"role": _SPEAKERS[speaker], "content": message["value"], **rest}


def _texts_of_parts(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"a part of type {kind!r}" if kind else f"{kind_of(part)} as a part"
            raise _Unfit(f"has {what} in its 'content'; only text is trained on, as {{type: text, text: ...}}")
        yield part["text"]


def _keys(message: dict[str, Any]) -> str:
    return ", ".join(map(repr, message)) or "nothing"
