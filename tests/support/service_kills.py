"""A run that is served while something is killed there, and what must hold at its end."""

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.keeper.processes import is_alive
from llmtrain import files, ledger, manifest, ranking, retention, rundir
from llmtrain.config import load_config
from llmtrain.rundir import RunDir
from llmtrain.service import beside, plan
from tests.support.hub_repos import git_blob_id
from tests.support.hub_server import HubProcess, client_environment
from tests.support.runs import TIMEOUT_S, Workplace, environment

STEPS = list(range(2, 26, 2))
# Steps of 0.1 s, so that a kill can fall between two saves; slow scores, so that one can fall between two of them.
SETTINGS = [
    f"train.steps={STEPS[-1]}",
    "train.global_batch_size=64",
    "checkpoint.every_steps=2",
    "service.threads=1",
    "service.batch_size=1",
    "hub.optimizer_state=true",
    "hub.pause_s=0.1",
]
GONE_S = 10.0
"""Children have so long to end after the service: 0.05 s, but for one that is just starting on a busy machine."""


@dataclass
class Case:
    """A run with a repository of its own on the Hub, and when something was killed there."""

    workplace: Workplace
    hub: HubProcess
    name: str
    source: str = "calm"
    """Name of the run that this one is, or should come to be, a copy of."""
    kills: list[float] = field(default_factory=list)

    @property
    def run(self) -> RunDir:
        return RunDir(self.workplace.run_folder(self.name))

    @property
    def original(self) -> RunDir:
        """Never killed, never served."""
        return RunDir(self.workplace.run_folder(self.source))

    @property
    def repo(self) -> str:
        return f"tester/{self.name}"

    def copy(self, steps: list[int]) -> None:
        shutil.copytree(self.original.path, self.run.path)
        for step in set(STEPS) - set(steps):
            shutil.rmtree(self.run.checkpoint(step), ignore_errors=True)

    def serve(self, **variables: str) -> "subprocess.Popen[bytes]":
        command = ["llmtrain.service", "--run", str(self.run.path), "--repo", self.repo, "--drain", "--background"]
        return self.start([sys.executable, "-m", *command], **variables)

    def train(self) -> "subprocess.Popen[bytes]":
        return self.start(
            self.workplace.command(f"run.name={self.name}", f"hub.repo={self.repo}", "service.start=auto", *SETTINGS)
        )

    def start(self, command: list[str], **variables: str) -> "subprocess.Popen[bytes]":
        ours = {name: environment()[name] for name in ("OMP_NUM_THREADS", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")}
        env = {**client_environment(self.hub.endpoint, self.workplace.folder / "home"), **ours, **variables}
        with (self.workplace.folder / f"{self.name}.txt").open("ab") as output:
            return subprocess.Popen(
                command, cwd=self.workplace.folder, env=env, stdout=output, stderr=output, start_new_session=True
            )

    def drain(self) -> None:
        assert self.serve().wait(TIMEOUT_S) == 0, self.run.service_log.read_text()[-4000:]

    def kill(self, process: "subprocess.Popen[bytes] | psutil.Process") -> None:
        process.kill()
        if isinstance(process, psutil.Process):  # an orphan, which is a zombie for as long as the system likes
            wait_until(lambda: not is_alive(process))
        else:
            process.wait()
        self.kills.append(time.time())

    def processes(self) -> list[psutil.Process]:
        """All that work on this run."""
        found = psutil.process_iter(["cmdline", "status"])
        alive = [p for p in found if p.info["status"] not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)]
        return [p for p in alive if str(self.run.path) in (p.info["cmdline"] or [])]

    def are_gone(self, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def published(self) -> list[int]:
        """Steps that training has published, those that retention has deleted included."""
        return sorted({*self.run.checkpoint_steps(), *ledger.uploads(self.run)})


@contextlib.contextmanager
def looked_at(run: RunDir) -> Iterator[Counter[str]]:
    """Somebody reads all that can be read, all the time; what he sees is whole or it is not there."""
    ended, seen, errors = threading.Event(), Counter[str](), list[Exception]()

    def look() -> None:
        config, _ = load_config(run.config)
        while not ended.wait(0.05):
            try:
                ranked, status, hub = ranking.rank(run), ledger.status(run), ledger.hub_state(run)
                ledger.events(run)
                beside.waiting(run, config, since=0.0)
                if ranked is not None:
                    assert ranked.proposed.step in {entry.step for entry in ranked.entries}
            except Exception as error:  # noqa: BLE001  shown by the test
                errors.append(error)
                return
            seen.update(looks=1, ranking=ranked is not None, status=status is not None, hub=hub is not None)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        yield seen
    finally:
        ended.set()
        reader.join()
    if errors:
        raise errors[0]


def records(path: Path) -> list[dict[str, Any]]:
    """Every line parses, the last one too."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def assert_calm_end(case: Case, steps: list[int]) -> None:
    """What the ledgers, the disk and the Hub show once nothing waits."""
    scores, uploads = records(case.run.scores), records(case.run.uploads)
    assert sorted(score["step"] for score in scores) == steps
    assert sorted(upload["step"] for upload in uploads) == steps
    saved = {step: manifest.read(case.original.checkpoint(step)) for step in steps}
    identities = {step: manifest.identity(described) for step, described in saved.items()}
    for record in (*scores, *uploads):
        assert record["checkpoint"] == identities[record["step"]]
    for score in scores:
        assert score["loss"] == pytest.approx(saved[score["step"]].heldout_loss, abs=1e-5)
    for path in (case.run.service_events, case.run.events):
        if path.exists():
            records(path)
    assert case.run.quarantined_steps() == []
    rule = load_config(case.run.config)[0].checkpoint
    losses = {score["step"]: score["loss"] for score in scores}
    assert set(case.run.checkpoint_steps()) == retention.to_keep(steps, losses, rule)
    assert list(case.run.service.glob(".*")) == []
    assert [path.name for path in case.run.checkpoints.iterdir() if path.name.startswith(rundir.DOOMED)] == []
    ranked = ranking.rank(case.run)
    assert ranked is not None
    assert [entry.step for entry in ranked.entries] == steps
    assert all(entry.uploaded for entry in ranked.entries)
    status = ledger.status(case.run)
    assert status is not None
    assert (status.idle, status.to_score, status.to_upload, status.problem) == (True, [], [], None)
    assert_hub_has(case, steps, identities)


def assert_hub_has(case: Case, steps: list[int], identities: dict[int, str]) -> None:
    """One commit for each checkpoint and no other; each tag's bytes are the checkpoint's."""
    state = case.hub.state()
    assert state["bugs"] == []
    repo = state["repos"][case.repo]
    commits = {commit["oid"]: commit for commit in repo["commits"]}
    history, oid = [], repo["branches"]["checkpoints"]
    while oid:
        history.append(commits[oid])
        oid = commits[oid]["parent"]
    *found, first = history
    assert first["title"] == "initial commit"
    branch = sorted(found, key=lambda commit: int(commit["title"].removeprefix("step ")))
    assert [commit["title"] for commit in branch] == [f"step {step}" for step in steps]
    uploads = ledger.uploads(case.run)
    assert repo["tags"] == {f"step-{step}": uploads[step].commit for step in steps}
    for step, commit in zip(steps, branch, strict=True):
        assert commit["oid"] == uploads[step].commit
        assert f"checkpoint: {identities[step]}" in commit["description"].splitlines()
        folder = case.original.checkpoint(step)
        wanted = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        wanted = {place_of(name): path for name, path in wanted.items()} | {"llmtrain/config.yaml": case.run.config}
        assert set(commit["tree"]) == {*wanted, ".gitattributes"}
        for name, path in wanted.items():
            blob_id, size, sha256 = commit["tree"][name]
            assert size == path.stat().st_size
            assert files.sha256(path) == sha256 if sha256 else git_blob_id(path.read_bytes()) == blob_id
    best = plan.to_show(case.run, case.repo)
    assert best is not None
    shown = commits[repo["branches"]["main"]]
    assert shown["title"] == best.title()
    assert shown["tree"]["model.safetensors"] == commits[best.upload.commit]["tree"]["model.safetensors"]
    assert_nothing_sent_twice(case, state)


def place_of(name: str) -> str:
    """Where a checkpoint's file lies in the repository."""
    return f"llmtrain/{name}" if name == "manifest.json" else name.removeprefix("model/")


def assert_nothing_sent_twice(case: Case, state: dict[str, Any]) -> None:
    """A large object comes in full again only where a kill has ended the attempt before; a confirmed one never."""
    trees = {commit["oid"]: commit["tree"] for commit in state["repos"][case.repo]["commits"]}
    puts = [entry for entry in state["log"] if entry["method"] == "PUT"]
    wanted = again = 0
    for upload in ledger.uploads(case.run).values():
        for _, size, sha256 in trees[upload.commit].values():
            if sha256:
                own = [entry for entry in puts if entry["path"].startswith(f"/_storage/{sha256}/")]
                whole = [entry["started"] for entry in own if entry["complete"]]
                for one, other in itertools.pairwise(whole):
                    assert any(one < kill < other for kill in case.kills), f"{sha256[:8]}: sent twice without need"
                assert max(entry["started"] for entry in own) < upload.time, (
                    f"{sha256[:8]}: sent after it was confirmed"
                )
                wanted, again = wanted + size, again + len(whole) - 1
    received = sum(entry["received"] for entry in puts)
    print(f"large objects: {wanted:,} bytes to send, {received:,} received, {again} of {len(puts)} came in full again")


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)
