"""Where text comes from: lists the work, and reads documents.

A `Unit` is a piece of a source that one process can read alone: a file, a byte range of a JSON-lines
file, a row group of a parquet file, a range of rows of a data set. Listing is quick and finds every
missing, empty or unreadable file at once; reading finds what is wrong inside.
"""

import functools
import glob
import importlib.util
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config import schema
from llmtrain.errors import EncodingError, SourceError

UNIT_BYTES = 4_000_000
"""Large sources are cut into units of about this size."""

_FOLDER_SUFFIXES = (".txt", ".md")


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


def list_units(sources: list[schema.Source]) -> list[Unit]:
    """Every piece of every source, in a fixed order.

    Raises:
        SourceError: names all files that are missing, empty or unreadable.
    """
    problems: list[str] = []
    units: list[Unit] = []
    for number, source in enumerate(sources):
        match source:
            case schema.StdlibSource():
                units += [_file_unit(number, path) for path in _stdlib_files() if path.stat().st_size]
            case schema.HuggingFaceSource():
                units += _dataset_units(number, source)
            case _:
                for path in _find_files(source.paths, problems):
                    units += _split_file(number, source, path)
    if problems:
        raise SourceError("the sources cannot be read:\n" + "\n".join(f"  - {p}" for p in problems))
    return units


