"""The checkpoint service in tests: it knows a run by its folder alone, so that copies of a trained one will do."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from llmtrain import files, jsonl, ledger, manifest
from llmtrain.ledger import Score, Upload
from llmtrain.rundir import RunDir
from tests.support.hub_server import TOKEN, Commit, Hub, HubProcess, client_environment
from tests.support.runs import Workplace, environment

REPO = "tester/run"
TIMEOUT_S = 120
MANY_SAVES = (
    "service.start=manual", "checkpoint.every_steps=1", "checkpoint.keep_last=100", "evaluate.every_steps=null",
    "evaluate.train_rows=0", 'evaluate.sample.prompt=""', "optim.lr=0.05", "optim.schedule.warmup_steps=2",
    "optim.schedule.kind=constant",
)  # fmt: skip
"""A checkpoint per step that nobody looks after, and a held-out loss that goes up and down."""


def surroundings(hub: Hub | HubProcess | None = None, token: str | None = TOKEN, crash: str = "") -> dict[str, str]:
    """The environment of a process, with that Hub as the only one; `crash`: see llmtrain/service/crash.py."""
    endpoint = hub.endpoint if hub is not None else "http://127.0.0.1:9"
    home = hub.folder / "client" if isinstance(hub, Hub) else Path("no-home-of-the-hubs-client")
    ours = {name: environment()[name] for name in ("OMP_NUM_THREADS", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")}
    return {**client_environment(endpoint, home, token), **ours, **({"LLMTRAIN_CRASH_AT": crash} if crash else {})}


def run_module(*words: str, code: int = 0, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """`python -m WORDS` to its end; returns what it said. Fails the test on any other exit code."""
    return run_python("-m", *words, code=code, cwd=cwd, env=env)


def run_python(*words: str, code: int = 0, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd, env=env or surroundings(), text=True, capture_output=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == code, f"exit code {done.returncode} instead of {code}:\n{output[-4000:]}"
    return output


def train(workplace: Workplace, *settings: str, ranks: int = 1, env: dict[str, str] | None = None) -> str:
    """Like `Workplace.train`, with an environment of its own."""
    return run_python(*workplace.command(*settings, ranks=ranks)[1:], cwd=workplace.folder, env=env)


def serve(run: RunDir, *options: str, code: int = 0, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """The service on a run, to its end."""
    return run_module("llmtrain.service", "--run", str(run.path), *options, code=code, cwd=cwd, env=env)


@contextmanager
def serving(run: RunDir, *options: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """The service at work beside the test; what it says goes to said.txt in the run folder."""
    with (run.path / "said.txt").open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmtrain.service", "--run", str(run.path), *options],
            env=env or surroundings(), stdout=said, stderr=said,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        wait_until(lambda: not run.is_served())  # its children hold the lock until they have ended too


def end_service(run: RunDir) -> None:
    """End the service that training has started, unless it has ended by itself."""
    if run.is_served() and (status := ledger.status(run)) is not None:
        with contextlib.suppress(psutil.NoSuchProcess):  # the one that wrote it; another may be at work since
            process = psutil.Process(status.pid)
            if "llmtrain.service" in process.cmdline():
                process.kill()
    wait_until(lambda: not run.is_served())


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Look until it holds; returns what it then says."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return result


def copy_run(
    workplace: Workplace, source: str, name: str, steps: Collection[int], scored: bool = True, **settings: Any
) -> RunDir:
    """A run of its own, made of some checkpoints of another one, with their scores or without.

    `settings`: hub_repo="user/name" for `hub.repo` in its configuration.
    """
    old, new = RunDir(workplace.run_folder(source)), RunDir(workplace.run_folder(name))
    new.create()
    for file in old.path.iterdir():
        if file.is_file() and file.name != "lock":
            shutil.copy(file, new.path)
    scores = ledger.scores(old) if scored else {}
    for step in steps:
        shutil.copytree(old.checkpoint(step), new.checkpoint(step))
        if step in scores:
            ledger.append(new.scores, scores[step])
            losses = old.losses(step, scores[step].checkpoint, "heldout")
            new.losses(step, scores[step].checkpoint, "heldout").parent.mkdir(exist_ok=True)
            shutil.copy(losses, new.service / "losses")
    started = json.loads(new.origin.read_text()) | {"id": name}
    new.origin.write_text(json.dumps(started))
    configure(new, run_name=name, **settings)
    if scored:
        assert ledger.scores(new).keys() == set(steps)
    return new


def configure(run: RunDir, **settings: Any) -> None:
    """Change the configuration in the run folder."""
    config = yaml.safe_load(run.config.read_text())
    for name, value in settings.items():
        section, _, key = name.partition("_")
        config[section][key] = value
    files.write_atomic(run.config, yaml.safe_dump(config, sort_keys=False))  # a service may be reading it


def flip(path: Path, at: int = -5) -> None:
    """One bit of the byte there."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def status_of(run: RunDir) -> dict[str, Any]:
    """What `llmtrain status` says."""
    (status,) = json.loads(run_module("launcher", "status", str(run.path), "--json"))
    return status


def score_records(run: RunDir) -> list[Score]:
    """All of the ledger, not only the last one of each step."""
    return [Score.model_validate(record) for record in jsonl.read(run.scores)]


def upload_records(run: RunDir) -> list[Upload]:
    return [Upload.model_validate(record) for record in jsonl.read(run.uploads)]


def checkpoint_commits(hub: Hub, repo: str = REPO) -> list[Commit]:
    """Those that brought a checkpoint, oldest first."""
    if repo not in hub.repos or "checkpoints" not in hub.repos[repo].branches:
        return []
    return [commit for commit in reversed(hub.commits(repo, "checkpoints")) if "checkpoint: " in commit.description]


def tags(hub: Hub, repo: str = REPO) -> list[int]:
    """Steps that have a tag."""
    return sorted(int(tag.removeprefix("step-")) for tag in hub.repos[repo].tags) if repo in hub.repos else []


def shown_on_main(hub: Hub, repo: str = REPO) -> int:
    """The step whose weights are on `main`: the manifest beside them says it."""
    return json.loads(hub.read(repo, f"llmtrain/{manifest.NAME}"))["train_state"]["step"]


def processes_below(pid: int) -> list[list[str]]:
    """Command lines of a process and of all that it started, as they are now."""
    found: list[list[str]] = []
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            found.append(one.cmdline())
    except psutil.Error:
        pass
    return found


def files_with(folder: Path, content: bytes) -> list[Path]:
    """Files below a folder in which these bytes stand."""
    return [
        Path(place) / name
        for place, _, names in os.walk(folder)
        for name in names
        if content in (Path(place) / name).read_bytes()
    ]
