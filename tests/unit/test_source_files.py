"""The files that a folder of texts means: those below it, also behind links to folders; and folders that fail."""

import contextlib
import errno
import glob
import os
import random
import types
from pathlib import Path

import pytest

from launcher.sharding.sources import list_units
from llmtrain import log
from llmtrain.config import load_config
from llmtrain.errors import SourceError
from llmtrain.recipe import newer_source
from llmtrain.source_files import TEXT_SUFFIXES, source_files


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {path.name}")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "warning", lines.append)
    return lines


def found(folder: Path) -> list[str]:
    """In the order in which a build reads them."""
    config = load_config(None, [f"data.sources=[{{kind: text, paths: ['{folder}']}}]"])[0]
    return [os.path.relpath(unit.path, folder) for unit in list_units(config.data.sources, config.data.format)]


def test_texts_behind_a_link_to_a_folder_are_read(tmp_path: Path):
    write(tmp_path / "data/a.txt", tmp_path / "disk/b.md", tmp_path / "disk/deep/c.txt", tmp_path / "disk/d.bin")
    (tmp_path / "data/books").symlink_to(tmp_path / "disk")
    assert found(tmp_path / "data") == ["a.txt", "books/b.md", "books/deep/c.txt"]
    (tmp_path / "data2").symlink_to(tmp_path / "data")
    assert found(tmp_path / "data2") == ["a.txt", "books/b.md", "books/deep/c.txt"]


def test_and_links_behind_links_each_folder_once(tmp_path: Path):
    write(tmp_path / "data/a.txt", tmp_path / "one/b.txt", tmp_path / "two/c.txt", tmp_path / "two/in/d.txt")
    (tmp_path / "data/one").symlink_to("../one")
    (tmp_path / "data/two").symlink_to("../two")
    (tmp_path / "one/again").symlink_to("../two")
    (tmp_path / "one/within").symlink_to("../two/in")
    assert found(tmp_path / "data") == ["a.txt", "one/b.txt", "two/c.txt", "two/in/d.txt"]


def test_of_two_links_the_first_by_name_counts(tmp_path: Path):
    write(tmp_path / "data/a.txt", tmp_path / "two/c.txt", tmp_path / "two/in/d.txt")
    for name, target in (("x", "../two"), ("w", "../two/in"), ("z", "../two/in")):
        (tmp_path / "data" / name).symlink_to(target)
    assert found(tmp_path / "data") == ["a.txt", "w/d.txt", "x/c.txt"]


def test_a_link_never_takes_the_place_of_the_folder_itself(tmp_path: Path):
    write(tmp_path / "data/b/x.txt", tmp_path / "data/b/deep/y.txt")
    (tmp_path / "data/a").symlink_to("b")
    (tmp_path / "data/0").symlink_to("b/deep")
    assert found(tmp_path / "data") == ["b/deep/y.txt", "b/x.txt"]


def test_links_in_a_circle_end(tmp_path: Path):
    write(tmp_path / "all/data/a.txt", tmp_path / "all/data/in/b.txt", tmp_path / "all/beside.txt")
    (tmp_path / "all/data/in/self").symlink_to(".")
    (tmp_path / "all/data/in/up").symlink_to("../..")
    (tmp_path / "all/data/nowhere").symlink_to("gone")
    (tmp_path / "all/data/itself.txt").symlink_to("itself.txt")
    assert found(tmp_path / "all/data") == ["a.txt", "in/b.txt"]


@pytest.mark.parametrize("target", ["..", "../..", ".", "/", "linked"])
def test_a_link_that_leads_upwards_is_not_followed(tmp_path: Path, target: str, said: list[str]):
    """It would bring everything beside the folder into training."""
    write(tmp_path / "all/data/a.txt", tmp_path / "all/beside.txt", tmp_path / "top.txt", tmp_path / "disk/deep/b.txt")
    if target == "linked":
        target = str(tmp_path / "data")
        Path(target).symlink_to("all")
    (tmp_path / "all/data/up").symlink_to(target)
    (tmp_path / "all/data/books").symlink_to(tmp_path / "disk/deep")
    for _ in range(2):
        assert found(tmp_path / "all/data") == ["a.txt", "books/b.txt"]
    [line] = said
    link = tmp_path / "all/data/up"
    assert line == f"data       {link} leads upwards, to {link.resolve()}: this link is not followed"


