"""`llmtrain restore`: a run whose folder is lost comes back from the Hub, here on the loopback, and goes on."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain import errors
from llmtrain.rundir import RunDir
from tests.support.hub_server import Hub
from tests.support.runs import Workplace
from tests.support.service_runs import REPO, configure, run_module, serve, surroundings, tags, train

SETTINGS = ["train.steps=4", "checkpoint.every_steps=2", "service.start=manual", "hub.pause_s=0.2"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub
        assert not hub.bugs


@pytest.fixture(scope="module")
def lost(workplace: Workplace, hub: Hub) -> str:
    """A run with two checkpoints and their state on the Hub, whose folder is gone; returns its name."""
    train(workplace, "run.name=whose-folder-is-lost", *SETTINGS, f"hub.repo={REPO}", "hub.optimizer_state=true")
    serve(RunDir(workplace.run_folder("whose-folder-is-lost")), "--drain", env=surroundings(hub))
    assert tags(hub) == [2, 4]
    shutil.rmtree(workplace.run_folder("whose-folder-is-lost"))
    return "whose-folder-is-lost"


def restore(workplace: Workplace, hub: Hub, *words: str, code: int = 0) -> str:
    return run_module("launcher", "restore", *words, code=code, cwd=workplace.folder, env=surroundings(hub))


@pytest.mark.usefixtures("lost")
def test_it_goes_on_as_if_nothing_had_happened(workplace: Workplace, hub: Hub):
    train(workplace, "run.name=never-lost", "train.steps=8")
    said = restore(workplace, hub, REPO, "runs/back")
    assert "runs/back: step 4 verified; go on: python -m llmtrain runs/back/config.yaml" in said
    run = RunDir(workplace.run_folder("back"))
    assert run.checkpoint_steps() == [4]
    assert not list(run.path.parent.glob(".restoring*"))
    said = run_module("llmtrain", "runs/back/config.yaml", "train.steps=8", cwd=workplace.folder)
    assert "resuming   from step 4" in said
    assert workplace.weights("back") == workplace.weights("never-lost")
    serve(run, "--drain", env=surroundings(hub))  # the repository is still its own
    assert tags(hub) == [2, 4, 6, 8]


@pytest.mark.usefixtures("lost")
def test_an_earlier_step(workplace: Workplace, hub: Hub):
    restore(workplace, hub, REPO, "runs/earlier", "--step", "2")
    assert RunDir(workplace.run_folder("earlier")).checkpoint_steps() == [2]
    said = restore(workplace, hub, REPO, "runs/nothing", "--step", "3", code=errors.CheckpointError.exit_code)
    assert f"{REPO} holds no step 3; there are: 2, 4" in said


@pytest.mark.usefixtures("lost")
def test_what_cannot_be_restored_leaves_nothing(workplace: Workplace, hub: Hub):
    (workplace.folder / "runs/there").mkdir(parents=True)
    said = restore(workplace, hub, REPO, "runs/there", code=errors.RunFolderError.exit_code)
    assert "runs/there is there already" in said
    said = restore(workplace, hub, REPO, "runs/a b", code=errors.ConfigError.exit_code)
    assert "a b cannot be the name of a run" in said
    said = restore(workplace, hub, "tester/nobody", "runs/nothing", code=errors.HubError.exit_code)
    assert "the Hub refuses (404" in said
    assert "Traceback" not in said
    assert not workplace.run_folder("nothing").exists()


def test_without_the_optimizers_state_it_says_what_is_left(workplace: Workplace, hub: Hub):
    train(workplace, "run.name=weights", *SETTINGS)
    run = RunDir(workplace.run_folder("weights"))
    configure(run, hub_repo="tester/weights")
    serve(run, "--drain", env=surroundings(hub))
    said = restore(workplace, hub, "tester/weights", "runs/half", code=errors.CheckpointError.exit_code)
    assert "step 4 has no optimizer state on the Hub (hub.optimizer_state=false)" in said
    assert not Path(workplace.run_folder("half")).exists()
