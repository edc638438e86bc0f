"""A build in several jobs: prepare, parts, the rest."""

import fcntl
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.sharding import finish, progress, samples, sources, tasks, tokenize, work
from launcher.sharding.build import Built, BuiltPart, PreparedBuild, build, build_part, prepare_build
from launcher.sharding.lock import locked
from launcher.sharding.parts import Part, choose_job, choose_tasks, parse_part
from launcher.sharding.show import describe
from launcher.sharding.work import num_tasks
from llmtrain import recipe
from llmtrain.config import RunConfig, load_config
from llmtrain.errors import DataMismatch, DiskFull, SourceError, UserError
from tests.support.data import folder_content, python_sources


@given(sizes=st.lists(st.integers(0, 1000), max_size=60), count=st.integers(1, 9))
def test_every_task_is_in_one_part_and_parts_are_about_equal(sizes: list[int], count: int):
    parts = [choose_tasks(sizes, Part(number, count)) for number in range(count)]
    assert sorted(task for part in parts for task in part) == list(range(len(sizes)))
    loads = [sum(sizes[task] for task in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_equal_tasks_are_dealt_in_turn_and_the_largest_comes_first():
    assert choose_tasks([4] * 7, Part(1, 3)) == [1, 4]
    assert [choose_tasks([1, 1, 1, 1, 4], Part(number, 2)) for number in range(2)] == [[4], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    "text", ["3/3", "0/0", "-1/3", "1", "1/", "a/b", "1/3/4", "", " 1/3", "1.0/3", "\u0661/\u0663"]
)
def test_what_is_no_part_is_refused(text: str):
    with pytest.raises(UserError, match="must be I/N, with I from 0 to N-1"):
        parse_part(text)


def test_options_that_do_not_go_together_are_refused():
    assert choose_job(None, None, True, 3) is None
    assert choose_job("prepare", None, True, 0) == "prepare"
    assert choose_job(None, "0/2", False, 0) == Part(0, 2)
    for given_, message in (
        (("prepare", "0/2", False, 0), "--only prepare and --part are two jobs"),
        ((None, "0/2", True, 0), "give it to --only prepare instead"),
        ((None, "0/2", False, 1), "--show needs finished shards"),
        (("prepare", None, False, 1), "--show needs finished shards"),
    ):
        with pytest.raises(UserError, match=message):
            choose_job(*given_)


def text_settings(_folder: Path) -> list[str]:
    paths = ", ".join(f'"{path}"' for path in python_sources(30))
    return [f"data.sources=[{{kind: text, paths: [{paths}]}}]", "data.tokenizer={vocab_size: 400, train_bytes: 100000}"]


def instruction_settings(folder: Path) -> list[str]:
    """Records of many lengths, some with an input, some too long."""
    lines = [line for path in python_sources(10) for line in path.read_text().splitlines() if line.strip()]
    records = [
        {"instruction": "\n".join(lines[i : i + i % 23 + 1]), "input": lines[-i] if i % 3 else "", "output": lines[i]}
        for i in range(1500)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return [
        f"data.sources=[{{kind: jsonl, paths: ['{folder}/records.jsonl']}}]", "data.format.kind=instruction",
        "data.tokenizer={vocab_size: 400, train_bytes: 100000}",
    ]  # fmt: skip


CASES: dict[str, tuple[Any, list[str]]] = {
    "contiguous, tail": (text_settings, ["data.packing=contiguous", "data.split={by: tail, heldout: 0.1, test: 0.1}"]),
    "bestfit, hash": (text_settings, ["data.packing=bestfit", "data.split={by: hash, heldout: 0.2, test: 0.2}"]),
    "instructions, bestfit": (
        instruction_settings,
        ["model.context=512", "data.split={by: hash, heldout: 0.1, test: 0.1}"],
    ),
    "instructions, one a row": (
        instruction_settings,
        ["model.context=512", "data.packing=none", "data.split={by: tail, heldout: 0.1}"],
    ),
}


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tasks of little text, and several shards."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 40_000)
    monkeypatch.setattr(finish, "_SHARD_BYTES", 60_000)


def configure(tmp_path: Path, case: str = "contiguous, tail", name: str = "shards") -> RunConfig:
    make, more = CASES[case]
    return load_config(None, [*make(tmp_path), "model.context=64", *more, f"data.dir={tmp_path}/{name}"])[0]


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("case", CASES)
def test_several_jobs_give_the_bytes_of_one(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch):
    """Parts in any order, one of them stopped and started again; none measures or trains."""
    whole, config = configure(tmp_path, case, "whole"), configure(tmp_path, case)
    build(whole, workers=1)
    count = num_tasks(config)
    assert count > 8
    prepared = prepare_build(config, workers=1)
    assert isinstance(prepared, PreparedBuild)
    assert prepared.missing == count
    with monkeypatch.context() as forbidden:
        forbidden.delattr(tasks, "count_characters")
        forbidden.delattr(tokenize, "prepare")
        interrupted(config, Part(1, 3), monkeypatch)
        for number in (2, 1, 0):
            part = build_part(config, Part(number, 3), workers=1)
            assert isinstance(part, BuiltPart)
            again = number == 1
            assert (part.size_bytes < sum(part.plan.sizes[n] for n in part.chosen)) == again
        assert part.plan.missing() == []
        finished = build(config, workers=1)
    assert finished.size_bytes == 0
    assert folder_content(tmp_path / "shards") == folder_content(tmp_path / "whole")
    assert (tmp_path / "shards/train-00002.arrow").exists()


def interrupted(config: RunConfig, part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a part and stop it while it writes its third task."""
    original, written = np.savez, 0

    def save(path: Path, **arrays: Any) -> None:
        nonlocal written
        written += 1
        original(path, **arrays)
        if written == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", save)
        with pytest.raises(KeyboardInterrupt):
            build_part(config, part, workers=1)
    folder = recipe.shard_folder(config) / ".work"
    assert len(list(folder.glob("tokens-*"))) == 2  # the third was not whole, and nothing of it stayed


@pytest.mark.usefixtures("small_tasks")
def test_the_last_job_does_what_parts_left(tmp_path: Path):
    build(configure(tmp_path, name="whole"), workers=1)
    config = configure(tmp_path)
    prepare_build(config, workers=1)
    build_part(config, Part(0, 2), workers=1)
    finished = build(config, workers=1)
    assert 0 < finished.size_bytes < sum(part_sizes(config))
    assert folder_content(tmp_path / "shards") == folder_content(tmp_path / "whole")


def part_sizes(config: RunConfig) -> list[int]:
    return work.make_plan(config).sizes


@pytest.mark.usefixtures("small_tasks")
def test_a_part_before_its_time_says_what_to_run(tmp_path: Path):
    config = configure(tmp_path)
    for left in ("nothing", "key", "counts.json"):  # what a killed job may have left, in its order
        with pytest.raises(UserError, match="it is not prepared yet; run 'llmtrain shard CONFIG --only prepare'"):
            build_part(config, Part(0, 2), workers=1)
        if left == "nothing":
            prepare_build(config, workers=1)
            (tmp_path / "shards/.work/tokenizer-done").unlink()
        elif left == "key":
            prepare_build(config, workers=1)
            (tmp_path / "shards/.work/counts.json").unlink()
    prepare_build(config, workers=1)
    assert isinstance(build_part(config, Part(0, 2), workers=1), BuiltPart)


def test_a_source_that_changed_since_it_was_prepared_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "a.txt"
    text.write_text("some words of text " * 3000)
    given_ = [f"data.sources=[{{kind: text, paths: ['{text}']}}]", "data.tokenizer.vocab_size=300", "model.context=16"]
    config, _ = load_config(None, [*given_, "data.split.by=tail", f"data.dir={tmp_path}/shards"])
    prepare_build(config, workers=1)
    text.write_text("other words of text " * 3000)
    with pytest.raises(DataMismatch, match=r"prepared for other sources.*--only prepare' again: it starts anew"):
        build_part(config, Part(0, 1), workers=1)
    capsys.readouterr()
    prepare_build(config, workers=1)
    assert "starting anew" in capsys.readouterr().err
    assert isinstance(build_part(config, Part(0, 1), workers=1), BuiltPart)
    other, _ = load_config(None, [*given_, "data.split={by: tail, heldout: 0.3}", f"data.dir={tmp_path}/shards"])
    with pytest.raises(DataMismatch, match="another configuration uses the same"):
        build_part(other, Part(0, 1), workers=1)


@pytest.mark.usefixtures("small_tasks")
def test_a_finished_folder_leaves_nothing_to_do(tmp_path: Path):
    config = configure(tmp_path)
    build(config, workers=1)
    for found in (build_part(config, Part(1, 3), workers=1), prepare_build(config, workers=1)):
        assert isinstance(found, Built)
        assert found.was_there
        assert "finished before" in "".join(describe(found))
    other = configure(tmp_path, "bestfit, hash")
    for job in (lambda: build_part(other, Part(0, 1), 1), lambda: prepare_build(other, 1)):
        with pytest.raises(DataMismatch, match="packing: shards have contiguous"):
            job()


@pytest.mark.usefixtures("small_tasks")
def test_a_forced_preparation_gives_the_parts_work(tmp_path: Path):
    config = configure(tmp_path)
    build(config, workers=1)
    before = folder_content(tmp_path / "shards")
    prepare_build(config, workers=1, force=True)
    for number in range(2):
        part = build_part(config, Part(number, 2), workers=1)
        assert isinstance(part, BuiltPart)
        assert part.size_bytes
    assert not build(config, workers=1).was_there
    assert folder_content(tmp_path / "shards") == before


@pytest.mark.usefixtures("small_tasks")
def test_preparing_again_keeps_what_is_done_and_clears_what_kills_left(tmp_path: Path):
    config = configure(tmp_path)
    prepare_build(config, workers=1)
    part = build_part(config, Part(0, 2), workers=1)
    left = tmp_path / f"shards/.work/tokens-000001.0123{tasks.ASIDE}"
    left.write_bytes(b"half a file")
    prepared = prepare_build(config, workers=1)
    assert isinstance(prepared, PreparedBuild)
    assert isinstance(part, BuiltPart)
    assert prepared.missing == len(prepared.plan.tasks) - len(part.chosen)
    assert not left.exists()


@pytest.mark.usefixtures("small_tasks")
def test_work_of_a_version_that_cuts_samples_otherwise_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = configure(tmp_path)
    with monkeypatch.context() as older:
        older.setattr(samples, "RULES", samples.RULES - 1)
        prepare_build(config, workers=1)
        build_part(config, Part(0, 2), workers=1)
    with pytest.raises(DataMismatch, match="another version of llmtrain prepared it"):
        build_part(config, Part(1, 2), workers=1)
    prepared = prepare_build(config, workers=1)
    assert isinstance(prepared, PreparedBuild)
    assert prepared.missing == len(prepared.plan.tasks)
    assert "another version of llmtrain made" in capsys.readouterr().err


def test_more_parts_than_tasks_is_no_error(tmp_path: Path):
    config = configure(tmp_path)
    count = num_tasks(config)
    prepare_build(config, workers=1)
    part = build_part(config, Part(count, count + 1), workers=1)
    assert isinstance(part, BuiltPart)
    assert part.chosen == []
    assert f"there are only {count} tasks" in "".join(describe(part))


def test_the_number_of_tasks_of_a_missing_source(tmp_path: Path):
    config, _ = load_config(None, [f"data.sources=[{{kind: text, paths: ['{tmp_path}/gone.txt']}}]"])
    with pytest.raises(SourceError, match="no such file"):
        num_tasks(config)


def test_parts_share_a_folder_and_the_others_have_it_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A preparation waits for two parts that are at work together, and a part for the preparation."""
    order: list[str] = []
    folder, may_go = tmp_path / "shards", threading.Event()

    def prepares() -> None:
        with locked(folder):
            order.append("prepared")

    def is_part(number: int) -> None:
        with locked(folder, shared=True):
            order.append(f"part {number}")
            may_go.wait()

    parts = [threading.Thread(target=is_part, args=(number,), daemon=True) for number in range(2)]
    for part in parts:
        part.start()
    wait_until(lambda: len(order) == 2)  # both are in: neither waits for the other
    whole = threading.Thread(target=prepares, daemon=True)
    whole.start()
    said = ""

    def is_said() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "waiting for other jobs, which hold" in said

    wait_until(is_said)
    assert len(order) == 2
    may_go.set()
    for thread in (*parts, whole):
        thread.join(30)
    assert order[2:] == ["prepared"]


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_system_without_locks_is_named(tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch):
    def refuse(file: Any, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"its file system has no locks.*-o flock"), locked(tmp_path / "s", shared):
        pass


def test_the_lock_file_may_be_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NFS turns flock into locks on bytes, which want a file open for the kind of lock."""
    modes: list[int] = []
    monkeypatch.setattr(fcntl, "flock", lambda file, how: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & 3))
    for shared in (False, True):
        with locked(tmp_path / "s", shared):
            pass
    assert modes == [2, 2]  # O_RDWR


@pytest.mark.usefixtures("small_tasks")
def test_a_full_disk_stops_a_part_and_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = configure(tmp_path)
    prepare_build(config, workers=1)

    def full(path: Path, **arrays: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        with pytest.raises(DiskFull):
            build_part(config, Part(0, 2), workers=1)
    assert not list((tmp_path / "shards/.work").glob("tokens-*"))


@pytest.mark.usefixtures("small_tasks")
def test_two_machines_may_write_the_same_task_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A part that was started again elsewhere, with the same process numbers, while its first process lives on."""
    config = configure(tmp_path)
    prepare_build(config, workers=1)
    original, depth = np.savez, 0

    def save(path: Path, **arrays: Any) -> None:
        nonlocal depth
        original(path, **arrays)
        if depth == 0:
            depth = 1
            build_part(config, Part(0, 2), workers=1)

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", save)
        build_part(config, Part(0, 2), workers=1)
    assert not list((tmp_path / "shards/.work").glob(f"*{tasks.ASIDE}"))
    build(config, workers=1)
    build(configure(tmp_path, name="whole"), workers=1)
    assert folder_content(tmp_path / "shards") == folder_content(tmp_path / "whole")


def test_without_a_terminal_lines_become_rare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Two hours in steps of a second."""
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.ShardProgress() as shown:
        shown.stage("tokenise part 1/3", 8_200 * 10**6, 1_000 * 10**6)
        for _ in range(7200):
            now += 1
            shown.advance(10**6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sharding: tokenise part 1/3 (8,200.0 MB, 1,000.0 MB of them done before)"
    assert lines[1] == "sharding: tokenise part 1/3 12%, 1.0 MB/s, 119.9 min left"
    assert 120 < len(lines) < 160
