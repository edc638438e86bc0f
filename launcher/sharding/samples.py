"""Records -> samples: token ids, and which of them are to be learned.

A sample is a list of segments of text, some of them learned. Its ids are those of the whole text where
the ids of its beginning are a beginning of them, so that prompting with the beginning later gives the
ids that were trained on; else the segments are tokenised one by one.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.sharding import messages as chats
from launcher.sharding import unseen
from launcher.sharding.problems import Where
from launcher.sharding.records import TOOLS, Document, text_of
from launcher.sharding.tokenize import Encoder
from llmtrain import prompts
from llmtrain.config import data_sections as schema
from llmtrain.errors import SourceError, TokenizerError

RULES = 4
"""Raise it whenever this module, messages.py, readers.py, records.py or tasks.py cuts, masks or counts differently:
what an older version has tokenised of an unfinished build is not used then."""

TOO_LONG, COMPLETION_TOO_LONG = "longer than model.context", "completion longer than model.context"
"""Reasons to leave a sample out."""


class NotUsable(Exception):
    """A sample that is left out and counted; the text is the reason."""


@dataclass(frozen=True)
class Segment:
    text: str
    learned: bool
    ends: bool = False
    """An end-of-text token follows, learned as it is."""
    never: bool = False
    """Not learned even where prompts are."""


@dataclass(frozen=True)
class Sample:
    ids: NDArray[np.uint32]
    learned: NDArray[np.uint8]
    learned_bytes: int
    """UTF-8 bytes of the learned text; a special token stands for none, whatever its name."""
    cut: bool
    """Whether the prompt's beginning is missing."""


@dataclass(frozen=True)
class _Piece:
    """What became of a segment."""

    segment: Segment
    ids: NDArray[np.uint32]
    text: str
    """What was tokenised at once: this segment, and perhaps earlier ones before it."""
    ids_before: int
    """Ids of the earlier ones."""


