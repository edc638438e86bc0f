"""`llmtrain shard` as a user runs it."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmtrain import errors
from tests.support.data import folder_content, python_sources
from tests.support.runs import environment

ROOT = Path(__file__).parents[2]


def shard(folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "shard", *words],
        cwd=folder, env=environment(), text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def settings(name: str, packing: str = "contiguous", files: int = 40) -> list[str]:
    paths = ", ".join(f'"{path}"' for path in python_sources(files))
    return [
        f"data.dir={name}",
        f"data.sources=[{{kind: text, paths: [{paths}]}}]",
        "data.tokenizer.vocab_size=400",
        "model.context=64",
        f"data.packing={packing}",
        "data.split={by: hash, heldout: 0.2, test: 0.2}",
    ]


def long_settings(name: str) -> list[str]:
    """A build that takes seconds, so that there is time to disturb it."""
    return [f"data.dir={name}", "data.tokenizer={vocab_size: 400, train_bytes: 3000000}", "model.context=64"]


@pytest.mark.parametrize("packing", ["contiguous", "bestfit"])
def test_the_same_bytes_for_any_number_of_processes(tmp_path: Path, packing: str):
    """On 30 MB: several tasks, several shards."""
    said = shard(tmp_path, *long_settings("one"), f"data.packing={packing}", "--workers", "1")
    shard(tmp_path, *long_settings("three"), f"data.packing={packing}", "--workers", "3")
    assert folder_content(tmp_path / "one") == folder_content(tmp_path / "three")
    assert "tiktoken (ids proven equal)" in said
    assert "fingerprint" in said


def test_finished_shards_are_found_and_kept_unless_forced(tmp_path: Path):
    shard(tmp_path, *settings("s"))
    before = (tmp_path / "s/manifest.json").stat().st_mtime_ns
    assert "finished before" in shard(tmp_path, *settings("s"))
    assert (tmp_path / "s/manifest.json").stat().st_mtime_ns == before
    kept = folder_content(tmp_path / "s")
    shard(tmp_path, *settings("s"), "--force")
    assert (tmp_path / "s/manifest.json").stat().st_mtime_ns != before
    assert folder_content(tmp_path / "s") == kept
    said = shard(tmp_path, *settings("s", "bestfit"), code=errors.DataMismatch.exit_code)
    assert "packing: shards have contiguous, the configuration bestfit" in said


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """A build in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "launcher", "shard", *words],
        cwd=folder, env=environment(), start_new_session=True, text=True, stderr=subprocess.PIPE,
        # A shell that starts the tests in the background makes them, and all that they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path: Path):
    words = [*long_settings("s"), "--workers", "2"]
    shard(tmp_path, *long_settings("undisturbed"), "--workers", "2")
    draw, kills = random.Random(0), 0
    for _ in range(4):
        process = start(tmp_path, *words)
        wait_for(tmp_path / "s/.work/tokenizer-done", process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.3, 2.0))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if (tmp_path / "s/manifest.json").exists():
            break
    assert kills
    shard(tmp_path, *words)
    assert folder_content(tmp_path / "s") == folder_content(tmp_path / "undisturbed")


def test_a_changed_source_is_not_mixed_with_work_on_the_old_one(tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_text("old words " * 3000)
    words = ["data.dir=s", "data.sources=[{kind: text, paths: [a.txt]}]", "data.tokenizer.vocab_size=300",
             "model.context=32", "data.split.by=tail"]  # fmt: skip
    shard(tmp_path, *words)
    shard(tmp_path, *words, "--only", "prepare", "--force")
    (tmp_path / "s/.work/tokens-000000.npz").write_bytes(b"of the old text")
    assert not (tmp_path / "s/manifest.json").exists()
    text.write_text("new words " * 3000)
    shard(tmp_path, *words)
    assert not (tmp_path / "s/.work").exists()


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path):
    process = start(tmp_path, *long_settings("s"), "--workers", "2")
    wait_for(tmp_path / "s/.work/tokens-000000.npz", process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert not (tmp_path / "s/manifest.json").exists()
    assert list((tmp_path / "s/.work").glob("tokens-*.npz"))


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["data.sources=[{kind: text, paths: [gone.txt]}]"], errors.SourceError, "gone.txt: no such file"),
        (["data.sources=[{kind: text, paths: [latin.txt]}]"], errors.EncodingError, "not valid UTF-8 at byte 3"),
        (["data.tokenizer={kind: folder, path: nowhere}"], errors.TokenizerError, "tokenizer.json: no such file"),
        (["data.sorces=[]"], errors.ConfigError, "did you mean data.sources?"),
        (["data.sources=[{kind: text, paths: [tiny.txt]}]"], errors.TooLittleData, "not one row of 256 tokens"),
    ],
)
def test_each_kind_of_bad_input_has_an_exit_code(
    tmp_path: Path, words: list[str], kind: type[errors.UserError], message: str
):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "tiny.txt").write_text("too little text")
    said = shard(tmp_path, "data.dir=s", "data.split.by=tail", *words, code=kind.exit_code)
    assert message in said
    assert "Traceback" not in said


def test_exit_codes_differ_from_each_other_and_from_a_crash():
    kinds = [kind for kind in errors.UserError.__subclasses__() if kind.__module__ == errors.__name__]
    codes = [kind.exit_code for kind in kinds if kind is not errors.ConfigError]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 2, 130, errors.EXIT_REQUEUE} & set(codes)


def test_a_full_disk_is_named_and_nothing_half_written_counts(small_disk: Path):
    said = shard(ROOT, *settings(str(small_disk / "s")), code=errors.DiskFull.exit_code)
    assert "no space left" in said
    assert not (small_disk / "s/manifest.json").exists()


def test_help_teaches_and_loads_nothing_heavy():
    said = subprocess.run(
        [sys.executable, "-m", "launcher", "--help"], cwd=ROOT, text=True, capture_output=True, check=True
    )
    assert "torchrun" in said.stdout
    heavy = "('torch', 'numpy', 'pyarrow', 'tokenizers', 'datasets', 'transformers', 'pydantic')"
    loaded = f"import sys, launcher.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", loaded], cwd=ROOT, text=True).strip() == "[]"


def test_workers_do_not_outlive_a_killed_build(tmp_path: Path):
    process = start(tmp_path, *long_settings("s"), "--workers", "2")
    wait_for(tmp_path / "s/.work/tokenizer-done", process)
    deadline = time.monotonic() + 30
    workers: list[psutil.Process] = []
    while not workers:
        assert time.monotonic() < deadline
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