def read_documents(source: schema.Source, unit: Unit, skipped: Counter[str]) -> Iterator[str]:
    """The documents of a unit, in order. What is left out is counted in `skipped`, by reason.

    Raises:
        SourceError: a record is broken or lacks the field; names file and line.
        EncodingError: names file and byte.
    """
    match source:
        case schema.StdlibSource():
            documents = _read_text(unit.path, "skip", None, skipped)
        case schema.TextSource():
            documents = _read_text(unit.path, source.invalid_utf8, source.separator, skipped)
        case schema.JsonlSource():
            documents = _read_jsonl(unit, source.field)
        case schema.CsvSource():
            documents = _read_csv(unit.path, source.field)
        case schema.ParquetSource():
            documents = _read_parquet(unit, source.field)
        case schema.HuggingFaceSource():
            documents = _read_dataset(unit, source)
    for document in documents:
        if document:
            yield document
        else:
            skipped["empty document"] += 1


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in foreign]  # do not even look into them
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _find_files(patterns: list[str], problems: list[str]) -> list[Path]:
    """The files that the patterns mean, each once, in the order of the patterns and then by name."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in _FOLDER_SUFFIXES and p.is_file())
            nothing = f"the folder has no {' or '.join(_FOLDER_SUFFIXES)} files; name them by a glob"
        elif glob.has_magic(pattern):
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            nothing = "no file matches"
        else:
            found = [path] if path.exists() else []
            nothing = f"no such file (looked for it from {Path.cwd().name}/, the working directory)"
        if not found:
            problems.append(f"{pattern}: {nothing}")
        files.update(dict.fromkeys(found))
    return [path for path in files if _is_readable(path, problems)]


def _is_readable(path: Path, problems: list[str]) -> bool:
    try:
        with path.open("rb") as file:
            if file.read(1):
                return True
        problems.append(f"{path}: the file is empty; remove it from data.sources")
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
    return False


def _file_unit(number: int, path: Path, start: int = 0, stop: int = 0, size_bytes: int | None = None) -> Unit:
    info = path.stat()
    size = info.st_size if size_bytes is None else size_bytes
    return Unit(number, str(path), start, stop, size, f"{info.st_size}-{info.st_mtime_ns}")


def _split_file(number: int, source: schema.Source, path: Path) -> list[Unit]:
    size = path.stat().st_size
    match source:
        case schema.JsonlSource():
            starts = range(0, size, UNIT_BYTES)
            return [_file_unit(number, path, s, min(s + UNIT_BYTES, size), min(UNIT_BYTES, size - s)) for s in starts]
        case schema.ParquetSource():
            groups = _open_parquet(str(path), source.field).metadata
            sizes = [groups.row_group(g).total_byte_size for g in range(groups.num_row_groups)]
            return [_file_unit(number, path, g, g + 1, size) for g, size in enumerate(sizes)]
        case _:
            return [_file_unit(number, path)]


def _dataset_units(number: int, source: schema.HuggingFaceSource) -> list[Unit]:
    dataset = _load_dataset(source)
    rows = len(dataset)
    _check_field(source.field, dataset.column_names, source.name)
    row_bytes = max(1, dataset.data.nbytes // max(1, rows))
    step = max(1, UNIT_BYTES // row_bytes)
    stamp = str(dataset._fingerprint)
    return [
        Unit(number, source.name, start, min(start + step, rows), row_bytes * (min(start + step, rows) - start), stamp)
        for start in range(0, rows, step)
    ]


def _read_text(path: str, invalid_utf8: str, separator: str | None, skipped: Counter[str]) -> Iterator[str]:
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8", "replace" if invalid_utf8 == "replace" else "strict")
    except UnicodeDecodeError as error:
        if invalid_utf8 == "skip":
            skipped["invalid UTF-8"] += 1
            return
        raise _not_utf8(path, error.start) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    yield from [text] if separator is None else text.split(separator)


def _not_utf8(path: str, offset: int) -> EncodingError:
    return EncodingError(
        f"{path}: not valid UTF-8 at byte {offset}; convert the file (iconv -f latin1 -t utf-8), or set "
        "invalid_utf8: replace (or skip) on this text source"
    )


def _read_jsonl(unit: Unit, field: str) -> Iterator[str]:
    """Lines that begin within [start, stop); the last may end beyond it."""
    with Path(unit.path).open("rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()  # the line that begins before this unit belongs to the one before
        while (offset := file.tell()) < unit.stop and (line := file.readline()):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise _not_utf8(unit.path, offset + error.start) from None
            except json.JSONDecodeError as error:
                raise SourceError(f"{_line(unit.path, offset)}: not JSON: {error.msg}") from None
            if not isinstance(record, dict):
                raise SourceError(f"{_line(unit.path, offset)}: must be a JSON object with a key '{field}'")
            _check_field(field, list(record), _line(unit.path, offset) if field not in record else "")
            yield _text_of(record[field], field, unit.path, offset)


def _line(path: str, offset: int) -> str:
    with Path(path).open("rb") as file:
        before = file.read(offset)
    return f"{path}:{before.count(bytes([10])) + 1}"


def _text_of(value: Any, field: str, path: str, place: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SourceError(f"{path}: '{field}' holds a {type(value).__name__} (at {place}), not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write half a surrogate pair, UTF-8 cannot
            raise EncodingError(f"{path}: '{field}' (at {place}) holds half a character: {error.reason}") from None
    return value


def _check_field(field: str, there: list[str], where: str) -> None:
    if field not in there:
        raise SourceError(f"{where}: no field '{field}'; there are: {', '.join(there)}. Set 'field' of this source")


def _read_csv(path: str, field: str) -> Iterator[str]:
    import csv

    csv.field_size_limit(1 << 30)
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_field(field, list(reader.fieldnames or []), path)
            for record in reader:
                if None in record:  # an unquoted comma in the text would cut it off in silence
                    raise SourceError(f"{path}:{reader.line_num}: more fields than the header has; quote the text")
                if record[field] is None:
                    raise SourceError(f"{path}:{reader.line_num}: the row ends before its '{field}'")
                yield record[field]
        except csv.Error as error:
            raise SourceError(f"{path}:{reader.line_num}: not CSV: {error}") from None
        except UnicodeDecodeError:
            content = Path(path).read_bytes()
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error.start) from None
            raise


def _open_parquet(path: str, field: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: not a parquet file: {error}") from None
    _check_field(field, file.schema_arrow.names, path)
    return file


def _read_parquet(unit: Unit, field: str) -> Iterator[str]:
    import pyarrow as pa

    file = _open_parquet(unit.path, field)
    try:
        for group in range(unit.start, unit.stop):
            for value in file.read_row_group(group, [field]).column(0).to_pylist():
                yield _text_of(value, field, unit.path, group)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{unit.path}: row group {unit.start} cannot be read: {error}") from None


@functools.cache
def _load_dataset_once(name: str, config: str | None, split: str, revision: str | None, data_files: Any) -> Any:
    import datasets

    files = list(data_files) if data_files else None
    return datasets.load_dataset(name, config, split=split, revision=revision, data_files=files)


def _load_dataset(source: schema.HuggingFaceSource) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise SourceError("a huggingface source needs the package datasets: pip install 'llmtrain[hf]'")
    files = tuple(source.data_files) if source.data_files else None
    try:
        return _load_dataset_once(source.name, source.config, source.split, source.revision, files)
    except Exception as error:
        raise SourceError(f"the data set '{source.name}' cannot be loaded: {type(error).__name__}: {error}") from error


def _read_dataset(unit: Unit, source: schema.HuggingFaceSource) -> Iterator[str]:
    dataset = _load_dataset(source)
    for value in dataset.select(range(unit.start, unit.stop))[source.field]:
        yield _text_of(value, source.field, source.name, unit.start)


def group_units(units: list[Unit]) -> list[list[Unit]]:
    """Neighbouring small units together, up to about UNIT_BYTES: the tasks that processes take."""
    tasks: list[list[Unit]] = []
    size = UNIT_BYTES
    for unit in units:
        if size + unit.size_bytes > UNIT_BYTES:
            tasks.append([])
            size = 0
        tasks[-1].append(unit)
        size += unit.size_bytes
    return tasks


def default_workers() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
