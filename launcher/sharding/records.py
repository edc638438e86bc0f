"""Reads the documents of a unit: raw text, or records whose fields a format turns into samples (samples.py)."""

import functools
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config import data_sections as schema
from llmtrain.errors import EncodingError, SourceError

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
            return [format.messages], []


def read_documents(
    source: schema.Source, unit: Unit, format: schema.Format, skipped: Counter[str]
) -> Iterator[Document]:
    """The documents of a unit, in order. What is left out is counted in `skipped`, by reason.

    Raises:
        SourceError: a record is broken or lacks a field; names file and line.
        EncodingError: names file and byte.
    """
    for document in _read(source, unit, format, skipped):
        if document.text:
            yield document
        else:
            skipped["empty document"] += 1


def _read(source: schema.Source, unit: Unit, format: schema.Format, skipped: Counter[str]) -> Iterator[Document]:
    required, optional = wanted_fields(source, format)
    match source:
        case schema.StdlibSource():
            yield from _read_text(unit.path, "skip", None, skipped)
            return
        case schema.TextSource():
            yield from _read_text(unit.path, source.invalid_utf8, source.separator, skipped)
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
        if isinstance(format, schema.TextFormat):
            yield Document(text_of(record[required[0]], required[0], where), None, where)
        else:
            values = [record.get(name) for name in (*required, *optional)]
            text = "\n".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values)
            yield Document(text_of(text, required[0], where), record, where)


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


def _read_text(path: str, invalid_utf8: str, separator: str | None, skipped: Counter[str]) -> Iterator[Document]:
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8", "replace" if invalid_utf8 == "replace" else "strict")
    except UnicodeDecodeError as error:
        if invalid_utf8 == "skip":
            skipped["invalid UTF-8"] += 1
            return
        raise _not_utf8(path, error.start) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    for document in [text] if separator is None else text.split(separator):
        yield Document(document, None, lambda: path)


def _not_utf8(path: str, offset: int) -> EncodingError:
    return EncodingError(
        f"{path}: not valid UTF-8 at byte {offset}; convert the file (iconv -f latin1 -t utf-8), or set "
        "invalid_utf8: replace (or skip) on this text source"
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
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise _not_utf8(unit.path, offset + error.start) from None
            except json.JSONDecodeError as error:
                raise SourceError(f"{where()}: not JSON: {error.msg}") from None
            if not isinstance(record, dict):
                raise SourceError(f"{where()}: must be a JSON object, not a {type(record).__name__}")
            yield record, where


def _line(path: str, offset: int) -> str:
    with Path(path).open("rb") as file:
        before = file.read(offset)
    return f"{path}:{before.count(bytes([10])) + 1}"


def _read_json(path: str) -> Iterator[tuple[dict[str, Any], Where]]:
    content = Path(path).read_bytes()
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.start) from None
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}:{error.lineno}: not JSON: {error.msg} (one object a line is kind: jsonl)") from None
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
