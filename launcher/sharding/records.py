"""Reads the documents of a unit: raw text, or records whose fields a format turns into samples (samples.py)."""

import codecs
import dataclasses
import functools
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config import data_sections as schema
from llmtrain.errors import EncodingError, SourceError

_MARK = "\ufeff"
"""Some programs begin a file of UTF-8 with it; it is no part of the text."""
_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # first, because one of them begins like one of the next
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}

TOOLS = "tools"
"""The field with the tools that a chat's assistant may call, as data sets and templates name it."""

Where = Callable[[], str]
"""Says where a record stands, for error messages; a function, because counting lines takes time."""


@dataclass(frozen=True)
class Unit:
    """A piece of source number `source`. What `start` and `stop` count depends on the kind."""

    source: int
    path: str
    start: int
    stop: int
    size_bytes: int
    stamp: str
    """Size and modification time: work done on an older file is not used again."""


@dataclass(frozen=True)
class Document:
    """What is kept together: a text, or a record."""

    text: str
    """The text; of a record, its fields' texts together: what decides the split."""
    record: dict[str, Any] | None
    where: Where


@dataclass
class Found:
    """How often there was what may be absent: where it never was, its name may be misspelt."""

    records: int = 0
    fields: Counter[str] = dataclasses.field(default_factory=Counter[str])
    """Records with something in an optional field, by the field's name."""
    separators: Counter[int] = dataclasses.field(default_factory=Counter[int])
    """By the number of the source."""
    noted: Counter[str] = dataclasses.field(default_factory=Counter[str])
    """Documents of which training sees something else than one may think (unseen.py)."""


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


def read_documents(
    source: schema.Source, unit: Unit, format: schema.Format, skipped: Counter[str], found: Found | None = None
) -> Iterator[Document]:
    """The documents of a unit, in order. What is left out is counted in `skipped`, by reason.

    Raises:
        SourceError: a record is broken or lacks a field; names file and line.
        EncodingError: names file and byte.
    """
    for document in _read(source, unit, format, skipped, Found() if found is None else found):
        if document.text:
            yield document
        else:
            skipped["empty document"] += 1


def _read(
    source: schema.Source, unit: Unit, format: schema.Format, skipped: Counter[str], found: Found
) -> Iterator[Document]:
    required, optional = wanted_fields(source, format)
    match source:
        case schema.StdlibSource():
            if (text := _read_text(unit.path, "skip", skipped)) is not None:
                yield Document(text, None, lambda: unit.path)
            return
        case schema.TextSource():
            if (text := _read_text(unit.path, source.invalid_utf8, skipped)) is not None:
                texts = [text] if source.separator is None else text.split(source.separator)
                found.separators[unit.source] += len(texts) - 1
                yield from (Document(text, None, lambda: unit.path) for text in texts)
            return
        case schema.JsonlSource():
            records = _read_jsonl(unit)
        case schema.JsonSource():
            records = _read_json(unit.path)
        case schema.CsvSource():
            records = _read_csv(unit.path, required)
        case schema.ParquetSource():
            records = _read_parquet(unit, required, optional)
        case schema.HuggingFaceSource():
            records = _read_dataset(unit, source, [*required, *optional])
    for record, where in records:
        check_fields(required, list(record), where)
        found.records += 1
        found.fields.update(name for name in optional if record.get(name))
        if isinstance(format, schema.TextFormat):
            yield Document(text_of(record[required[0]], required[0], where), None, where)
        else:
            is_chat = isinstance(format, schema.ChatFormat)
            values = [record.get(name) for name in (required if is_chat else (*required, *optional))]
            text = "\n".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values)
            from_arrow = is_chat and isinstance(source, (schema.ParquetSource, schema.HuggingFaceSource))
            kept = {name: _without_nothing(value) for name, value in record.items()} if from_arrow else record
            yield Document(text_of(text, required[0], where), kept, where)


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
        raise SourceError(f"{where()}: '{field}' holds a {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write half a surrogate pair, UTF-8 cannot
            raise EncodingError(f"{where()}: '{field}' holds half a character: {error.reason}") from None
    return value


def check_fields(fields: list[str], there: list[str], where: Where) -> None:
    """Raises SourceError if a field is not there."""
    for field in fields:
        if field not in there:
            raise SourceError(
                f"{where()}: no field '{field}'; there are: {', '.join(there)}. Set 'field' of this source, or the "
                "names in data.format"
            )


def _read_text(path: str, invalid_utf8: str, skipped: Counter[str]) -> str | None:
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8", "replace" if invalid_utf8 == "replace" else "strict")
    except UnicodeDecodeError as error:
        if invalid_utf8 == "skip":
            skipped["invalid UTF-8"] += 1
            return None
        raise _not_utf8(path, error.start, "set invalid_utf8: replace (or skip) on this text source") from None
    return text.removeprefix(_MARK).replace("\r\n", "\n")


def _not_utf8(path: str, offset: int, instead: str = "") -> EncodingError:
    with Path(path).open("rb") as file:
        before = file.read(max(offset, 4))
    where = f"{path}: not valid UTF-8 at byte {offset}"
    for encoding, marks in _MARKS.items():
        if before.startswith(marks):
            return EncodingError(
                f"{where}: it is {encoding.upper()}; convert the file (iconv -f {encoding} -t utf-8 OLD > NEW)"
            )
    instead = instead or "where it is UTF-8 but for a few bytes, drop those (iconv -c -f utf-8 -t utf-8 OLD > NEW)"
    return EncodingError(
        f"{where}, in line {before[:offset].count(10) + 1}; convert the file (iconv -f latin1 -t utf-8 OLD > NEW), or "
        f"{instead}"
    )


def _read_jsonl(unit: Unit) -> Iterator[tuple[dict[str, Any], Where]]:
    """Lines that begin within [start, stop); the last may end beyond it."""
    with Path(unit.path).open("rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()  # the line that begins before this unit belongs to the one before
        while (offset := file.tell()) < unit.stop and (line := file.readline()):
            if not line.strip():
                continue
            where = functools.partial(_line, unit.path, offset)
            try:
                text = line.decode("utf-8")
                record = json.loads(text.removeprefix(_MARK) if offset == 0 else text)
            except UnicodeDecodeError as error:
                raise _not_utf8(unit.path, offset + error.start) from None
            except json.JSONDecodeError as error:
                raise SourceError(f"{where()}: not JSON: {error.msg} ({_kind_hint(unit.path)})") from None
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{where()}: {_told_unreadable(error)}") from None
            if not isinstance(record, dict):
                a_list = f" ({_kind_hint(unit.path)})" if isinstance(record, list) else ""
                raise SourceError(f"{where()}: must be a JSON object, not a {type(record).__name__}{a_list}")
            yield record, where


def _told_unreadable(error: ValueError | RecursionError) -> str:
    """Of what is JSON, but not for Python."""
    if isinstance(error, RecursionError):
        return "lists or objects nested too deeply to be read; remove the record, or write them as text"
    return f"a number of more than {sys.get_int_max_str_digits():,} digits; write it as text, in quotes"


def _kind_hint(path: str) -> str:
    """What a file that was read as JSON lines may be instead."""
    with Path(path).open("rb") as file:
        start = file.read(1000).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        return "the file begins like one list of objects: that is kind: json"
    return "kind: jsonl takes one whole object a line"


def _line(path: str, offset: int) -> str:
    with Path(path).open("rb") as file:
        before = file.read(offset)
    return f"{path}:{before.count(bytes([10])) + 1}"


def _read_json(path: str) -> Iterator[tuple[dict[str, Any], Where]]:
    content = Path(path).read_bytes()
    try:
        records = json.loads(content.decode("utf-8").removeprefix(_MARK))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.start) from None
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}:{error.lineno}: not JSON: {error.msg} (one object a line is kind: jsonl)") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: {_told_unreadable(error)}") from None
    if not isinstance(records, list):
        raise SourceError(f"{path}: must be a list of JSON objects, not a {type(records).__name__}")
    for number, record in enumerate(records):
        where = functools.partial("{}: record {}".format, path, number)
        if not isinstance(record, dict):
            raise SourceError(f"{where()}: must be a JSON object, not a {type(record).__name__}")
        yield record, where


