"""The folder that shards are published into: what a build may replace there, and what is somebody else's."""

import errno
import os
from pathlib import Path

import pytest

from launcher.checks import preflight
from launcher.cluster import Profile
from launcher.sharding import finish, tasks, work
from launcher.sharding.build import Built, build, build_part, prepare_build
from launcher.sharding.parts import Part
from launcher.slurm.batch import JobSpec
from llmtrain import shards
from llmtrain.config import RunConfig, load_config
from llmtrain.config.load import Origins
from llmtrain.errors import ConfigError, DataMismatch, RunFolderError
from tests.support.bases import write_tokenizer
from tests.support.data import folder_content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a text, as users have them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("a line of text\n" * 2000)
    return tmp_path / "data"


def configure(folder: Path, *settings: str) -> RunConfig:
    given = [
        f"data.sources=[{{kind: text, paths: ['{folder}/a.txt'], separator: '\n'}}]", f"data.dir={folder}",
        "data.tokenizer.vocab_size=300", "data.split={by: tail, heldout: 0.1, test: 0.0}", "model.context=16",
    ]  # fmt: skip
    return load_config(None, [*given, *settings])[0]


def with_tokenizer_of_its_own(folder: Path) -> dict[str, str]:
    write_tokenizer(folder / "tokenizer", 300)
    (folder / "tokenizer/notes.txt").write_text("mine")
    return folder_content(folder)


@pytest.mark.parametrize("job", [build, prepare_build])
@pytest.mark.parametrize("inside", ["tokenizer", "tokenizer/v1", "linked"])
def test_a_tokenizer_where_the_shards_copy_goes_is_refused_and_kept(folder: Path, job: object, inside: str):
    before = with_tokenizer_of_its_own(folder)
    path = folder / inside
    if inside == "linked":
        path = folder.with_name("link")
        path.symlink_to(folder / "tokenizer")
    with pytest.raises(ConfigError) as caught:
        (build if job is build else prepare_build)(configure(folder, f"data.tokenizer={{path: '{path}'}}"), workers=1)
    [problem] = caught.value.problems
    assert problem.startswith(f"data.tokenizer.path={path}: a build replaces {folder}/tokenizer (data.dir={folder})")
    assert f"set data.dir to another folder, such as {folder}/shards" in problem
    assert folder_content(folder) == before


def test_also_where_the_folder_holds_shards(folder: Path):
    build(configure(folder), workers=1)
    before = folder_content(folder)
    config = configure(folder, f"data.tokenizer={{path: '{folder}/tokenizer'}}")
    for job in (build, prepare_build):
        with pytest.raises(ConfigError, match="a build replaces"):
            job(config, workers=1, force=True)
    assert folder_content(folder) == before


def test_a_tokenizer_that_no_build_has_written_is_refused_and_kept(folder: Path):
    before = with_tokenizer_of_its_own(folder)
    with pytest.raises(ConfigError) as caught:
        build(configure(folder), workers=1)
    assert f"data.dir={folder}: a build would replace {folder}/tokenizer, and no build has written it" in str(
        caught.value
    )
    assert folder_content(folder) == before
    built = build(configure(folder, f"data.dir={folder}/shards"), workers=1)
    shards.open_folder(built.folder.path)


@pytest.mark.parametrize("named", [False, True])
def test_a_job_that_would_be_refused_is_not_queued(folder: Path, named: bool):
    with_tokenizer_of_its_own(folder)
    text = (folder / "a.txt").rename(folder / "b.txt")
    wishes = [f"data.tokenizer={{path: '{folder}/tokenizer'}}"] if named else []
    config, origins = configure(folder, *wishes), Origins()
    spec = JobSpec("gpt", folder, Profile(name="p", gpus_per_node=1, shared=[str(folder.parent)]))
    for found in (preflight.check_run(config, origins, spec), preflight.check_shard_job(config, spec, "#!/bin/sh")):
        refused = [each.message for each in found if each.what == "shards"]
        assert [each.severity for each in found if each.what == "shards"] == ["error", "error"]
        assert f"{folder}/tokenizer" in refused[0]
        assert f"set data.dir to another folder, such as {folder}/shards" in refused[0]
        assert f"{folder}/a.txt: no such file" in refused[1]  # all together
    text.rename(folder / "a.txt")
    elsewhere = configure(folder, f"data.dir={folder}/shards", *wishes)
    assert "error" not in {each.severity for each in preflight._check_data(elsewhere, spec)[0]}
    build(elsewhere, workers=1)
    assert "error" not in {each.severity for each in preflight._check_data(elsewhere, spec)[0]}


