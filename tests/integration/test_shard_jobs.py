"""`llmtrain shard` as several jobs, which share a folder as machines of a cluster do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.sharding.parts import Part, choose_tasks
from launcher.sharding.tasks import task_file
from launcher.sharding.work import make_plan
from llmtrain import errors
from llmtrain.config import load_config
from tests.support.data import folder_content, python_sources
from tests.support.runs import environment


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """A job in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "launcher", "shard", *words],
        cwd=folder, env=environment(), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(job: "subprocess.Popen[str]", code: int = 0) -> str:
    said, _ = job.communicate(timeout=120)
    assert job.returncode == code, said
    return said


def shard(folder: Path, *words: str, code: int = 0) -> str:
    return finish(start(folder, *words), code)


def write_instructions(folder: Path) -> None:
    """About 21 MB of records: the last task, which must not be done too soon, is a whole one."""
    texts = [path.read_text().splitlines() for path in python_sources(100)]
    with (folder / "records.jsonl").open("w") as file:
        for n in range(13_000):
            lines = texts[n % 100][n % 50 :: 7]
            output = "\n".join(["# the rest", *lines[9:60]])
            record = {"instruction": f"Write number {n}", "input": "\n".join(lines[:9]), "output": output}
            file.write(json.dumps(record) + "\n")


SETTINGS = {
    "contiguous": ["data.packing=contiguous", "data.split={by: tail, heldout: 0.02, test: 0.01}"],
    "bestfit": ["data.packing=bestfit"],
    "instructions": [
        "data.sources=[{kind: jsonl, paths: [records.jsonl]}]", "data.format.kind=instruction", "model.context=512",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_parts_on_several_machines_give_the_bytes_of_one_build(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """Two at the same time; one of them is killed in its middle, and started again."""
    monkeypatch.chdir(tmp_path)
    if kind == "instructions":
        write_instructions(tmp_path)
    given = ["model.context=256", "data.tokenizer={vocab_size: 400, train_bytes: 1000000}", *SETTINGS[kind]]
    shard(tmp_path, *given, "data.dir=whole", "--workers", "1")

    words = [*given, "data.dir=parts", "--workers", "1"]
    assert "next       llmtrain shard CONFIG --part I/N" in shard(tmp_path, *words, "--only", "prepare")
    plan = make_plan(load_config(None, [*given, "data.dir=parts"])[0])
    own = [task_file(plan.work, number) for number in choose_tasks(plan.sizes, Part(1, 3))]
    first, second = (start(tmp_path, *words, "--part", f"{number}/3") for number in (0, 1))
    deadline = time.monotonic() + 60
    while not own[0].exists():
        assert second.poll() is None, second.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(second.pid, signal.SIGKILL)
    finish(second, -signal.SIGKILL)
    assert not own[-1].exists()
    kept = own[0].stat().st_mtime_ns

    again = start(tmp_path, *words, "--part", "1/3")
    for said in (finish(first), finish(again)):
        assert "waiting" not in said
        assert "measure" not in said
    assert own[0].stat().st_mtime_ns == kept
    shard(tmp_path, *words, "--part", "2/3")
    said = shard(tmp_path, *words)
    assert " 0.0 MB tokenised now" in said
    assert folder_content(tmp_path / "parts") == folder_content(tmp_path / "whole")
    assert "finished before" in shard(tmp_path, *words, "--part", "1/3")


def test_jobs_in_a_wrong_order_and_parts_that_are_none(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some words of text " * 3000)
    words = ["data.dir=s", "data.sources=[{kind: text, paths: [a.txt]}]", "data.tokenizer.vocab_size=300",
             "model.context=32", "data.split.by=tail"]  # fmt: skip
    usage = errors.UserError.exit_code
    assert "run 'llmtrain shard CONFIG --only prepare' first" in shard(tmp_path, *words, "--part", "0/2", code=usage)
    for part in ("2/2", "two", "-1/2"):
        assert f"--part {part}: must be I/N" in shard(tmp_path, *words, f"--part={part}", code=usage)
    assert "give one of them" in shard(tmp_path, *words, "--only", "prepare", "--part", "0/2", code=usage)
    shard(tmp_path, *words, "--only", "prepare")
    (tmp_path / "a.txt").write_text("other words of text " * 3000)
    mismatch = errors.DataMismatch.exit_code
    said = shard(tmp_path, *words, "--part", "0/2", code=mismatch)
    assert "prepared for other sources" in said
    assert "Traceback" not in said
    assert "starting anew" in shard(tmp_path, *words)
