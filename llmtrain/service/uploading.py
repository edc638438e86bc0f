"""The upload lane: one child at a time talks to the Hub; what it confirmed is recorded here.

First the repository is looked at, then every checkpoint is uploaded, oldest first; scores, model card and the best
weights on `main` are gathered into a commit now and then. Nothing here gives up: after a failure there is a pause.
"""

import json
import time
from collections import Counter
from typing import Any

from llmtrain import files, ledger, log
from llmtrain.config import RunConfig
from llmtrain.ledger import Event, HubState, Upload
from llmtrain.rundir import RunDir
from llmtrain.service import crash, gone, plan
from llmtrain.service.children import Child, Pause
from llmtrain.service.niceness import niceness
from llmtrain.service.queue import Work
from llmtrain.service.scoring import last_line

Task = tuple[str, int | None]
"""What the child does, and to which step."""
_MODULE = "llmtrain.service.hub"
_REFUSED_S = 60.0
_LOOKS = 3
"""Attempts at what turns out not to be there, each followed by a check; after these a person has to look."""
_COMMITS_KEPT_FREE = 100
"""`main` is not renewed when so many commits were made within the hour (the Hub takes 128): weights go first."""


class Uploading:
    """Advanced at every turn of the service; never waits."""

    def __init__(self, run: RunDir, lock: int, pause_s: float):
        self._run, self._lock = run, lock
        self._child: Child | None = None
        self._task: Task = ("check", None)
        self._attempts: Counter[Task] = Counter()
        self._repo = ""
        """The repository that the child talks to."""
        self._checked: str | None = None
        self._seen: str | None = None
        """The repository of which this session knows what it still holds, of all that was ever uploaded."""
        self.pause = Pause(first_s=pause_s)
        self.last_error: str | None = None
        self.problem: str | None = None
        self._refused = "check"
        """The task that ran into `problem`, which only the same one clears when it succeeds."""

    @property
    def doing(self) -> str | None:
        if self._child is None:
            return None
        task, step = self._task
        match task:
            case "upload" if step is not None:
                return f"uploading step {step} (attempt {self._attempts[self._task]})"
            case "publish":
                return "renewing main on the Hub"
            case "untag":
                return "removing tags on the Hub"
            case _:
                return "looking at the Hub"

    def trusts_uploads(self, config: RunConfig) -> bool:
        """Whether an upload in the ledger is known to be on the Hub still: nothing is deleted here before."""
        return self._seen == config.hub.repo

    @property
    def is_looking(self) -> bool:
        """No contact has come to an end yet, well or badly."""
        return self._seen is None and self.last_error is None

    def waits(self, config: RunConfig, work: Work) -> bool:
        """Whether anything is still to be sent."""
        if config.hub.repo is None:
            return False
        if work.to_upload or self._checked != config.hub.repo:
            return True
        if work.uploads.keys() - ledger.uploads(self._run).keys():
            return True  # found gone after that look
        return plan.is_stale(self._run, config.hub.repo) or bool(plan.untaggable(self._run, config))

    def advance(self, config: RunConfig, work: Work, hurry: bool) -> list[tuple[int, str]]:
        """Returns the checkpoints that turned out to be altered, each with the reason."""
        if self._child is not None:
            return self._collect(self._child, config.hub.stall_s)
        if config.hub.repo is None or self.pause.left_s > 0:
            return []
        if self._checked != config.hub.repo:
            self._start("check", None, config)
        elif tasks := self._tasks(config, work, hurry):
            task = min(tasks, key=lambda task: self._attempts[task])  # one that fails blocks no other
            self._start(*task, config, len(tasks))
        return []

    def end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None

    def _tasks(self, config: RunConfig, work: Work, hurry: bool) -> list[Task]:
        """What there is to do: weights first, then tags, and last the model card, which tells of both."""
        tasks: list[Task] = [("upload", step) for step in work.to_upload]
        tasks += [("untag", step) for step in plan.untaggable(self._run, config)]
        return [*tasks, ("publish", None)] if self._is_due(config, work, hurry) else tasks

    def _start(self, task: str, step: int | None, config: RunConfig, waiting: int = 0) -> None:
        self._repo = config.hub.repo or ""
        arguments = [task, str(self._run.path), "--repo", self._repo]
        arguments += ["--stall", str(config.hub.stall_s), *([] if step is None else ["--step", str(step)])]
        self._task = (task, step)
        self._attempts[self._task] += 1
        environment = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
        nice = niceness(config.service.nice, waiting) if self._run.is_training() else 0
        self._child = Child(_MODULE, arguments, self._run.service_log, self._lock, environment, nice)

    def _collect(self, child: Child, stall_s: float) -> list[tuple[int, str]]:
        code, task, step = child.exit_code, *self._task
        if code is None:
            if (stalled := child.stalled_s()) > stall_s:
                self.end()
                self._fail("stalled", f"no progress for {stalled:.0f} s, ended")
            return []
        lines = child.lines()
        child.close()
        self._child = None
        if not lines:
            self._fail("upload-failed", f"its process ended with {code}: {last_line(self._run)}")
            return []
        answer = lines[-1]
        match answer.get("error"):
            case None:
                self._succeed(task, step, answer, child.seconds)
            case "altered" if step is not None:
                return [(step, answer["message"])]
            case "gone" if self._attempts[self._task] < _LOOKS:
                self._fail("upload-failed", answer["message"])
                self._checked = self._seen = None  # look what else is not there
            case "refused" | "gone":
                self._refuse(answer["message"], answer.get("retry_after_s", _REFUSED_S))
            case _:
                self._fail("upload-failed", answer["message"], answer.get("retry_after_s", 0.0))
        return []

    def _succeed(self, task: str, step: int | None, answer: dict[str, Any], seconds: float) -> None:
        self.pause.succeeded()
        attempts, repo = self._attempts.pop(self._task, 1), self._repo
        if task == "check":
            gone.record(self._run, repo, answer)
            self._seen = repo
        if task == "check" and self._refused != "check":  # what was refused since has not been tried again yet
            self._checked = repo
            return
        if self._refused in ("check", task):  # else what was refused waits still: `main` takes hardly any room
            if self.problem is not None and task != "check":
                self._checked = None  # look once more, which says that it is mended
            self.last_error, self.problem, self._refused = None, None, "check"
        match task:
            case "check":
                state = HubState(state="ok", message=answer["message"], repo=repo, private=answer["private"])
                if (before := ledger.hub_state(self._run)) is not None and before.state == "refused":
                    ledger.append(self._run.service_events, Event(kind="hub-accepted", message=answer["message"]))
                ledger.write(self._run.hub_state, state)
                self._checked = repo
                log.info(f"hub        {answer['message']}")
            case "upload" if step is not None:
                crash.point("before-upload-record")
                record = Upload(step=step, repo=repo, seconds=seconds, attempts=attempts, **answer["upload"])
                ledger.append(self._run.uploads, record)
                size = f"{record.size_bytes / 1e6:,.1f} MB"
                log.info(f"uploaded   step {step:,}: {size}, confirmed at {record.commit[:10]}, tag {record.tag}")
            case "publish":
                shown = {"digest": answer["digest"], "repo": repo, "time": time.time()}
                files.write_atomic(self._run.published, json.dumps(shown) + "\n")
                log.info(f"published  {answer['message']}")
            case _:
                assert step is not None
                crash.point("before-untag-record")
                known = ledger.uploads(self._run)[step]
                ledger.append(self._run.uploads, known.model_copy(update={"removed": True, "time": time.time()}))
                log.info(f"untagged   step {step:,}: not kept by the rule")

    def _fail(self, kind: ledger.EventKind, message: str, at_least_s: float = 0.0) -> None:
        pause = self.pause.failed(at_least_s)
        task, step = self._task
        self.last_error = f"{task}{'' if step is None else f' of step {step}'}: {message}; next try in {pause:.0f} s"
        log.warning(self.last_error)
        ledger.append(self._run.service_events, Event(kind=kind, message=self.last_error, step=step))
        if task == "check":
            ledger.write(self._run.hub_state, HubState(state="unreachable", message=self.last_error, repo=self._repo))

    def _refuse(self, message: str, pause_s: float) -> None:
        """Something that a person has to mend: said once, looked at again now and then."""
        self.pause.failed(pause_s)
        self._checked, self._refused = None, self._task[0]
        if self.problem == message:
            return
        self.problem = self.last_error = message
        log.warning(f"HUB: {message}")
        ledger.append(self._run.service_events, Event(kind="hub-refused", message=message))
        ledger.write(self._run.hub_state, HubState(state="refused", message=message, repo=self._repo))

    def _is_due(self, config: RunConfig, work: Work, hurry: bool) -> bool:
        """Main is out of date, and its turn has come: now and then while training goes on, at once at the end."""
        if config.hub.repo is None or not plan.is_stale(self._run, config.hub.repo):
            return False
        is_training = self._run.is_training()
        now = time.time()  # what lies ahead of it was noted by a clock that was ahead, and says nothing
        within_the_hour = [u for u in ledger.uploads(self._run).values() if 0 <= now - u.time < 3600]
        if len(within_the_hour) >= _COMMITS_KEPT_FREE and (is_training or work.to_upload):
            return False  # at the end there are no weights left to keep commits free for, and training waits for main
        last = self._run.published.stat().st_mtime if self._run.published.exists() else 0.0
        return hurry or not is_training or not 0 <= now - last < config.hub.publish_every_s