class SampleMaker:
    """Turns records into samples, with the tokenizer of a folder."""

    def __init__(self, format: schema.Format, encoder: Encoder, tokenizer: Path, limit: int, noted: Counter[str]):
        """Args:
        limit: the longest sample, in tokens.
        noted: gets what a chat template leaves out (unseen.py).
        """
        self._format, self._encoder, self._limit = format, encoder, limit
        self._chat = Chat(format, tokenizer, encoder, noted) if isinstance(format, schema.ChatFormat) else None

    def make(self, document: Document) -> Sample:
        """Raises SourceError for a record without what it needs, NotUsable for one to be counted and left out."""
        record, where = document.record, document.where
        assert record is not None
        assert not isinstance(self._format, schema.TextFormat)
        if self._chat is not None:
            segments = self._chat.segments(record, where)
        else:
            segments = [*_prompt_and_completion(self._format, record, where)]
        own = self._encoder.prefix_ids
        added = [] if self._chat is not None and self._chat.template.writes_prefix else own
        pieces = self._encode(segments)
        ids = np.concatenate([np.array(added, np.uint32), *(piece.ids for piece in pieces)])
        # A template may have written what the tokenizer puts before a text: then it stays as well, and is not learned.
        prefix = len(own) if ids[: len(own)].tolist() == own else len(added)
        too_many = len(ids) - self._limit
        if too_many > 0:
            if self._format.overlong == "skip":
                raise NotUsable(TOO_LONG)
            if prefix + too_many >= len(ids) - len(pieces[-1].ids):
                raise NotUsable(COMPLETION_TOO_LONG)
        gone = prefix - len(added) + too_many if too_many > 0 else 0
        flags, learned_bytes = self._choose_learned(pieces, gone, self._format.completion_only)
        learned = np.concatenate([np.zeros(len(added), np.uint8), *flags])
        learned[:prefix] = 0
        if too_many > 0:
            rest = np.r_[0:prefix, prefix + too_many : len(ids)]
            ids, learned = ids[rest], learned[rest]
        return Sample(ids, learned, learned_bytes, cut=too_many > 0)

    def _encode(self, segments: list[Segment]) -> list[_Piece]:
        encode = self._encoder.encode if self._chat is None else self._encoder.encode_special
        text, ids = "", np.zeros(0, np.uint32)
        pieces: list[_Piece] = []
        for segment in segments:
            joint = encode(text + segment.text)
            if np.array_equal(joint[: len(ids)], ids):
                text, before, ids = text + segment.text, len(ids), joint
            else:
                text, before, ids = segment.text, 0, encode(segment.text)
            new = ids[before:]
            if segment.ends:
                new = np.append(new, np.uint32(self._encoder.eos_id))
            pieces.append(_Piece(segment, new, text, before))
            if segment.ends:
                text, ids = "", np.zeros(0, np.uint32)
        return pieces

    def _choose_learned(
        self, pieces: list[_Piece], gone: int, completion_only: bool
    ) -> tuple[list[NDArray[np.uint8]], int]:
        """A flag for each id, and the bytes of what is learned, where the first `gone` ids will be cut off."""
        flags: list[NDArray[np.uint8]] = []
        learned_bytes, start = 0, 0
        for piece in pieces:
            stop = start + len(piece.ids)
            learned = not piece.segment.never and (piece.segment.learned or not completion_only)
            if piece.segment.learned and gone > 0 and start <= gone < stop:
                learned = False  # nothing of its question is left, and of the answer perhaps only the end
            flags.append(np.full(len(piece.ids), learned, np.uint8))
            if learned and gone < stop:
                learned_bytes += self._count_bytes(piece, max(0, gone - start))
            start = stop
        return flags, learned_bytes

    def _count_bytes(self, piece: _Piece, gone: int) -> int:
        """UTF-8 bytes of a segment's text without its first `gone` ids."""
        text = piece.segment.text
        if gone:
            end = self._encoder.text_end(piece.text, piece.ids_before + gone, special=self._chat is not None)
            text = piece.text[max(end, len(piece.text) - len(text)) :]
        if self._chat is not None:  # elsewhere text that looks like a special token is text
            text = self._chat.special_text.sub("", text)
        return len(text.encode())


def _prompt_and_completion(format: schema.Format, record: dict[str, Any], where: Where) -> Iterator[Segment]:
    match format:
        case schema.CompletionFormat():
            prompt = text_of(record[format.prompt], format.prompt, where)
            completion = text_of(record[format.completion], format.completion, where)
            field = format.completion
        case schema.MarkedFormat():
            field = format.field
            text = text_of(record[field], field, where)
            before, marker, completion = text.rpartition(format.marker)
            if not marker:
                raise SourceError(
                    f"{where()}: '{field}' does not hold the marker {format.marker!r}, after which the completion "
                    "begins"
                )
            prompt = before + marker
        case schema.InstructionFormat():
            instruction = text_of(record[format.instruction], format.instruction, where)
            given = text_of(record.get(format.input), format.input, where)
            prompt = prompts.fill(format.template if given else format.template_without_input, instruction, given)
            completion = text_of(record[format.output], format.output, where)
            field = format.output
        case _:
            raise AssertionError(format)
    if not completion.strip():
        raise SourceError(
            f"{where()}: the completion ('{field}') is empty: there is nothing to learn; remove the record"
        )
    yield Segment(prompt, learned=False)
    yield Segment(completion, learned=True, ends=True)


def _tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that a chat's assistant may call; columns of tables hold them as JSON."""
    tools = record.get(TOOLS)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return None
    return tools if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools) else None