def test_nor_one_that_leads_upwards_from_where_another_leads_to(tmp_path: Path, said: list[str]):
    write(tmp_path / "all/data/a.txt", tmp_path / "all/beside.txt")
    write(tmp_path / "disk/deep/b.txt", tmp_path / "disk/c.txt")
    (tmp_path / "all/data/books").symlink_to(tmp_path / "disk/deep")
    (tmp_path / "disk/deep/up").symlink_to("..")
    (tmp_path / "disk/deep/back").symlink_to(tmp_path / "all")
    assert found(tmp_path / "all/data") == ["a.txt", "books/b.txt"]
    [line] = said
    assert line.startswith(f"data       {tmp_path}/all/data/books/back leads upwards, to {tmp_path}/all: ")
    assert line.endswith(" (and 1 more)")


class Failing:
    """A file system that fails to list a folder, or to say what a link leads to."""

    def __init__(self, number: int, folder: str = "", link: str = ""):
        self.error, self.folder, self.link = OSError(number, os.strerror(number)), folder, link
        self.scandir = os.scandir

    def __call__(self, path: Path) -> object:
        if Path(path).name == self.folder:
            raise OSError(self.error.errno, self.error.strerror, str(path))
        with self.scandir(path) as listed:
            return contextlib.nullcontext([self._entry(entry) for entry in listed])

    def _entry(self, entry: "os.DirEntry[str]") -> object:
        def fail() -> bool:
            raise OSError(self.error.errno, self.error.strerror, entry.path)

        if entry.name != self.link:
            return entry
        return types.SimpleNamespace(name=entry.name, path=entry.path, is_dir=fail, is_file=fail)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("where", ["folder", "link"])
def test_what_cannot_be_listed_is_not_left_out_in_silence(
    tmp_path: Path, number: int, where: str, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path / "data/a.txt", tmp_path / "data/books/b.txt", tmp_path / "data/c.txt")
    (tmp_path / "data/empty.txt").touch()
    monkeypatch.setattr(os, "scandir", Failing(number, **{where: "books"}))
    with pytest.raises(SourceError) as caught:
        found(tmp_path / "data")
    assert f"  - {tmp_path}/data/books: cannot be read ({os.strerror(number)})\n" in f"{caught.value}\n"
    assert f"  - {tmp_path}/data/empty.txt: the file is empty" in str(caught.value)  # all together


def test_finished_shards_do_not_need_their_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "data/a.txt", tmp_path / "data/books/b.txt", tmp_path / "made")
    config = load_config(None, [f"data.sources=[{{kind: text, paths: ['{tmp_path}/data']}}]"])[0]
    os.utime(tmp_path / "data/a.txt", (1, 1))
    monkeypatch.setattr(os, "scandir", Failing(errno.EACCES, "books"))
    assert newer_source(config, tmp_path / "made") is None
    os.utime(tmp_path / "made", (0, 0))
    assert newer_source(config, tmp_path / "made") == tmp_path / "data/a.txt"


def scatter(data: Path, files: int, depth: int) -> None:
    """Files of all kinds of names in folders of such names, the same at each call."""
    draw = random.Random(0)
    names = ["a", "b.txt", "B", ".hidden", "ä.md", "c d", "a.txt", "x.bin", ".txt"]
    for _ in range(files):
        path = data.joinpath(*(f"d{draw.choice(names)}" for _ in range(draw.randrange(depth))))
        write(path / draw.choice(names))


