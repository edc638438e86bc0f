"""Where text comes from: lists the work that processes share.

A `Unit` is a piece of a source that one process can read alone: a file, a byte range of a JSON-lines
file, a row group of a parquet file, a range of rows of a data set. Listing is quick and finds every
missing, empty or unreadable file at once; reading (records.py) finds what is wrong inside.
"""

import glob
import os
import sysconfig
from pathlib import Path

from launcher.sharding.readers import Unit, check_fields, load_dataset, open_parquet
from launcher.sharding.records import wanted_fields
from llmtrain import log
from llmtrain.config import data_sections as schema
from llmtrain.errors import SourceError
from llmtrain.files import expand_home
from llmtrain.source_files import TEXT_SUFFIXES, source_files

UNIT_BYTES = 4_000_000
"""Large sources are cut into units of about this size."""


def list_units(sources: list[schema.Source], format: schema.Format) -> list[Unit]:
    """Every piece of every source, in a fixed order.

    Raises:
        SourceError: names all files that are missing, empty or unreadable.
    """
    problems: list[str] = []
    units: list[Unit] = []
    for number, source in enumerate(sources):
        match source:
            case schema.StdlibSource():
                units += [_file_unit(number, path) for path in _stdlib_files(problems) if path.stat().st_size]
            case schema.HuggingFaceSource():
                units += _dataset_units(number, source, format)
            case _:
                for path in _find_files(number, source.paths, problems):
                    units += _split_file(number, source, path, format)
    if problems:
        raise SourceError("the sources cannot be read:\n" + "\n".join(f"  - {p}" for p in problems))
    return units


def _stdlib_files(problems: list[str]) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=lambda error: problems.append(_why_unreadable(error))):
        subfolders[:] = [name for name in subfolders if name not in foreign]  # do not even look into them
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _find_files(number: int, patterns: list[str], problems: list[str]) -> list[Path]:
    """The files that the patterns of source `number` mean, each once, in the order of the patterns and then by name."""
    files: dict[Path, None] = {}
    for position, pattern in enumerate(patterns):
        errors: list[OSError] = []
        found = sorted(source_files(pattern, errors.append))
        problems += dict.fromkeys(map(_why_unreadable, errors))
        if not found and not errors:
            path = Path(expand_home(pattern))
            looked = "" if path.is_absolute() else f" (looked for it from {Path.cwd().name}/, the working directory)"
            if path.is_dir():
                nothing = f"the folder has no {' or '.join(TEXT_SUFFIXES)} files; name them by a glob"
            elif glob.has_magic(pattern):
                nothing = f"no file matches{looked}"
            else:
                nothing = f"no such file{looked}"
            problems.append(f"{pattern}: {nothing}")
        if pattern in patterns[:position] or Path(expand_home(pattern)) in files:
            log.warn_once(
                f"data       data.sources.{number}.paths: {pattern} is named twice and read once; to give it twice the "
                "weight, list the source twice"
            )
        files.update(dict.fromkeys(found))
    return [path for path in files if _is_readable(path, problems)]


def _why_unreadable(error: OSError) -> str:
    return f"{error.filename}: cannot be read ({error.strerror})"


def _is_readable(path: Path, problems: list[str]) -> bool:
    try:
        with path.open("rb") as file:
            if file.read(1):
                return True
        problems.append(f"{path}: the file is empty; remove it from data.sources")
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
    return False


def stamp_of(path: Path) -> str | None:
    """What tells a file from what it was before; None where there is none."""
    try:
        return _stamp(path.stat())
    except OSError:
        return None


def _stamp(info: os.stat_result) -> str:
    return f"{info.st_size}-{info.st_mtime_ns}"


def _file_unit(number: int, path: Path, start: int = 0, stop: int = 0, size_bytes: int | None = None) -> Unit:
    info = path.stat()
    size = info.st_size if size_bytes is None else size_bytes
    return Unit(source=number, path=str(path), start=start, stop=stop, size_bytes=size, stamp=_stamp(info))


def _split_file(number: int, source: schema.Source, path: Path, format: schema.Format) -> list[Unit]:
    size = path.stat().st_size
    match source:
        case schema.JsonlSource():
            starts = range(0, size, UNIT_BYTES)
            return [_file_unit(number, path, s, min(s + UNIT_BYTES, size), min(UNIT_BYTES, size - s)) for s in starts]
        case schema.ParquetSource():
            groups = open_parquet(str(path), wanted_fields(source, format)[0]).metadata
            sizes = [groups.row_group(g).total_byte_size for g in range(groups.num_row_groups)]
            return [_file_unit(number, path, g, g + 1, size) for g, size in enumerate(sizes)]
        case _:
            return [_file_unit(number, path)]


def _dataset_units(number: int, source: schema.HuggingFaceSource, format: schema.Format) -> list[Unit]:
    dataset = load_dataset(source)
    rows = len(dataset)
    check_fields(wanted_fields(source, format)[0], dataset.column_names, lambda: source.name)
    row_bytes = max(1, dataset.data.nbytes // max(1, rows))
    step = max(1, UNIT_BYTES // row_bytes)
    return [
        Unit(
            source=number,
            path=source.name,
            start=start,
            stop=min(start + step, rows),
            size_bytes=row_bytes * (min(start + step, rows) - start),
            stamp=str(dataset._fingerprint),
        )
        for start in range(0, rows, step)
    ]


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