def test_also_one_that_came_while_the_build_was_at_work(folder: Path, monkeypatch: pytest.MonkeyPatch):
    original = finish.write_shards

    def write_and_meet(*arguments: object) -> shards.ShardManifest:
        with_tokenizer_of_its_own(folder)
        return original(*arguments)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patched:
        patched.setattr("launcher.sharding.build.write_shards", write_and_meet)
        with pytest.raises(ConfigError, match="no build has written it"):
            build(configure(folder), workers=1)
    assert (folder / "tokenizer/notes.txt").read_text() == "mine"
    (folder / "tokenizer").rename(folder / "elsewhere")
    assert build(configure(folder), workers=1).size_bytes == 0  # nothing was lost of the work either


@pytest.mark.parametrize("older", [False, True], ids=["the first build", "over an older one"])
@pytest.mark.parametrize("dies_in", ["rmtree", "copytree", "write_atomic"])
def test_what_a_kill_while_publishing_leaves_is_replaced(
    folder: Path, older: bool, dies_in: str, monkeypatch: pytest.MonkeyPatch
):
    whole = folder.with_name("whole")
    build(configure(folder, f"data.dir={whole}"), workers=1)
    if older:
        build(configure(folder, "data.tokenizer.vocab_size=260"), workers=1)
        tasks._encoders.clear()  # the next build is another process
    taken, module = False, finish.files if dies_in == "write_atomic" else finish.shutil
    original, original_take = getattr(module, dies_in), work.take_manifest

    def take(plan: work.Plan) -> None:
        nonlocal taken
        original_take(plan)
        taken = True

    def dies(*arguments: object, **options: object) -> object:
        if taken:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(finish, "take_manifest", take)
        patched.setattr(module, dies_in, dies)
        with pytest.raises(KeyboardInterrupt):
            build(configure(folder), workers=1, force=True)
    assert not shards.exists(folder)
    build(configure(folder), workers=1)
    (folder / "a.txt").unlink()
    assert folder_content(folder) == folder_content(whole)
    assert not (folder / ".unpublished").exists()


def test_shards_that_were_taken_out_of_use_by_a_preparation_are_replaced(folder: Path):
    build(configure(folder), workers=1)
    prepare_build(configure(folder), workers=1, force=True)
    assert (folder / "tokenizer").exists()
    assert not shards.exists(folder)
    other = configure(folder, "data.tokenizer.vocab_size=260")  # for which the work folder is made anew
    prepare_build(other, workers=1)
    tasks._encoders.clear()
    build_part(other, Part(0, 1), workers=1)
    assert build(other, workers=1).folder.manifest.tokenizer.vocab_size == 260


def test_finished_shards_are_found_where_nobody_may_write(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Another user's, or on a read-only disk: training takes them there as well."""
    built = build(configure(folder), workers=1).folder

    def refuse(path: Path, *given: str, **named: str) -> object:
        if path.name.endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *given, **named)  # pyright: ignore[reportArgumentType, reportCallIssue]

    opened = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    for found in (
        build(configure(folder)),
        prepare_build(configure(folder)),
        build_part(configure(folder), Part(0, 1)),
    ):
        assert isinstance(found, Built)
        assert found.was_there
        assert found.folder.fingerprint == built.fingerprint
    with pytest.raises(RunFolderError, match=r"sharding: .*\.lock: Permission denied"):
        build(configure(folder), force=True)
    with pytest.raises(DataMismatch):
        build(configure(folder, "data.tokenizer.vocab_size=260"))
