"""What may be resumed: the same is said before a job is queued and when it starts."""

from pathlib import Path

import pytest
import torch

from launcher.checks import preflight
from launcher.cluster import Profile
from launcher.slurm.batch import JobSpec
from llmtrain import rank0, resume
from llmtrain.config import load_to_start
from llmtrain.errors import UserError
from llmtrain.rundir import RunDir
from llmtrain.service.beside import Companion
from llmtrain.world import World
from tests.support.checkpoint_runs import make_run, save


@pytest.mark.parametrize(
    ("settings", "damage", "said"),
    [
        (["optim.lr=0.1"], "", "optim.lr: the run has 0.002, now 0.1 (command line)"),
        ([], "config.yaml", "config.yaml: not readable by this version, so nothing can be resumed"),
        (["run.resume=must"], "checkpoints", "holds no checkpoint to resume from"),
        (["run.resume=never", "optim.lr=0.1"], "config.yaml", None),
        ([], "", None),
    ],
)
def test_a_job_is_refused_in_the_words_of_training(tmp_path: Path, settings: list[str], damage: str, said: str | None):
    names = [f"run.dir={tmp_path}", "run.name=mine"]
    run = make_run(tmp_path / "mine", *names)
    save(run, 5)
    if damage == "config.yaml":
        run.config.write_text("optim: {speed: 0.1}\n")
    elif damage:
        run.checkpoint(5).rename(tmp_path / "away")
    config, origins = load_to_start(None, [*names, *settings])
    job = JobSpec("mine", run.path, Profile(gpus_per_node=0, shared=[str(tmp_path)]))
    found = preflight._check_folder(config, origins, run, job)
    refused = [each.message for each in found if each.severity == "error"]
    if said is None:
        resume.check(run, config, origins)
        assert refused == []
    else:
        with pytest.raises(UserError) as caught:
            resume.check(run, config, origins)
        assert refused == [str(caught.value)]
        assert said in refused[0]


def test_a_new_start_is_made_beside_checkpoints_without_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """run.resume=never asks nothing of what was there before: its config.yaml may be gone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"line {number} of some text\n" for number in range(3000)))
    settings = [
        "data.sources=[{kind: text, paths: [text.txt]}]", "data.split={by: tail, heldout: 0.1}",
        "data.tokenizer.vocab_size=300", "model.context=16", "train.global_batch_size=8", "run.name=mine",
        "run.resume=never", "train.device=cpu", "service.start=never",
    ]  # fmt: skip
    config, origins = load_to_start(None, settings)
    run = make_run(tmp_path / "runs/mine")
    save(run, 5)
    run.config.unlink()
    run = RunDir(config.run.folder)
    world = World(0, 1, 0, torch.device("cpu"))
    assert rank0.prepare(config, origins, world, run, [], Companion(run, config)).resume_step is None
    assert run.checkpoint_steps() == []
    (aside,) = (tmp_path / "runs").glob("mine.*")
    assert RunDir(aside).checkpoint_steps() == [5]
