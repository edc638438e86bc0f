"""Reads the documents of a unit: raw text, or records whose fields a format turns into samples (samples.py)."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.sharding import messages, readers
from launcher.sharding.problems import Problems, Where, kind_of
from launcher.sharding.readers import Unit, check_fields
from llmtrain.config import data_sections as schema
from llmtrain.errors import EncodingError, SourceError

TOOLS = "tools"
"""The field with the tools that a chat's assistant may call, as data sets and templates name it."""
UNREAD = "unread "
"""Before a field that one may expect to be trained on, as `Found.noted` names it."""
RECORD_ERRORS = (SourceError, EncodingError)
"""What is wrong with a record may be."""


@dataclass(frozen=True)
class Document:
    """What is kept together: a text, or a record."""

    text: str
    """The text; of a record, its fields' texts together: what decides the split."""
    record: dict[str, Any] | None
    where: Where


@dataclass
class Found:
    """What is counted while documents are read: what was left out, and how often there was what may be absent."""

    skipped: Counter[str] = dataclasses.field(default_factory=Counter[str])
    """Documents left out, by reason."""
    cut: int = 0
    """Samples whose prompt lacks its beginning."""
    records: int = 0
    fields: Counter[str] = dataclasses.field(default_factory=Counter[str])
    """Records with something in an optional field, by the field's name: where none has, it may be misspelt."""
    separators: Counter[int] = dataclasses.field(default_factory=Counter[int])
    """By the number of the source."""
    noted: Counter[str] = dataclasses.field(default_factory=Counter[str])
    """Documents of which training sees something else than one may think (unseen.py)."""
    problems: Problems = dataclasses.field(default_factory=Problems)
    """Records that cannot be used, not told yet: who reads to the end of a task tells."""


def wanted_fields(source: schema.Source, format: schema.Format) -> tuple[list[str], list[str]]:
    """(required, optional) fields of a record."""
    match format:
        case schema.TextFormat():
            return ([] if isinstance(source, (schema.StdlibSource, schema.TextSource)) else [source.field]), []
        case schema.CompletionFormat():
            return [format.prompt, format.completion], []
        case schema.MarkedFormat():
            return [format.field], []
        case schema.InstructionFormat():
            return [format.instruction, format.output], [format.input]
        case schema.ChatFormat():
            return [format.messages], [TOOLS]


def _unread_fields(format: schema.Format) -> list[str]:
    """Fields that data sets for other tools have, and that no sample holds."""
    match format:
        case schema.InstructionFormat():
            used = (format.instruction, format.input, format.output)
            return [name for name in ("system", "history") if name not in used]
        case schema.ChatFormat():
            return [name for name in ("system",) if name != format.messages]
        case _:
            return []


def read_documents(source: schema.Source, unit: Unit, format: schema.Format, found: Found) -> Iterator[Document]:
    """The documents of a unit, in order.

    Raises:
        SourceError: the source cannot be read; names file and line. What is wrong with single records (they are broken,
            or lack a field) is in `found.problems`.
        EncodingError: names file and byte.
    """
    for document in _read(source, unit, format, found):
        if document.text:
            yield document
        else:
            found.skipped["empty document"] += 1


def _read(source: schema.Source, unit: Unit, format: schema.Format, found: Found) -> Iterator[Document]:
    required, optional = wanted_fields(source, format)
    unread, problems = _unread_fields(format), found.problems
    match source:
        case schema.StdlibSource():
            if (text := readers.read_text(unit.path, "skip", found.skipped)) is not None:
                yield Document(text, None, lambda: unit.path)
            return
        case schema.TextSource():
            if (text := readers.read_text(unit.path, source.invalid_utf8, found.skipped)) is not None:
                texts = [text] if source.separator is None else text.split(source.separator)
                found.separators[unit.source] += len(texts) - 1
                yield from (Document(text, None, lambda: unit.path) for text in texts)
            return
        case schema.JsonlSource():
            records = readers.read_jsonl(unit, problems)
        case schema.JsonSource():
            records = readers.read_json(unit.path, problems)
        case schema.CsvSource():
            records = readers.read_csv(unit.path, required, problems)
        case schema.ParquetSource():
            records = readers.read_parquet(unit, required, [*optional, *unread])
        case schema.HuggingFaceSource():
            records = readers.read_dataset(unit, source, [*required, *optional, *unread])
    for record, where in records:
        try:
            check_fields(required, list(record), where)
            document = _document(source, format, record, where)
        except RECORD_ERRORS as error:
            problems.add(error, where)
            continue
        found.records += 1
        found.fields.update(name for name in optional if record.get(name))
        found.noted.update(UNREAD + name for name in unread if record.get(name))
        yield document


def _document(source: schema.Source, format: schema.Format, record: dict[str, Any], where: Where) -> Document:
    required, optional = wanted_fields(source, format)
    if isinstance(format, schema.TextFormat):
        return Document(text_of(record[required[0]], required[0], where), None, where)
    is_chat = isinstance(format, schema.ChatFormat)
    values = [record.get(name) for name in (required if is_chat else (*required, *optional))]
    text = "\n".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values)
    from_arrow = is_chat and isinstance(source, (schema.ParquetSource, schema.HuggingFaceSource))
    kept = {name: _without_nothing(value) for name, value in record.items()} if from_arrow else record
    return Document(text_of(text, required[0], where), kept, where)


def _without_nothing(value: Any) -> Any:
    """Without the keys that Arrow fills in because another record has them."""
    if isinstance(value, dict):
        return {key: _without_nothing(each) for key, each in value.items() if each is not None}
    return [_without_nothing(each) for each in value] if isinstance(value, list) else value


def text_of(value: Any, field: str, where: Where) -> str:
    """The text in a field; nothing counts as empty.

    Raises:
        SourceError: it is no text.
        EncodingError: it cannot be written as UTF-8.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        hint = messages.hint_at_messages(value)
        raise SourceError(f"{where()}: '{field}' holds {kind_of(value)}, not text{hint}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write half a surrogate pair, UTF-8 cannot
            raise EncodingError(f"{where()}: '{field}' holds half a character: {error.reason}") from None
    return value
