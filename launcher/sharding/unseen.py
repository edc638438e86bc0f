"""What training sees of a document otherwise than one may think: it is counted, and a build tells of it."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from launcher.sharding.records import UNREAD, Found
from llmtrain.config import data_sections as schema

CONTENT, TOOLS, TOOL_CALLS = "content", "tools", "tool_calls"
"""What a chat template has left out, as `Found.noted` names it."""
_SPECIAL = "special "
"""Before a special token whose text stands in a document."""
_TEMPLATE = "template "
"""Before one whose text stands in the template of instructions."""
_NAMED = 3


class SpecialText:
    """Looks for the text of special tokens, which stays text."""

    def __init__(self, tokens: Sequence[str]):
        alike: dict[str, list[str]] = defaultdict(list)
        for token in filter(None, tokens):
            alike[token[:2]].append(token)
        # Hundreds of tokens begin with "<|": to look for that alone is many times faster than a pattern of them all.
        self._groups = [
            (_common_start(group), re.compile("|".join(map(re.escape, sorted(group, key=len, reverse=True)))))
            for group in alike.values()
        ]

    def find(self, text: str) -> str | None:
        for start, pattern in self._groups:
            if start in text and (found := pattern.search(text)):
                return found.group()
        return None

    def note(self, text: str, noted: Counter[str]) -> None:
        if (token := self.find(text)) is not None:
            noted[_SPECIAL + token] += 1

    def note_template(self, format: schema.Format, noted: Counter[str]) -> None:
        if isinstance(format, schema.InstructionFormat):
            token = self.find(format.template) or self.find(format.template_without_input)
            if token is not None:
                noted[_TEMPLATE + token] += 1


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    length = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def is_written(messages: Sequence[dict[str, Any]], written: str) -> bool:
    """Whether all that is said in a chat stands in what a template wrote of it, perhaps quoted as JSON."""
    return all(
        content in written
        or json.dumps(content)[1:-1] in written
        or json.dumps(content, ensure_ascii=False)[1:-1] in written
        for content in (message["content"].strip() for message in messages)
    )


def describe(found: Found) -> Iterator[str]:
    """Lines for people."""
    noted, of = found.noted, f"of {found.records:,} chats"
    if count := noted[CONTENT]:
        yield (
            f"warning    in {count:,} {of} the template leaves out what a message says, or a part of it (a tool's "
            "answer, reasoning): that is not trained on; data.format.template takes another template"
        )
    for name in (TOOLS, TOOL_CALLS):
        if count := noted[name]:
            yield (
                f"warning    in {count:,} {of} the template makes nothing of '{name}'; data.format.template takes "
                "another template"
            )
    for name in _named(noted, UNREAD):
        yield (
            f"warning    {noted[UNREAD + name]:,} of {found.records:,} records have something in '{name}', which is "
            "not trained on; docs/finetuning.md makes chats of such records"
        )
    if tokens := _named(noted, _TEMPLATE):
        yield (
            f"warning    data.format.template holds the text of a special token ({tokens[0]}): kept as plain text, not "
            "as the token; for chats use data.format.kind=chat"
        )
    if tokens := _named(noted, _SPECIAL):
        count = sum(noted[_SPECIAL + token] for token in tokens)
        names = ", ".join(tokens[:_NAMED]) + (", ..." if len(tokens) > _NAMED else "")
        yield (
            f"warning    {count:,} documents hold the text of a special token ({names}): kept as plain text, not as "
            "the token; for chats use data.format.kind=chat"
        )


def _named(noted: Counter[str], kind: str) -> list[str]:
    """The tokens of a kind of note, the most frequent first."""
    names = sorted((name for name in noted if name.startswith(kind)), key=lambda name: (-noted[name], name))
    return [name.removeprefix(kind) for name in names]
