"""The command that goes on with a run that has ended, to be pasted."""

import contextlib
import shlex
from pathlib import Path

from launcher.jobs import JobDir, JobRecord
from llmtrain import origin
from llmtrain.config import RunConfig
from llmtrain.origin import Origin
from llmtrain.rundir import RunDir


def command(run: RunDir, config: RunConfig | None) -> str:
    """As a job where it was submitted as one last, else here. In words where nobody has noted how it was started.

    Args:
        config: the run's own; None where this version cannot read it, as starting it will say.
    """
    jobs, started = JobDir.of(run), origin.read(run)
    record = jobs.last("train")
    again = _configuration(run, config, started)
    if record is not None and not _ran_here_since(jobs, record):
        words = ["llmtrain", "submit", *again]
        # Of an older version's job the name of the profile is known, not its file.
        words += record.options or ["--cluster", "FILE", "--nodes", str(record.nodes)]
    elif record is None and jobs.starts():
        return "the same sbatch command"
    elif started.num_machines > 1:
        return f"the same command on each of its {started.num_machines} machines"
    else:
        words = ["llmtrain", "run", *again, *_ranks(started)]
    there = f"cd {shlex.quote(str(started.folder))} && " if started.folder != Path.cwd() else ""
    return there + shlex.join(words)


def _ran_here_since(jobs: JobDir, record: JobRecord) -> bool:
    """Whether `llmtrain run` has kept the run going since that job was submitted."""
    with contextlib.suppress(FileNotFoundError):
        return jobs.local_lock.stat().st_mtime > record.time
    return False


def _configuration(run: RunDir, config: RunConfig | None, started: Origin) -> list[str]:
    """The run's own file, and settings over it with which it goes on right there."""
    words = [str(run.config if started.folder == Path.cwd() else run.config.absolute())]
    if config is not None and config.run.resume == "never":
        words.append("run.resume=auto")
    if config is not None and (started.folder / config.run.folder).resolve() != run.path.resolve():  # it was moved
        words += [f"run.dir={run.path.absolute().parent}", f"run.name={run.path.name}"]
    return words


def _ranks(started: Origin) -> list[str]:
    """As many as before; nothing where that is not known, or one process decides by itself."""
    if started.gpus_used:
        return ["--gpus", str(started.gpus_used)]
    if started.device != "cpu" or started.ranks is None:
        return []
    return ["--ranks", str(started.ranks)] if started.ranks > 1 else ["--gpus", "0"]
