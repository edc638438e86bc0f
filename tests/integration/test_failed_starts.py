"""What a start that fails leaves behind: the reason, in the run folder; or nothing, where it is refused."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from llmtrain import errors, ledger
from llmtrain.config import load_config
from llmtrain.rundir import RunDir
from tests.support.jobs import status_of
from tests.support.runs import TIMEOUT_S, Workplace, environment

DIVERGES = ["optim.lr=1e30", "optim.clip_norm=null", "checkpoint.every_steps=null", "evaluate.also_at=[]"]


def test_why_a_run_failed_is_in_its_folder(workplace: Workplace):
    """Started with another terminal, in another night: the log, the events, status and the report say it."""
    output = workplace.train("run.name=failed", "log.report=true", *DIVERGES, code=errors.NotFinite.exit_code)
    assert output.count("A lower optim.lr") == 1
    assert "no checkpoint was saved before" in output
    run = RunDir(workplace.run_folder("failed"))
    assert re.search(r"ERROR error: step \d: loss .* no checkpoint was saved before\n$", run.log.read_text())
    (failed,) = [event for event in ledger.events(run) if event.kind == "failed"]
    assert failed.message.startswith("exit code 20: step ")
    (told,) = [problem for problem in status_of(run).problems if "training failed" in problem]
    assert told.endswith(f", {failed.message}")
    page = subprocess.run(
        [sys.executable, "-m", "launcher", "report", str(run.path)],
        env=environment(), text=True, capture_output=True, timeout=TIMEOUT_S, check=True,
    ).stdout.strip()  # fmt: skip
    assert "Training failed" in Path(page).read_text()
    workplace.train("run.name=failed", "train.steps=2", "run.resume=never")
    assert not any("training failed" in problem for problem in status_of(run).problems)


def test_a_bug_leaves_its_traceback_in_the_log(workplace: Workplace):
    broken = (
        "import runpy, sys; from llmtrain import trainer; trainer.seed_step = None; sys.argv[0] = 'llmtrain'; "
        "runpy.run_module('llmtrain', run_name='__main__')"
    )
    command = [sys.executable, "-c", broken, str(workplace.config), "run.name=crashed", "train.steps=2"]
    done = subprocess.run(
        command, cwd=workplace.folder, env=environment(), text=True, capture_output=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 1, done.stderr
    run = RunDir(workplace.run_folder("crashed"))
    assert "TypeError: 'NoneType' object is not callable" in run.log.read_text()
    last = ledger.events(run)[-1]
    assert (last.kind, last.message) == ("failed", "exit code 1: TypeError: 'NoneType' object is not callable")


def test_a_resume_that_is_refused_builds_no_shards_first(own_workplace: Workplace):
    own_workplace.train("run.name=first", "train.steps=4")
    shutil.rmtree(own_workplace.folder / "shards")
    refused = errors.RunFolderError.exit_code
    output = own_workplace.train("run.name=first", "data.split.test=0.1", "data.dir=other", code=refused)
    assert "data.split.test: the run has 0.05, now 0.1 (command line)" in output
    output = own_workplace.train("run.name=frist", "run.resume=must", code=errors.CheckpointError.exit_code)
    assert 'run.resume="must" (command line): runs/frist/checkpoints holds no checkpoint to resume from' in output
    assert not any((own_workplace.folder / name).exists() for name in ("shards", "other"))
    assert [path.name for path in (own_workplace.folder / "runs").iterdir()] == ["first"]


def test_a_run_that_has_come_further_keeps_its_length(workplace: Workplace):
    workplace.train("run.name=long", "train.steps=12")
    output = workplace.train("run.name=long", "train.steps=8", "service.batch_size=3")
    assert "nothing left to do, past the 8 asked for; a larger train.steps" in output
    run = RunDir(workplace.run_folder("long"))
    kept, _ = load_config(run.config)
    assert (kept.train.steps, kept.service.batch_size) == (12, 3)
    training = status_of(run).training
    assert (training.state, training.step, training.total_steps) == ("finished", 12, 12)
