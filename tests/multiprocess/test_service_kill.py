"""SIGKILL of the checkpoint service, of its children and of training beside it, against a Hub on the loopback.

Wherever it strikes and however often, the end is the same: every checkpoint has one score, one commit and a tag with
its very bytes, and nothing that was confirmed is sent again.
"""

import contextlib
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from llmtrain import ledger, manifest, retention
from llmtrain.rundir import RunDir
from tests.multiprocess.test_kill import family, kill_all
from tests.support.hub_server import HubProcess
from tests.support.runs import TIMEOUT_S, Workplace, make_workplace
from tests.support.service_kills import (
    GONE_S,
    SETTINGS,
    STEPS,
    Case,
    assert_calm_end,
    looked_at,
    wait_until,
)

CHILDS_POINTS = ["after-bytes", "after-commit", "after-tag", "after-publish"]
POINTS = ["before-score-record", "before-upload-record", *CHILDS_POINTS]


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
    whole, rate, step = 12_000_000, 3_000_000, STEPS[-1]
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
    wait_until(lambda: bool(commits()) and commits()[0]["received"] > 0)
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
    kill_all(family(training.pid))
    case.kill(training)
    for process in case.processes():  # a service that an earlier training has started
        with contextlib.suppress(psutil.NoSuchProcess):
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
