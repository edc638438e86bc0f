"""The kinds of files: reads the text, or the records, of one piece of a source."""

import codecs
import functools
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.sharding.problems import Problems, Where, kind_of
from llmtrain.config import data_sections as schema
from llmtrain.errors import EncodingError, SourceError

_MARK = "\ufeff"
"""Some programs begin a file of UTF-8 with it; it is no part of the text."""
_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # first, because one of them begins like one of the next
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_LOOK_AT = 65_536
_CHATS = ("messages", "conversations", "conversation")
"""What data sets call the field of a chat's messages."""


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


def check_fields(fields: list[str], there: list[str], where: Where) -> None:
    """Raises SourceError if a field is not there."""
    for field in fields:
        if field not in there:
            raise SourceError(f"{where()}: no field '{field}'; there are: {', '.join(there)}. {_meant(field, there)}")


def _meant(field: str, there: list[str]) -> str:
    if field in _CHATS and (others := [name for name in _CHATS if name in there]):
        return f"Set data.format.messages={others[0]}"
    return "Set 'field' of this source, or the names in data.format"


def read_text(path: str, invalid_utf8: str, skipped: Counter[str]) -> str | None:
    content = Path(path).read_bytes()
    if b"\0" in content and _is_binary(path, content):  # token ids may be valid UTF-8, and would be trained on
        if invalid_utf8 == "skip":
            skipped["not text"] += 1
            return None
        raise _not_utf8(path, 0, is_binary=True)
    try:
        text = content.decode("utf-8", "replace" if invalid_utf8 == "replace" else "strict")
    except UnicodeDecodeError as error:
        if invalid_utf8 == "skip":
            skipped["invalid UTF-8"] += 1
            return None
        raise _not_utf8(path, error.start, "set invalid_utf8: replace (or skip) on this text source") from None
    return text.removeprefix(_MARK).replace("\r\n", "\n")


def _is_binary(path: str, content: bytes) -> bool:
    return Path(path).suffix in (".bin", ".npy") or content.count(0) > len(content) / 100


def _not_utf8(path: str, offset: int, instead: str = "", is_binary: bool = False) -> EncodingError:
    with Path(path).open("rb") as file:
        before = file.read(max(offset, _LOOK_AT))
    where = f"{path}: not valid UTF-8 at byte {offset}"
    for encoding, marks in _MARKS.items():
        if before.startswith(marks):
            return EncodingError(
                f"{where}: it is {encoding.upper()}; convert the file (iconv -f {encoding} -t utf-8 OLD > NEW)"
            )
    if is_binary or _is_binary(path, before):
        return EncodingError(
            f"{path}: not text. A .bin file of nanoGPT holds token ids, not text: give the text that it was made from, "
            "or decode it (enc.decode(np.fromfile(FILE, np.uint16)), with the tokenizer that made it). UTF-16 without "
            "a mark at its beginning looks like this, too (iconv -f utf-16le -t utf-8 OLD > NEW)"
        )
    instead = instead or "where it is UTF-8 but for a few bytes, drop those (iconv -c -f utf-8 -t utf-8 OLD > NEW)"
    return EncodingError(
        f"{where}, in line {before[:offset].count(10) + 1}; convert the file (iconv -f latin1 -t utf-8 OLD > NEW), or "
        f"{instead}"
    )


def read_jsonl(unit: Unit, problems: Problems) -> Iterator[tuple[dict[str, Any], Where]]:
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
                problem = f"not JSON: {error.msg} ({_kind_hint(unit.path)})"
                if offset == 0:  # then it is mostly a file of another kind, and so are all of its lines
                    raise SourceError(f"{where()}: {problem}") from None
                problems.note(problem, where)
                continue
            except (ValueError, RecursionError) as error:
                problems.note(_why_unreadable(error), where)
                continue
            if isinstance(record, dict):
                yield record, where
            else:
                a_list = f" ({_kind_hint(unit.path)})" if isinstance(record, list) else ""
                problems.note(f"must be a JSON object, not {kind_of(record)}{a_list}", where)


def _why_unreadable(error: ValueError | RecursionError) -> str:
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


def read_json(path: str, problems: Problems) -> Iterator[tuple[dict[str, Any], Where]]:
    content = Path(path).read_bytes()
    try:
        records = json.loads(content.decode("utf-8").removeprefix(_MARK))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.start) from None
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}:{error.lineno}: not JSON: {error.msg} (one object a line is kind: jsonl)") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: {_why_unreadable(error)}") from None
    if not isinstance(records, list):
        raise SourceError(f"{path}: must be a list of JSON objects, not {kind_of(records)}")
    for number, record in enumerate(records):
        where = functools.partial("{}: record {}".format, path, number)
        if isinstance(record, dict):
            yield record, where
        else:
            problems.note(f"must be a JSON object, not {kind_of(record)}", where)


def read_csv(path: str, required: list[str], problems: Problems) -> Iterator[tuple[dict[str, Any], Where]]:
    import csv

    csv.field_size_limit(1 << 30)
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            check_fields(required, list(reader.fieldnames or []), lambda: path)
            for record in reader:
                where = functools.partial("{}:{}".format, path, reader.line_num)
                if None in record:  # an unquoted comma in the text would cut it off in silence
                    problems.note("more fields than the header has; quote the text", where)
                elif missing := [field for field in required if record[field] is None]:
                    problems.note(f"the row ends before its '{missing[0]}'", where)
                else:
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


def read_parquet(unit: Unit, required: list[str], optional: list[str]) -> Iterator[tuple[dict[str, Any], Where]]:
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
        said = f"the data set '{source.name}' cannot be loaded: {type(error).__name__}: {error}"
        raise SourceError(said + _saved_hint(source.name)) from error


def _saved_hint(name: str) -> str:
    """How to read a folder that `save_to_disk` has written, which `load_dataset` does not."""
    folder = Path(name)
    found = [file.parent for file in folder.glob("**/*.arrow")] if folder.is_dir() else []
    if not found:
        return ""
    data_files = f"['{min(found)}/*.arrow']"
    return f". What save_to_disk wrote is read with {{kind: huggingface, name: arrow, data_files: {data_files}}}"


def read_dataset(
    unit: Unit, source: schema.HuggingFaceSource, fields: list[str]
) -> Iterator[tuple[dict[str, Any], Where]]:
    dataset = load_dataset(source)
    rows = dataset.select_columns([name for name in fields if name in dataset.column_names])
    for number, record in enumerate(rows.select(range(unit.start, unit.stop)), start=unit.start):
        yield record, functools.partial("{}: row {}".format, source.name, number)
