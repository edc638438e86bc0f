"""Work on input that has changed since: it is said what becomes of it, and it is there where the input is again."""

import os
from pathlib import Path

import pytest

from launcher.sharding import build as building
from launcher.sharding import samples, tasks, work
from launcher.sharding.build import Built, build, build_part, prepare_build
from launcher.sharding.parts import Part
from launcher.sharding.work import check_unchanged, make_plan
from llmtrain.config import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.errors import DataMismatch
from tests.support.data import folder_content


def configure(folder: Path, *settings: str, dir: str = "shards") -> RunConfig:
    sources = f"data.sources=[{{kind: text, paths: ['{folder}/text']}}]"
    small = ["data.tokenizer.vocab_size=300", "model.context=16", "data.split.by=tail"]
    return load_config(None, [sources, *small, f"data.dir={folder / dir}", *settings])[0]


@pytest.fixture(autouse=True)
def _no_encoder_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command is a process of its own."""
    real = work.open_work

    def open_work(plan: work.Plan, anew: bool) -> None:
        tasks._encoders.clear()
        real(plan, anew)

    monkeypatch.setattr(building, "open_work", open_work)


@pytest.fixture
def tokenised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> RunConfig:
    """A build of which nothing but the end is missing."""
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / f"text/{name}.txt").write_text(f"some words of text {name} " * 3000)
    config = configure(tmp_path)
    prepare_build(config, workers=1)
    build_part(config, Part(0, 1), workers=1)
    capsys.readouterr()
    return config


def asides(folder: Path) -> list[Path]:
    return list((folder / "shards").glob(".work-*"))


@pytest.mark.parametrize("how", ["has changed", "is new", "is gone"])
def test_work_on_other_input_is_kept_aside_until_the_shards_are_finished(
    tmp_path: Path, tokenised: RunConfig, how: str, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "text" / ("d.txt" if how == "is new" else "b.txt")
    if how == "is gone":
        file.unlink()
    else:
        file.write_text("other words of text " * 3000)
    with pytest.raises(DataMismatch, match=rf"than what this job finds \({file} {how}\)\. A file was changed"):
        build_part(tokenised, Part(0, 1), workers=1)
    prepare_build(tokenised, workers=1)
    (aside,) = asides(tmp_path)
    said = capsys.readouterr().err
    assert f"sharding: starting anew: {file} {how}\n" in said
    assert f"sharding: what was done before (1 tasks, 0.1 MB of tokens) stays in {aside} until" in said
    assert (aside / "tokens-000000.npz").exists()
    build(tokenised, workers=1)
    assert not asides(tmp_path)


def test_work_goes_on_where_the_input_is_again_what_it_was(
    tmp_path: Path, tokenised: RunConfig, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "text/b.txt"
    info, text = file.stat(), file.read_text()
    for content in ("other words of text " * 3000, "and others again " * 3000):
        file.write_text(content)
        prepare_build(tokenised, workers=1)
        assert len(asides(tmp_path)) == 1  # the newest
        build_part(tokenised, Part(0, 1), workers=1)
        file.write_text(text)
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
        capsys.readouterr()
        assert prepare_build(tokenised, workers=1).missing == 0  # pyright: ignore[reportAttributeAccessIssue]
        said = capsys.readouterr().err
        assert "starting anew" not in said
        assert "sharding: going on with" in said
        assert len(asides(tmp_path)) == 1
    done = build(tokenised, workers=1)
    assert done.size_bytes == 0
    build(configure(tmp_path, dir="whole"), workers=1)
    assert folder_content(tmp_path / "shards") == folder_content(tmp_path / "whole")


def test_why_it_starts_anew(
    tmp_path: Path, tokenised: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    other = configure(tmp_path, "model.context=32", "data.tokenizer.vocab_size=310")
    prepare_build(other, workers=1)
    assert "was made with other settings (model.context, data.tokenizer)" in capsys.readouterr().err
    monkeypatch.setattr(samples, "RULES", samples.RULES + 1)
    prepare_build(other, workers=1)
    assert "another version of llmtrain made" in capsys.readouterr().err
    (tmp_path / "shards/.work/made-from.json").unlink()
    monkeypatch.setattr(samples, "RULES", samples.RULES + 1)
    prepare_build(other, workers=1)
    assert "another version of llmtrain made" in capsys.readouterr().err


def test_what_is_forced_says_what_it_throws_away(
    tmp_path: Path, tokenised: RunConfig, capsys: pytest.CaptureFixture[str]
):
    prepare_build(configure(tmp_path, "model.context=32"), workers=1)
    prepare_build(tokenised, workers=1)
    capsys.readouterr()
    built = build(tokenised, workers=1, force=True)
    assert "--force throws away what was done before: 1 tasks, 0.1 MB of tokens" in capsys.readouterr().err
    assert isinstance(built, Built)
    assert built.size_bytes
    assert not asides(tmp_path)


def test_nothing_builds_on_a_source_that_changed_while_it_was_read(
    tmp_path: Path, tokenised: RunConfig, capsys: pytest.CaptureFixture[str]
):
    """Not even where it is put back: a part of what was read is of the other text."""
    plan, file = make_plan(tokenised), tmp_path / "text/b.txt"
    info, text = file.stat(), file.read_text()
    file.write_text("other words of text " * 3000)
    with pytest.raises(DataMismatch, match="changed while it was being read"):
        check_unchanged(plan)
    file.write_text(text)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert build(tokenised, workers=1).size_bytes
    assert "starting anew; " in capsys.readouterr().err
