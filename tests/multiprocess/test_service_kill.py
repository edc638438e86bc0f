"""SIGKILL of the checkpoint service, of its children and of training beside it, against a Hub on the loopback.

Wherever it strikes and however often, the end is the same: every checkpoint has one score, one commit and a tag with
its very bytes, and nothing that was confirmed is sent again.
"""

import contextlib
import itertools
import json
import random
import re
import shutil
import signal
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

from llmtrain import choose, files, ledger, manifest, retention, rundir
from llmtrain.config import load_config
from llmtrain.rundir import RunDir
from llmtrain.service import beside, plan
from tests.multiprocess.test_kill import kill_all
from tests.support.hub_repos import git_blob_id
from tests.support.hub_server import HubProcess, client_environment
from tests.support.runs import TIMEOUT_S, Workplace, environment, make_workplace

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
CHILDS_POINTS = ["after-bytes", "after-commit", "after-tag", "after-publish"]
POINTS = ["before-score-record", "before-upload-record", *CHILDS_POINTS]
GONE_S = 2.0
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
        ours = {name: environment()[name] for name in ("OMP_NUM_THREADS", "PYTHONPATH")}
        env = {**client_environment(self.hub.endpoint, self.workplace.folder / "home"), **ours, **variables}
        with (self.workplace.folder / f"{self.name}.txt").open("ab") as output:
            return subprocess.Popen(
                command, cwd=self.workplace.folder, env=env, stdout=output, stderr=output, start_new_session=True
            )

    def drain(self) -> None:
        assert self.serve().wait(TIMEOUT_S) == 0, self.run.service_log.read_text()[-4000:]

    def kill(self, process: "subprocess.Popen[bytes] | psutil.Process") -> None:
        process.kill()
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


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With a run that waits for a service to be started."""
    workplace = make_workplace(tmp_path_factory.mktemp("night"))
    workplace.train("run.name=calm", "service.start=manual", *SETTINGS)
    return workplace


@pytest.fixture
def case(night: Workplace, request: pytest.FixtureRequest) -> Iterator[Case]:
    name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-")
    with HubProcess(night.folder / f"hub-{name}") as hub:
        case = Case(night, hub, name)
        try:
            yield case
        finally:
            for process in case.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


@contextlib.contextmanager
def looked_at(run: RunDir) -> Iterator[Counter[str]]:
    """Somebody reads all that can be read, all the time; what he sees is whole or it is not there."""
    ended, seen, errors = threading.Event(), Counter[str](), list[Exception]()

    def look() -> None:
        config, _ = load_config(run.config)
        while not ended.wait(0.05):
            try:
                ranked, status, hub = choose.ranking(run), ledger.status(run), ledger.hub_state(run)
                ledger.events(run)
                beside.waiting(run, config)
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
    ranked = choose.ranking(case.run)
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
    best = plan.best_uploaded(case.run, case.repo)
    assert best is not None
    shown = commits[repo["branches"]["main"]]
    assert shown["title"] == f"best so far: step {best.step}"
    assert shown["tree"]["model.safetensors"] == commits[best.commit]["tree"]["model.safetensors"]
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


def serve_until_killed(case: Case, draw: random.Random) -> str:
    """Kill a service some time after a moment that is drawn; returns its name."""
    began, scores, uploads = time.time(), len(ledger.scores(case.run)), len(ledger.uploads(case.run))
    service = case.serve()

    def is_at_work() -> bool:
        status = ledger.status(case.run)
        return status is not None and status.pid == service.pid

    def is_under_way(path: str) -> bool:
        log = [e for e in case.hub.state()["log"] if e["started"] > began and e["status"] is None]
        return any(re.search(path, f"{entry['method']} {entry['path']}") for entry in log)

    moments: dict[str, Callable[[], bool]] = {
        "starting": lambda: True,
        "at work": is_at_work,
        "scored": lambda: len(ledger.scores(case.run)) > scores,
        "sending": lambda: is_under_way("^PUT "),
        "committing": lambda: is_under_way("/commit/"),
        "confirmed": lambda: False,
    }
    name = draw.choice(list(moments))
    wait_until(lambda: moments[name]() or len(ledger.uploads(case.run)) > uploads or service.poll() is not None)
    time.sleep(draw.uniform(0, 1.5 if name == "starting" else 0.5))
    assert service.poll() is None, "nothing was left to do"
    case.kill(service)
    assert case.are_gone(GONE_S), f"alive after the service: {[process.cmdline() for process in case.processes()]}"
    return name


def kill_services(case: Case, kills: int, steps: list[int], seed: int) -> None:
    """Start a service and kill it, again and again; then let one work to the end."""
    draw = random.Random(seed)
    case.copy(steps)
    # Half a second for each, so that kills fall into them.
    for match, rate in {"^PUT ": 600_000, "^POST .*/commit/": 60_000}.items():
        case.hub.control(add=[{"kind": "slow_request", "match": match, "times": 10**6, "bytes_per_s": rate}])
    with looked_at(case.run) as seen:
        names = Counter(serve_until_killed(case, draw) for _ in range(kills))
        print(f"{kills} kills: {dict(names)}; {len(ledger.uploads(case.run))} of {len(steps)} were uploaded by then")
        case.drain()
    print(f"read meanwhile: {dict(seen)}")
    assert seen["ranking"] > 0
    assert_calm_end(case, steps)


def test_four_kills_of_the_service(case: Case):
    kill_services(case, kills=4, steps=STEPS[:5], seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 103))
def test_twenty_kills_of_the_service(case: Case, seed: int):
    kill_services(case, kills=20, steps=STEPS, seed=seed)


def end_at(case: Case, point: str, steps: list[int], with_service: bool) -> None:
    """A process dies at a named point; `with_service`: the service, whose child it was, too, as in a power cut."""
    marker = case.workplace.folder / f"{case.name}.crashed"
    case.copy(steps)
    service = case.serve(LLMTRAIN_CRASH_AT=f"{point}:{marker}")
    wait_until(lambda: marker.exists() or service.poll() is not None)
    assert marker.exists(), "it never came to that point"
    if with_service:
        case.kill(service)
    if point in CHILDS_POINTS and not with_service:
        assert service.wait(TIMEOUT_S) == 0  # it starts another child
    else:
        assert service.wait(TIMEOUT_S) == -signal.SIGKILL
        case.drain()
    assert_calm_end(case, steps)


@pytest.mark.parametrize("point", POINTS)
def test_a_process_ends_at(case: Case, point: str):
    end_at(case, point, STEPS[-2:], with_service=False)


@pytest.mark.soak
@pytest.mark.parametrize("point", CHILDS_POINTS)
def test_service_and_child_end_at(case: Case, point: str):
    end_at(case, point, STEPS[-3:], with_service=True)


def test_kills_in_the_middle_of_an_object(case: Case):
    """Larger than what the kernel takes from a client for the Hub: that arrives although the client is dead."""
    whole, rate, step = 12_000_000, 6_000_000, STEPS[-1]
    heavy = RunDir(case.workplace.run_folder("heavy"))
    case.copy([step])
    state = case.run.checkpoint(step) / "state" / "optimizer-00001-of-00001.safetensors"
    state.write_bytes(random.Random(1).randbytes(whole))
    described = manifest.read(case.run.checkpoint(step))
    added = manifest.describe_files(case.run.checkpoint(step), [state])
    manifest.write(case.run.checkpoint(step), described.model_copy(update={"files": {**described.files, **added}}))
    shutil.copytree(case.run.path, heavy.path)
    case.source = "heavy"
    case.hub.control(add=[{"kind": "slow_request", "match": "^PUT ", "times": 10**6, "bytes_per_s": rate}])

    def is_in_the_middle() -> bool:
        return any(whole // 8 < entry["received"] < whole for entry in case.hub.state()["log"][seen:])

    for _ in range(2):
        seen = len(case.hub.state()["log"])
        service = case.serve()
        wait_until(is_in_the_middle)
        case.kill(service)
    case.drain()
    cut = [e["received"] for e in case.hub.state()["log"] if e["method"] == "PUT" and not e["complete"]]
    print(f"bytes that had come when the sender died: {cut} of {whole}")
    assert len(cut) == 2
    assert_calm_end(case, [step])


def test_a_commit_that_the_hub_makes_after_its_sender_died(case: Case):
    """The service that comes next has looked and found none; the late one must not take the branch back."""
    case.copy(STEPS[-2:])
    path = f"/api/models/{case.repo}/commit/checkpoints"
    case.hub.control(add=[{"kind": "slow_request", "match": f"^POST {path}", "bytes_per_s": 6_000}])

    def commits() -> list[dict[str, Any]]:
        return [entry for entry in case.hub.state()["log"] if entry["path"] == path]

    service = case.serve()
    wait_until(lambda: bool(commits()))
    case.kill(service)
    case.drain()
    wait_until(lambda: commits()[0]["status"] is not None)
    print(f"answers to commits: {[entry['status'] for entry in commits()]}, {commits()[0]['received']:,} bytes late")
    assert_calm_end(case, STEPS[-2:])


def train_until(case: Case, what: Callable[[], bool]) -> "subprocess.Popen[bytes]":
    training = case.train()
    wait_until(lambda: training.poll() is not None or what())
    return training


def has_saved(case: Case) -> Callable[[], bool]:
    before = len(case.published())
    return lambda: len(case.published()) > before


def kill_training(case: Case, draw: random.Random) -> None:
    """Some time after it has saved something; the service lives on."""
    training = train_until(case, has_saved(case))
    with contextlib.suppress(subprocess.TimeoutExpired):
        training.wait(draw.uniform(0, 0.3))
    assert training.poll() is None, "training ended before it was killed"
    case.kill(training)
    print(f"killed training after {len(case.published())} saves, {len(ledger.uploads(case.run))} of them uploaded")


def kill_everything(case: Case, training: "subprocess.Popen[bytes]") -> None:
    """Training, the service and its children; then a service alone finishes what had been saved."""
    assert training.poll() is None, "training ended before it was killed"
    kill_all(training.pid)
    case.kill(training)
    for process in case.processes():  # a service that an earlier training has started
        process.kill()
    assert case.are_gone(GONE_S)
    steps = case.published()
    print(f"killed all after {len(steps)} saves, {len(ledger.uploads(case.run))} of them uploaded")
    case.drain()
    assert_calm_end(case, steps)


def train_to_the_end(case: Case) -> None:
    """Nothing shows that anything was killed."""
    assert case.train().wait(TIMEOUT_S) == 0  # waits for the service
    case.drain()  # waits until the service has ended
    assert case.workplace.weights(case.name) == case.workplace.weights("calm")
    assert case.workplace.ledger(case.name) == case.workplace.ledger("calm")
    assert_calm_end(case, STEPS)


def test_training_is_killed_then_the_service_then_both(case: Case):
    draw = random.Random(1)
    kill_training(case, draw)
    training = train_until(case, has_saved(case))
    status = ledger.status(case.run)
    assert status is not None
    case.kill(psutil.Process(status.pid))  # not this training's own: it found it at work
    started_anew = lambda: "service-started" in {event.kind for event in ledger.events(case.run)}  # noqa: E731
    wait_until(lambda: started_anew() or training.poll() is not None)
    assert started_anew()
    kill_everything(case, training)
    train_to_the_end(case)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 103))
def test_five_kills_of_training_beside_the_service(case: Case, seed: int):
    draw = random.Random(seed)
    for _ in range(5):
        kill_training(case, draw)
    train_to_the_end(case)


@pytest.mark.soak
@pytest.mark.parametrize(("saved", "uploaded"), [(1, 0), (4, 0), (8, 0), (1, 1), (1, 3), (1, 5)])
def test_kills_of_training_and_service(case: Case, saved: int, uploaded: int):
    training = train_until(case, lambda: len(case.published()) >= saved and len(ledger.uploads(case.run)) >= uploaded)
    kill_everything(case, training)
    train_to_the_end(case)


def test_a_starting_training_finishes_a_deletion_at_the_same_moment(case: Case):
    case.copy(STEPS[:2])
    retention.remove(case.run, STEPS[:1], on_rename=lambda: retention.remove_leftovers(case.run))
    assert case.run.checkpoint_steps() == STEPS[1:2]
