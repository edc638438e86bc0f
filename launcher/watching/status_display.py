"""How `llmtrain status` shows what `status` has gathered: a block for one run, a line each for several."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from launcher.display import Column, duration, figure, fitted, named, one_line, unfolded, when
from launcher.watching import queue_view
from launcher.watching.queue_view import find_submitted, read_queue
from launcher.watching.status import Hub, RunStatus, ServiceStatus, TrainingStatus, read_status_or_why
from llmtrain import ledger, locks
from llmtrain.wording import listed, name_steps

REFRESH_S = 2.0
_STALE_S = 30.0
"""The service says something every few seconds; silent for longer than this, it may hang."""
_COLOURS = {
    "running": "green", "starting": "green", "stopped": "yellow", "ended early": "cyan", "finished": "cyan",
    "not started": "dim", "unreadable": "red",
}  # fmt: skip


def show_status(paths: Sequence[Path], json_too: bool, watch: bool) -> None:
    """Print it; with `watch` again and again, until Ctrl-C.

    Raises:
        RunFolderError: there is no run in one of these places, and none is on its way there.
    """
    try:
        if watch:
            _watch(paths, json_too)
        else:
            _print(paths, json_too, Console(highlight=False))
    except KeyboardInterrupt:
        return


def _watch(paths: Sequence[Path], json_too: bool) -> None:
    console = Console(highlight=False)
    if json_too or not console.is_terminal:  # for programs and files: one after the other
        while True:
            _print(paths, json_too, console)
            time.sleep(REFRESH_S)
    with Live(console=console, auto_refresh=False) as live:
        while True:  # looks for runs each time: new ones appear
            live.update(render(_read(paths), console.width), refresh=True)
            time.sleep(REFRESH_S)


def _read(paths: Sequence[Path]) -> list[RunStatus]:
    runs = find_submitted(paths)
    queue = read_queue(runs)
    return [read_status_or_why(run, queue) for run in runs]


def _print(paths: Sequence[Path], json_too: bool, console: Console) -> None:
    statuses = _read(paths)
    if json_too:
        print(json.dumps(as_json(statuses), indent=1, allow_nan=False), flush=True)
    else:
        console.print(render(statuses, console.width), crop=False)


def as_json(statuses: Sequence[RunStatus]) -> list[dict[str, Any]]:
    """For programs: the fields of `RunStatus`. JSON has no infinity and no NaN, such as the loss of a run that
    diverged: null."""

    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if isinstance(value, ledger.Status | ledger.HubState) else str(value)

    every = [dataclasses.asdict(status) for status in statuses]
    return json.loads(json.dumps(every, default=plain), parse_constant=lambda _: None)


def render(statuses: Sequence[RunStatus], width: int) -> RenderableType:
    return block(statuses[0]) if len(statuses) == 1 else overview(statuses, width)


def overview(statuses: Sequence[RunStatus], width: int) -> RenderableType:
    """One line per run; below it what a person has to mend."""
    trainings = [status.training for status in statuses]
    heldouts = [t.heldout for t in trainings]
    proposals = [status.checkpoints.proposed for status in statuses]
    bests = [status.checkpoints.best for status in statuses]
    columns = [
        Column("run", [one_line(str(status.path)) for status in statuses], 100, left=True),
        Column("training", [t.state for t in trainings], 95, left=True),
        Column("queue", [queue_view.word(s.jobs, s.slurm, s.time) for s in statuses], 92, left=True),
        Column("step", ["" if t.state == "unreadable" else progress(t) for t in trainings], 90),
        Column("left", ["" if t.left_s is None else duration(t.left_s) for t in trainings], 50),
        Column("epoch", [figure(t.epoch, 2) for t in trainings], 30),
        Column("loss", [figure(t.loss) for t in trainings], 40),
        Column("held-out", [figure(None if h is None else h[1]) for h in heldouts], 85),
        Column("best", ["" if best is None else f"{best[0]:,}" for best in bests], 45),
        Column("use", ["" if chosen is None else f"{chosen[0]:,}" for chosen in proposals], 80),
        Column("service", [_service_word(status) for status in statuses], 70, left=True),
        Column("Hub", [_hub_word(status.hub) for status in statuses], 60, left=True),
        Column("last line", [_ago(status) for status in statuses], 55),
    ]
    table, left_out = fitted(columns, [_COLOURS.get(t.state, "") for t in trainings], width)
    parts: list[RenderableType] = [table]
    silence = next((status.slurm for status in statuses if status.slurm is not None), None)
    if any(status.problems for status in statuses) or left_out or silence:
        parts.append(Text())
    if silence is not None:
        parts.append(named("queue", f"SLURM does not answer: {silence}", "yellow"))
    for status in statuses:
        parts += [named("mend", f"{one_line(str(status.path))}: {one_line(p)}", "red") for p in status.problems]
    if left_out:
        parts.append(named("left out", f"{', '.join(left_out)} (a wider terminal shows them; --json all)", "dim"))
    return Group(*parts)


def progress(training: TrainingStatus) -> str:
    total = training.total_steps
    return f"{training.step:,}" if total is None else f"{training.step:,}/{total:,}"


def _ago(status: RunStatus) -> str:
    written = status.training.written
    return "" if written is None else f"{duration(status.time - written)} ago"


def _service_word(status: RunStatus) -> str:
    service = status.service
    if not status.path.exists() or status.training.state == "unreadable":
        return ""
    if not service.wanted:
        return "none"
    waiting = len(status.checkpoints.not_scored) + (0 if status.hub is None else len(status.hub.waiting))
    queue = f", {waiting} wait" if waiting else ""
    return f"{'at work' if service.at_work else 'not running'}{queue}"


def _hub_word(hub: Hub | None) -> str:
    if hub is None:
        return ""
    if hub.state is not None and hub.state.state == "refused":
        return "refused"
    return f"{len(hub.confirmed)} up, {len(hub.waiting)} wait" if hub.waiting else f"{len(hub.confirmed)} up"


def block(status: RunStatus) -> RenderableType:
    """Everything about one run."""
    lines: list[RenderableType] = [Text(one_line(str(status.path)), style="bold")]
    mend = [named("mend", one_line(problem), "bold red") for problem in status.problems]
    for number, job in enumerate(status.jobs):
        lines.append(named("" if number else "queue", *queue_view.describe(job, status.slurm)))
    if status.jobs and not status.path.exists() and status.training.state != "starting":
        comes = any(job.kind == "train" and not job.is_over for job in status.jobs)
        text = "not started; its folder comes when the job starts" if comes else "not started"
        return Group(*lines, named("training", text, "dim"), *mend)
    if status.training.state == "unreadable":
        return Group(*lines, *mend)
    lines.append(named("training", *_training_line(status)))
    lines += [named("", text) for text in _training_figures(status)]
    lines.append(named("checkpoints", _checkpoints_line(status)))
    lines += _service_lines(status)
    if status.hub is not None:
        lines.append(named("Hub", _hub_line(status.hub)))
    if status.again is not None:
        lines.append(unfolded("go on", status.again))
    return Group(*lines, *mend)


def _training_line(status: RunStatus) -> tuple[str, str]:
    training = status.training
    who = "" if training.who is None or training.state == "finished" else one_line(training.who)
    held = f" ({who})" if training.state in ("running", "starting") and who else f" (it was {who})" if who else ""
    text = f"{training.state}{held}"
    if training.written is not None:
        share = f" ({training.step / training.total_steps:.0%})" if training.total_steps else ""
        total = "" if training.total_steps is None else f" of {training.total_steps:,}"
        text += f", step {training.step:,}{total}{share}, epoch {figure(training.epoch, 2)}"
    return text, _COLOURS.get(training.state, "")


def _training_figures(status: RunStatus) -> list[str]:
    training = status.training
    lines: list[str] = []
    if training.loss is not None:
        heldout = f", held-out {training.heldout[1]:.4f} at step {training.heldout[0]:,}" if training.heldout else ""
        lines.append(f"loss {training.loss:.4f}{heldout}")
    if training.tokens_per_s is not None:
        left = "" if training.left_s is None else f", about {duration(training.left_s)} left"
        lines.append(f"{training.tokens_per_s:,.0f} learned tokens/s on average since it was last started{left}")
    if training.written is not None:
        lines.append(f"last step written {_ago(status)}, {when(training.written)}")
    if training.early_stop is not None:
        lines.append(f"asked to end early: {one_line(training.early_stop)}")
    return lines


def _checkpoints_line(status: RunStatus) -> str:
    found = status.checkpoints
    if found.last is None and found.best is None:
        return "none yet"
    parts = ["none on disk" if found.last is None else f"last step {found.last:,}, {len(found.on_disk)} on disk"]
    if found.best is not None:
        parts.append(f"best step {found.best[0]:,} ({found.best[1]:.4f})")
    if found.proposed is not None:
        same = found.proposed == found.best
        at_save = ", measured at the save" if found.proposed[0] in found.not_scored else ""
        parts.append(f"use step {found.proposed[0]:,}" + ("" if same else f" ({found.proposed[1]:.4f}{at_save})"))
    if found.best is None:
        never = not status.service.wanted and not status.service.at_work
        parts.append("never scored from disk (service.start=never)" if never else "none scored from disk yet")
    return "; ".join(parts)


def _service_lines(status: RunStatus) -> list[RenderableType]:
    service, said = status.service, status.service.status
    if not service.wanted and not service.at_work:
        return [named("service", "none (service.start=never)", "dim")]
    if not service.at_work:
        return [named("service", *_idle_line(status)), *_last_error(service)]
    if said is None:
        return [named("service", "starting", "green")]
    doing = listed(one_line(what) for what in said.doing) if said.doing else "nothing to do"
    lines: list[RenderableType] = [
        named("service", f"at work ({one_line(locks.name(said.pid, said.host))}): {doing}", "green")
    ]
    queues = {"score": said.to_score, "upload": said.to_upload}
    waiting = [f"{len(queue)} to {what} ({name_steps(queue)})" for what, queue in queues.items() if queue]
    if waiting:
        lines.append(named("", ", ".join(waiting)))
    if said.next_try_s is not None:
        lines.append(named("", f"next try in {duration(max(0.0, said.next_try_s - (status.time - said.time)))}"))
    if status.time - said.time > _STALE_S:
        lines.append(named("", f"it has said nothing for {duration(status.time - said.time)}", "yellow"))
    return [*lines, *_last_error(service)]


def _idle_line(status: RunStatus) -> tuple[str, str]:
    """What waits for a service that is not there."""
    if not status.waits:
        return "not running; nothing waits", ""
    since = "" if status.service.status is None else f" since {when(status.service.status.time)}"
    command = ledger.drain_command(status.path)
    return f"not running{since}: {', '.join(status.waits)}. Training starts it, or: {command}", "yellow"


def _last_error(service: ServiceStatus) -> list[RenderableType]:
    said = service.status
    if said is None or said.last_error is None or said.last_error == said.problem:
        return []
    return [named("last error", f"{one_line(said.last_error)} ({when(said.time)})", "yellow")]


def _hub_line(hub: Hub) -> str:
    state = hub.state
    if state is None:
        how = "not contacted yet"
    elif state.state == "ok":
        how = {True: "private", False: "PUBLIC", None: "not known whether private"}[state.private]
    else:
        how = f"{state.state} ({one_line(state.message)})"
    waiting = f", {name_steps(hub.waiting)} waiting" if hub.waiting else ""
    return f"{one_line(hub.repo)}: {how}; {len(hub.confirmed)} confirmed there{waiting}"