def test_folders_without_links_keep_their_files_and_order(tmp_path: Path):
    """What shards were made of before is what they are made of now."""
    scatter(tmp_path / "data", 60, depth=3)
    write(tmp_path / "data/.in/a.txt", tmp_path / "outside.txt")
    (tmp_path / "data/linked.txt").symlink_to(tmp_path / "outside.txt")
    files = [path for path in (tmp_path / "data").rglob("*") if path.suffix in TEXT_SUFFIXES and path.is_file()]
    assert len(files) > 10
    errors: list[OSError] = []
    assert sorted(source_files(str(tmp_path / "data"), errors.append)) == sorted(files)
    assert errors == []
    assert found(tmp_path / "data") == [os.path.relpath(path, tmp_path / "data") for path in sorted(files)]


PATTERNS = (
    "*.txt", "data/*", "data/**", "data/**/*.txt", "data/**/da", "data/*/*.md", "**/*.txt", "data/d?/[ab]*", "data/.*",
    "data/**/.*/*", "da[t]a/dB/a", "data/**/**/a.txt", "data/../data/*.txt", "./data/*.txt", "*/d*/**/*.md",
    "data/da/*",
)  # fmt: skip


def test_a_glob_means_what_it_means_to_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scatter(tmp_path / "data", 80, depth=4)
    write(tmp_path / "top.txt", tmp_path / "data/.in/a.txt")
    (tmp_path / "data/linked.txt").symlink_to(tmp_path / "top.txt")
    (tmp_path / "data/nowhere.txt").symlink_to("gone")
    (tmp_path / "data/itself.txt").symlink_to("itself.txt")
    (tmp_path / "data/dlink").symlink_to("da")
    monkeypatch.chdir(tmp_path)
    matched = 0
    for pattern in (*PATTERNS, *(f"{tmp_path}/{pattern}" for pattern in PATTERNS)):
        errors: list[OSError] = []
        files = {path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file()}
        assert set(source_files(pattern, errors.append)) == files, pattern
        assert errors == []
        matched += bool(files)
    assert matched > 20


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES, errno.EIO])
@pytest.mark.parametrize(
    ("where", "pattern"),
    [
        *(("folder", pattern) for pattern in ("*/*.txt", "**/*.txt", "**", "b*/**/*.txt", "books/*.txt")),
        *(("link", pattern) for pattern in ("*/*.txt", "**/*.txt", "**", "b*/**/*.txt", "*s/deep/b.txt")),
    ],
)
def test_nor_is_what_a_glob_cannot_list(
    tmp_path: Path, number: int, where: str, pattern: str, monkeypatch: pytest.MonkeyPatch
):
    """`glob` of Python passes over such a folder, and all of its text would be missing from training."""
    write(tmp_path / "data/a.txt", tmp_path / "data/x/a.txt", tmp_path / "data/books/b.txt")
    write(tmp_path / "data/books/deep/b.txt")
    monkeypatch.setattr(os, "scandir", Failing(number, **{where: "books"}))
    with pytest.raises(SourceError) as caught:
        found(tmp_path / "data" / pattern)
    assert f"  - {tmp_path}/data/books: cannot be read ({os.strerror(number)})\n" in f"{caught.value}\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
@pytest.mark.parametrize("mode", [0o000, 0o400])
@pytest.mark.parametrize("pattern", ["", "*/*.txt", "**/*.txt", "books/b.txt", "*/b.txt"])
def test_a_folder_of_somebody_else_is_named(tmp_path: Path, mode: int, pattern: str):
    write(tmp_path / "data/a.txt", tmp_path / "data/x/b.txt", tmp_path / "data/books/b.txt")
    (tmp_path / "data/books").chmod(mode)
    try:
        with pytest.raises(SourceError, match=r"data/books.*: cannot be read \(Permission denied\)"):
            found(tmp_path / "data" / pattern)
    finally:
        (tmp_path / "data/books").chmod(0o700)


def test_nor_a_folder_of_the_standard_library(monkeypatch: pytest.MonkeyPatch):
    real = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    config = load_config(None)[0]
    with pytest.raises(SourceError, match=r"/json: cannot be read \(Permission denied\)"):
        list_units(config.data.sources, config.data.format)


def test_a_name_that_no_file_can_have_is_no_file(tmp_path: Path):
    errors: list[OSError] = []
    assert list(source_files("a\0b", errors.append)) == []
    assert list(source_files(str(tmp_path / "a\0b*"), errors.append)) == []