class Chat:
    """A chat template, and what of its text the assistant says."""

    def __init__(self, format: schema.ChatFormat, tokenizer: Path, encoder: Encoder, noted: Counter[str]):
        self._format, self._noted = format, noted
        self._eos = encoder.token(encoder.eos_id)
        own, tokens = prompts.read_own(tokenizer)
        self.template = prompts.chat_template(format, own, {**tokens, "eos_token": self._eos})
        self._special = encoder.special_tokens
        longest_first = sorted(self._special, key=len, reverse=True)  # as a tokenizer finds them
        self.special_text = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def segments(self, record: dict[str, Any], where: Where) -> list[Segment]:
        """What the others say is not learned; what the assistant says is, with its end-of-text token, unless it has
        weight 0. What comes after the last answer that is learned is left out."""
        messages, tools = self._messages(record, where), _tools(record)
        try:
            segments, written = self._split(messages, tools)
            self._note(messages, tools, written)
        except (SourceError, TokenizerError) as error:
            raise type(error)(f"{where()}: {error}") from error
        return segments

    def _split(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[list[Segment], str]:
        """Also all that the template wrote."""
        segments: list[Segment] = []
        done = after = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.template.render(messages[:number], asks=True, tools=tools)
            after = self.template.render(messages[: number + 1], asks=False, tools=tools)
            if not before.startswith(done) or not after.startswith(before):
                raise TokenizerError(
                    "the chat template writes a turn differently once the next one follows, so "
                    "that what is learned is not what is seen later; set data.format.template to one that does not "
                    "(Qwen3's own drops the reasoning of earlier turns: take configs/templates/qwen3.jinja)"
                )
            said, ends = after[len(before) :], False
            if self._eos in said:
                said = said[: said.rindex(self._eos) + len(self._eos)]
            elif self._format.append_eos:
                ends = True
            else:
                raise TokenizerError(
                    f"the chat template ends an assistant's message without the end-of-text token {self._eos}: the "
                    f"model would never learn to stop. It wrote {after[len(before) :][-40:]!r}. Set "
                    "data.format.append_eos=true, or data.format.template to one that writes it"
                )
            if not message["content"].strip() and not said.replace(self._eos, "").strip():
                raise SourceError(
                    f"the assistant says nothing in message {number + 1}, and the chat template makes nothing of its "
                    f"'{chats.CALLS}'; data.format.template takes another template"
                )
            learned = chats.is_learned(message)
            segments += [
                Segment(before[len(done) :], learned=False),
                Segment(said, learned=learned, ends=ends, never=not learned),
            ]
            done = before + said
        return segments, after

    def _note(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, written: str) -> None:
        """Count what the template leaves out of the messages."""
        self._noted[unseen.CONTENT] += not unseen.is_written(messages, written)
        if tools:
            self._noted[unseen.TOOLS] += self._writes(messages, None) == written
        if any(message.get(chats.CALLS) for message in messages):
            without = [{name: each for name, each in m.items() if name != chats.CALLS} for m in messages]
            self._noted[unseen.TOOL_CALLS] += self._writes(without, tools) == written

    def _writes(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str | None:
        try:
            return self.template.render(messages, asks=False, tools=tools)
        except TokenizerError:
            return None

    def _messages(self, record: dict[str, Any], where: Where) -> list[dict[str, Any]]:
        field = self._format.messages
        messages = chats.read(record[field], field, where)
        said = [m for m in messages if m["role"] == "assistant"]
        if not said:
            roles = ", ".join(sorted({m["role"] for m in messages})) or "none"
            raise SourceError(
                f"{where()}: the assistant says nothing: there is nothing to learn. The roles here are: {roles}; write "
                "'assistant' for the one whose messages are to be learned, or remove the record"
            )
        if not all(m["content"].strip() or m.get(chats.CALLS) for m in said):
            raise SourceError(
                f"{where()}: the assistant says nothing in one of its messages: there is nothing to learn; remove the "
                "record"
            )
        for message in messages:
            text_of(message["content"], field, where)
            if any(token in message["content"] for token in self._special):
                raise NotUsable("a special token stands in the text")
        learned = [number for number, message in enumerate(messages) if chats.is_learned(message)]
        if not learned:
            raise SourceError(
                f"{where()}: all that the assistant says has weight 0: there is nothing to learn; remove the record"
            )
        return messages[: learned[-1] + 1]
