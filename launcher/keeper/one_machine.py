"""`llmtrain run`: a run on this machine, kept going."""

import tempfile
from pathlib import Path

from launcher.jobs import JobDir
from launcher.keeper.meeting import Meeting
from launcher.keeper.supervisor import Rules, Supervisor
from launcher.keeper.torchrun import Start
from llmtrain.config import load_config
from llmtrain.config.load import split_settings
from llmtrain.rundir import RunDir


def train_here(start: Start, rules: Rules) -> int:
    """Until the run ends; returns its exit code.

    Raises:
        ConfigError: found before anything is started.
    """
    config, _ = load_config(*split_settings(start.words))
    run = RunDir(Path(config.run.dir) / config.run.name)
    jobs = JobDir.of(run)
    jobs.stop.unlink(missing_ok=True)  # of an earlier job
    with tempfile.TemporaryDirectory(prefix="llmtrain-") as folder:
        supervisor = Supervisor(start, run, rules, Meeting(Path(folder)), jobs.path / "local" / "ranks", jobs.stop)
        return supervisor.supervise()
