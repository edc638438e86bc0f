"""`llmtrain restore`: a run folder from what the run's repository on the Hub holds, to go on with training.

Only what was uploaded comes back: a checkpoint with its optimizer state (hub.optimizer_state=true), the
configuration, and the identity that binds the repository to the run. Ledgers and TensorBoard begin anew.
"""

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from llmtrain import files, log, manifest
from llmtrain.config import load_config, resolved_yaml
from llmtrain.config.schema import RunSection
from llmtrain.errors import CheckpointError, ConfigError, HubError, RunFolderError, disk_errors, exit_with_code
from llmtrain.origin import Origin
from llmtrain.rundir import RunDir
from llmtrain.service.hub import client, explain
from llmtrain.service.remote import Repo, run_marker

_STALL_S = 300.0
_TAG = re.compile(r"step-(\d+)")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="llmtrain restore", description=__doc__)
    parser.add_argument("repo")
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int)
    options = parser.parse_args(arguments)
    log.set_up(0)
    set_client_factory(lambda: client(_STALL_S))
    with exit_with_code():
        restore(Repo(HfApi(token=get_token() or False), options.repo), RunDir(options.run), options.step)


def restore(repo: Repo, run: RunDir, step: int | None) -> None:
    """Download, verify every byte, and only then let the run folder appear. Started again, it goes on.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
        CheckpointError: that step is not there, is not what its manifest says, or has no optimizer state.
        RunFolderError: the folder is in use.
    """
    if run.path.exists():
        raise RunFolderError(f"{run.path} is there already; give the restored run a folder of its own")
    try:
        RunSection(name=run.path.name)
    except ValueError:
        raise ConfigError([f"{run.path.name} cannot be the name of a run: letters, digits, '.', '_' and '-'"]) from None
    aside = RunDir(run.path.with_name(f".restoring-{run.path.name}"))
    with disk_errors("run folder", run.path.parent):
        try:
            tag, commit, run_id = find(repo, step)
            log.info(f"{repo.name}: {tag} ({commit[:10]})")
            received = aside.path / "received"
            repo.api.snapshot_download(repo.name, revision=commit, local_dir=received)
        except HfHubHTTPError as error:
            raise HubError(explain(error, repo.name)["message"]) from None
        except (httpx2.HTTPError, HFValidationError) as error:
            raise HubError(f"{repo.name}: {type(error).__name__}: {error}; try again") from None
        arrange(received, aside, run, run_id)
        aside.path.rename(run.path)
    log.info(f"{run.path}: step {tag.removeprefix('step-')} verified; go on: python -m llmtrain {run.config}")


def find(repo: Repo, step: int | None) -> tuple[str, str, str]:
    """Tag, commit, and the identity of the run whose checkpoint it is: of this step, or of the newest."""
    tags = {int(found[1]): commit for tag, commit in repo.refs()[1].items() if (found := _TAG.fullmatch(tag))}
    if not tags:
        raise CheckpointError(f"{repo.name} holds no checkpoint of a run (no tag step-N)")
    wanted = max(tags) if step is None else step
    if wanted not in tags:
        there = ", ".join(str(number) for number in sorted(tags))
        raise CheckpointError(f"{repo.name} holds no step {wanted}; there are: {there}")
    message = dict(repo.commits()).get(tags[wanted], "")
    marked = [line for line in message.splitlines() if line.startswith(run_marker(""))]
    if not marked:
        raise CheckpointError(f"{repo.name}: the commit of step-{wanted} is not one of a run of ours")
    return f"step-{wanted}", tags[wanted], marked[0].removeprefix(run_marker(""))


def arrange(received: Path, aside: RunDir, run: RunDir, run_id: str) -> None:
    """Make a run folder of the files as the Hub has them: the model at the root, what is ours below llmtrain/."""
    described = manifest.read(received / "llmtrain")
    step = described.train_state.step
    if any(name.startswith("state/") for name in described.files) and not (received / "state").is_dir():
        raise CheckpointError(
            f"step {step} has no optimizer state on the Hub (hub.optimizer_state=false), so training cannot go on "
            "with it; the model alone loads with from_pretrained(REPO, revision=...)"
        )
    config, _ = load_config(received / "llmtrain" / "config.yaml")
    shutil.rmtree(aside.checkpoints, ignore_errors=True)  # of an attempt that was killed here
    folder = aside.checkpoint(step)
    for name in [*described.files, manifest.NAME]:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        (received / _on_the_hub(name)).rename(place)
    manifest.verify(folder)
    named = config.run.model_copy(update={"dir": str(run.path.parent), "name": run.path.name})
    files.write_atomic(aside.config, resolved_yaml(config.model_copy(update={"run": named})))
    files.write_atomic(aside.origin, Origin(id=run_id, folder=Path.cwd()).model_dump_json() + "\n")
    shutil.rmtree(received)


def _on_the_hub(name: str) -> str:
    return f"llmtrain/{name}" if name == manifest.NAME else name.removeprefix("model/")


if __name__ == "__main__":
    main()
