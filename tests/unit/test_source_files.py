"""The files that a folder of texts means: those below it, also behind links to folders."""

import os
import random
from pathlib import Path

from launcher.sharding.sources import list_units
from llmtrain.config import load_config
from llmtrain.recipe import TEXT_SUFFIXES, source_files


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {path.name}")


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
    assert found(tmp_path / "all/data") == ["a.txt", "in/b.txt", "in/up/beside.txt"]


def test_folders_without_links_keep_their_files_and_order(tmp_path: Path):
    """What shards were made of before is what they are made of now."""
    draw = random.Random(0)
    names = ["a", "b.txt", "B", ".hidden", "ä.md", "c d", "a.txt", "x.bin", ".txt"]
    for _ in range(60):
        path = tmp_path.joinpath("data", *(f"d{draw.choice(names)}" for _ in range(draw.randrange(3))))
        write(path / draw.choice(names))
    write(tmp_path / "data/.in/a.txt", tmp_path / "outside.txt")
    (tmp_path / "data/linked.txt").symlink_to(tmp_path / "outside.txt")
    files = [path for path in (tmp_path / "data").rglob("*") if path.suffix in TEXT_SUFFIXES and path.is_file()]
    assert len(files) > 10
    assert sorted(source_files(str(tmp_path / "data"))) == sorted(files)
    assert found(tmp_path / "data") == [os.path.relpath(path, tmp_path / "data") for path in sorted(files)]