def _read_csv(path: str, required: list[str]) -> Iterator[tuple[dict[str, Any], Where]]:
    import csv

    csv.field_size_limit(1 << 30)
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            check_fields(required, list(reader.fieldnames or []), lambda: path)
            for record in reader:
                where = functools.partial("{}:{}".format, path, reader.line_num)
                if None in record:  # an unquoted comma in the text would cut it off in silence
                    raise SourceError(f"{where()}: more fields than the header has; quote the text")
                for field in required:
                    if record[field] is None:
                        raise SourceError(f"{where()}: the row ends before its '{field}'")
                yield record, where
        except csv.Error as error:
            raise SourceError(f"{path}:{reader.line_num}: not CSV: {error}") from None
        except UnicodeDecodeError:
            content = Path(path).read_bytes()
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error.start) from None
            raise


def open_parquet(path: str, required: list[str]) -> Any:
    """Raises SourceError if it is no parquet file, or lacks a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: not a parquet file: {error}") from None
    check_fields(required, file.schema_arrow.names, lambda: path)
    return file


def _read_parquet(unit: Unit, required: list[str], optional: list[str]) -> Iterator[tuple[dict[str, Any], Where]]:
    import pyarrow as pa

    file = open_parquet(unit.path, required)
    columns = [*required, *(name for name in optional if name in file.schema_arrow.names)]
    try:
        for group in range(unit.start, unit.stop):
            for number, record in enumerate(file.read_row_group(group, columns).to_pylist()):
                yield record, functools.partial("{}: row group {}, row {}".format, unit.path, group, number)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{unit.path}: row group {unit.start} cannot be read: {error}") from None


@functools.cache
def _load_dataset_once(name: str, config: str | None, split: str, revision: str | None, data_files: Any) -> Any:
    import datasets

    files = list(data_files) if data_files else None
    return datasets.load_dataset(name, config, split=split, revision=revision, data_files=files)


def load_dataset(source: schema.HuggingFaceSource) -> Any:
    """The data set, loaded once a process.

    Raises:
        SourceError: it cannot be had.
    """
    if importlib.util.find_spec("datasets") is None:
        raise SourceError("a huggingface source needs the package datasets: pip install datasets")
    files = tuple(source.data_files) if source.data_files else None
    try:
        return _load_dataset_once(source.name, source.config, source.split, source.revision, files)
    except Exception as error:
        raise SourceError(f"the data set '{source.name}' cannot be loaded: {type(error).__name__}: {error}") from error


def _read_dataset(
    unit: Unit, source: schema.HuggingFaceSource, fields: list[str]
) -> Iterator[tuple[dict[str, Any], Where]]:
    dataset = load_dataset(source)
    rows = dataset.select_columns([name for name in fields if name in dataset.column_names])
    for number, record in enumerate(rows.select(range(unit.start, unit.stop)), start=unit.start):
        yield record, functools.partial("{}: row {}".format, source.name, number)
