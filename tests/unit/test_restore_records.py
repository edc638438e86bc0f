"""`llmtrain restore` in this process: what comes back beside the weights, and whom it may not harm."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from launcher.runs import runs_below
from llmtrain import ledger, log, manifest, origin
from llmtrain.config import resolved_yaml
from llmtrain.errors import EXIT_INTERRUPTED, CheckpointError, RunFolderError
from llmtrain.resume import fixed_differences
from llmtrain.rundir import RunDir
from llmtrain.service import hub as conversation
from llmtrain.service import plan, publish, restore
from llmtrain.service.remote import BRANCH, Repo
from tests.support import hub_client
from tests.support.checkpoint_runs import config_of, make_run, save, score
from tests.support.hub_client import REPO, add, commit
from tests.support.hub_server import TOKEN, Hub
from tests.support.service_runs import shown_on_main

hub, waits, api = hub_client.hub, hub_client.waits, hub_client.api
LOSSES = {100: 3.0, 200: 3.4, 300: 3.9}
BASE = '{"model.safetensors": {"size_bytes": 1, "modified_ns": 2, "sha256": "abc"}}\n'


def make_lost(folder: Path, with_state: bool = True) -> RunDir:
    """Not yet lost: a run with three scored checkpoints, of which the first is the best."""
    run = make_run(folder, f"hub.optimizer_state={with_state}".lower())
    origin.note(run, "cpu", 1, 1)
    for step, loss in LOSSES.items():
        save(run, step, loss)
        score(run, step, loss)
    return run


def send(api: HfApi, run: RunDir) -> None:
    """All that the service would send, with the repository's name on its command line alone (`push --repo`)."""
    repo, config = Repo(api, REPO), config_of(run)
    assert config.hub.repo is None
    conversation.check(repo, config, run)
    for step in run.checkpoint_steps():
        answer = conversation.upload(repo, config, run, step, TOKEN)
        ledger.append(run.uploads, ledger.Upload(step=step, repo=REPO, **answer["upload"]))
    publish.publish(repo, config, run)


@pytest.fixture
def lost(tmp_path: Path, api: HfApi) -> RunDir:
    run = make_lost(tmp_path / "lost")
    run.base.write_text(BASE)
    send(api, run)
    return run


def brought_back(api: HfApi, folder: Path, step: int | None = None) -> RunDir:
    run = RunDir(folder)
    restore.restore(Repo(api, REPO), run, step)
    return run


def test_main_goes_on_showing_the_best_checkpoint(hub: Hub, api: HfApi, lost: RunDir, tmp_path: Path):
    scores, uploads = ledger.scores(lost), ledger.uploads(lost)
    assert shown_on_main(hub) == 100
    shutil.rmtree(lost.path)
    run = brought_back(api, tmp_path / "back")
    assert run.checkpoint_steps() == [300]
    assert ledger.scores(run) == scores
    fields = {"step", "checkpoint", "repo", "commit", "tag", "removed"}
    assert {s: u.model_dump(include=fields) for s, u in ledger.uploads(run).items()} == {
        s: u.model_dump(include=fields) for s, u in uploads.items()
    }
    shown = plan.to_show(run, REPO)
    assert shown is not None
    assert shown.title() == "best so far: step 100"
    assert conversation.upload(Repo(api, REPO), config_of(run), run, 300, TOKEN)["upload"]["commit"]  # still its own
    publish.publish(Repo(api, REPO), config_of(run), run)
    assert shown_on_main(hub) == 100
    assert hub.read(REPO, "llmtrain/scores.jsonl") == run.scores.read_bytes()
    assert "| 200 | " in hub.read(REPO, "README.md").decode()
    assert sorted(path.name for path in run.path.iterdir()) == [
        "base.json",
        "checkpoints",
        "config.yaml",
        "origin.json",
        "service",
    ]


def test_the_newest_is_the_one_that_was_saved_last(
    hub: Hub, api: HfApi, lost: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Not the highest step, which may be of a life that `restore --step` has abandoned."""
    run = brought_back(api, tmp_path / "back", 100)
    save(run, 200, 2.5, content="of the second life")
    conversation.upload(Repo(api, REPO), config_of(run), run, 200, TOKEN)
    assert lost.checkpoint_steps() == [100, 200, 300]
    with caplog.at_level(logging.WARNING):
        again = brought_back(api, tmp_path / "again")
    assert again.checkpoint_steps() == [200]
    assert f"{REPO}: step 200 was saved last; step 300 before it (--step 300 takes that)" in caplog.text
    assert brought_back(api, tmp_path / "first", 300).checkpoint_steps() == [300]


def test_an_upload_that_came_late_is_not_the_newest(api: HfApi, tmp_path: Path):
    """One that fails holds up nothing: the next one was uploaded before it."""
    run = make_lost(tmp_path / "lost")
    conversation.check(Repo(api, REPO), config_of(run), run)
    for number, step in enumerate((100, 200, 300)):
        os.utime(run.checkpoint(step) / manifest.NAME, (1e9 + number, 1e9 + number))
    for step in (100, 300, 200):
        conversation.upload(Repo(api, REPO), config_of(run), run, step, TOKEN)
    assert brought_back(api, tmp_path / "back").checkpoint_steps() == [300]


def test_tagged_checkpoints_come_back_from_a_branch_that_was_squashed(api: HfApi, lost: RunDir, tmp_path: Path):
    """Tags that are not ours are passed over, unless they are asked for."""
    api.super_squash_history(REPO, branch=BRANCH)
    api.create_tag(REPO, tag="step-1000", revision="main")
    run = brought_back(api, tmp_path / "back")
    assert run.checkpoint_steps() == [300]
    assert sorted(ledger.uploads(run)) == [100, 200, 300]
    assert ledger.scores(run) == ledger.scores(lost)
    assert brought_back(api, tmp_path / "earlier", 100).checkpoint_steps() == [100]
    with pytest.raises(CheckpointError, match="the commit of step-1000 is not one of a run of ours"):
        brought_back(api, tmp_path / "foreign", 1000)


def test_scores_that_cannot_be_read_are_left_out(api: HfApi, lost: RunDir, tmp_path: Path):
    commit(api, add("llmtrain/scores.jsonl", b'{"step": "many"}\n'))
    run = brought_back(api, tmp_path / "back", 200)
    assert not run.scores.exists()
    assert sorted(ledger.uploads(run)) == [100, 200, 300]
    assert lost.path.name != run.path.name


@pytest.mark.usefixtures("lost")
def test_it_uploads_to_the_repository_that_it_came_from(api: HfApi, tmp_path: Path):
    config = config_of(brought_back(api, tmp_path / "back"))
    assert (config.hub.repo, config.run.name, config.hub.optimizer_state) == (REPO, "back", True)


@pytest.mark.usefixtures("lost")
def test_what_its_base_was_is_not_forgotten(hub: Hub, api: HfApi, tmp_path: Path):
    assert hub.read(REPO, "llmtrain/base.json", "step-300").decode() == BASE
    assert brought_back(api, tmp_path / "back").base.read_text() == BASE


def test_a_repository_may_not_let_a_base_run_code(api: HfApi, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = make_run(tmp_path / "run", "hub.optimizer_state=true", "model.kind=qlora", "model.base=some/base")
    run.config.write_text(run.config.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    assert config_of(run).model.trust_remote_code  # pyright: ignore[reportAttributeAccessIssue]
    origin.note(run, "cpu", 1, 1)
    save(run, 100)
    score(run, 100, 3.0)
    send(api, run)
    back = brought_back(api, tmp_path / "back")
    assert not config_of(back).model.trust_remote_code  # pyright: ignore[reportAttributeAccessIssue]
    assert "trained with model.trust_remote_code=true, which is off here" in caplog.text
    on_again = [*fixed_differences(config_of(back), config_of(run))]
    assert [key for key, _, _ in on_again if key.startswith("model")] == []


def test_what_an_attempt_at_another_repository_left_does_not_come_with_it(api: HfApi, lost: RunDir, tmp_path: Path):
    shutil.rmtree(lost.path)
    left = tmp_path / ".restoring-back"
    (left / "checkpoints").mkdir(parents=True)
    (left / "config.yaml").write_text("")
    (left / "deepspeed.json").write_text("of another run")
    assert runs_below(tmp_path) == []
    assert not brought_back(api, tmp_path / "back").deepspeed.exists()


def test_files_that_no_manifest_names_are_not_downloaded(
    hub: Hub, api: HfApi, lost: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A stranger's repository may be larger than the disk."""
    wanted: list[str] = []
    download = api.snapshot_download
    monkeypatch.setattr(
        api, "snapshot_download", lambda *a, **k: (wanted.extend(k["allow_patterns"]), download(*a, **k))
    )
    brought_back(api, tmp_path / "back")
    assert "model.safetensors" in wanted
    assert not {"*", "**"} & set(wanted)


def test_without_the_optimizers_state_nothing_is_downloaded(hub: Hub, api: HfApi, tmp_path: Path):
    send(api, make_lost(tmp_path / "half", with_state=False))
    requests = len(hub.log)
    with pytest.raises(CheckpointError, match="step 300 has no optimizer state on the Hub"):
        brought_back(api, tmp_path / "back")
    assert not [entry for entry in hub.log[requests:] if "model.safetensors" in entry.path]


def altered_to(fields: dict[str, Any]) -> bytes:
    """A manifest that is whole by its own hash."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**fields, "sha256": digest}, indent=1) + "\n").encode()


NAMES = ["/{victim}", "model//{victim}", "model/../../{victim}", "state/..", "../{victim}", "model", "model/./a", "a/b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_names_files_below_its_own_folder_alone(tmp_path: Path, name: str):
    run = make_run(tmp_path / "run")
    save(run, 100)
    described = manifest.read(run.checkpoint(100))
    described.files[name] = described.files["model/model.safetensors"]
    (run.checkpoint(100) / manifest.NAME).write_bytes(altered_to(described.model_dump(mode="json")))
    with pytest.raises(CheckpointError, match="is not a path below model/ or state/"):
        manifest.read(run.checkpoint(100))


@pytest.mark.parametrize("name", ["../../{victim}", "{victim}", "model/../../{victim}"])
def test_a_stranger_s_repository_cannot_take_a_file_away(api: HfApi, tmp_path: Path, name: str):
    run = make_lost(tmp_path / "foreign")
    victim = tmp_path / "thesis.txt"
    victim.write_text("years of work")
    described = manifest.read(run.checkpoint(100))
    listed = described.model_dump(mode="json")
    place = str(victim) if name == "{victim}" else name.format(victim=victim.name)
    listed["files"] = {place: {"size_bytes": 13, "sha256": hashlib.sha256(b"years of work").hexdigest()}}
    api.create_branch(REPO, branch=BRANCH)
    oid = commit(
        api,
        add("llmtrain/manifest.json", altered_to(listed)),
        add("llmtrain/config.yaml", resolved_yaml(config_of(run)).encode()),
        commit_description="checkpoint: abc\nrun: somebody",
        revision=BRANCH,
    )
    api.create_tag(REPO, tag="step-100", revision=oid)
    with pytest.raises(CheckpointError, match="is not a path below model/ or state/"):
        brought_back(api, tmp_path / "back")
    assert victim.read_text() == "years of work"
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "state/optimizer-00000-of-00001.safetensors"])
@pytest.mark.usefixtures("lost")
def test_a_byte_that_changed_on_the_way_brings_nothing_back(
    api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """No run folder appears that training would go on in."""
    download = api.snapshot_download

    def garbled(*arguments: object, local_dir: Path, **settings: object) -> str:
        found = download(*arguments, local_dir=local_dir, **settings)
        file = local_dir / name
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        return found

    monkeypatch.setattr(api, "snapshot_download", garbled)
    with pytest.raises(CheckpointError, match=r"altered: its SHA-256 is not the manifest's"):
        brought_back(api, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    monkeypatch.undo()
    assert brought_back(api, tmp_path / "back").checkpoint_steps() == [300]


@pytest.mark.usefixtures("lost")
def test_a_tag_at_another_steps_commit_brings_nothing_back(hub: Hub, api: HfApi, tmp_path: Path):
    """Training would go on from a step that nobody asked for."""
    tags = hub.repos[REPO].tags
    tags["step-300"] = tags["step-100"]
    with pytest.raises(CheckpointError, match="step-300 holds step 100"):
        brought_back(api, tmp_path / "back", 300)
    assert not (tmp_path / "back").exists()


def test_of_another_run_in_the_repository_nothing_comes_back(
    api: HfApi, lost: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From before anybody looked whose it is: its scores and checkpoints would be taken for one's own."""
    other = make_run(tmp_path / "other", "hub.optimizer_state=true")
    origin.note(other, "cpu", 1, 1)
    save(other, 400, 2.0, content="of another run")
    score(other, 400, 2.0)
    with monkeypatch.context() as before:
        before.setattr(conversation, "refuse_others", lambda *_: None)
        conversation.upload(Repo(api, REPO), config_of(other), other, 400, TOKEN)
    run = brought_back(api, tmp_path / "back", 300)
    assert sorted(ledger.uploads(run)) == sorted(ledger.scores(run)) == [100, 200, 300]
    theirs = brought_back(api, tmp_path / "theirs", 400)
    assert sorted(ledger.uploads(theirs)) == [400]
    assert not theirs.scores.exists()  # main is the first one's


def test_of_two_restores_to_one_folder_the_first_goes_on_alone(
    api: HfApi, lost: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.rmtree(lost.path)
    download = api.snapshot_download

    def meanwhile(*given: Any, **named: Any) -> str:
        with pytest.raises(RunFolderError, match=r"another restore \(process \d+ on .*\) is at work on it"):
            brought_back(api, tmp_path / "back")
        return download(*given, **named)

    monkeypatch.setattr(api, "snapshot_download", meanwhile)
    assert brought_back(api, tmp_path / "back").checkpoint_steps() == [300]
    assert not list(tmp_path.glob(".restoring*"))


def test_ctrl_c_says_that_the_same_command_goes_on(monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    said: list[str] = []
    monkeypatch.setattr(restore, "restore", interrupted)
    monkeypatch.setattr(restore, "set_client_factory", lambda _: None)
    monkeypatch.setattr(log, "set_up", lambda _: None)
    monkeypatch.setattr(log, "info", said.append)
    with pytest.raises(SystemExit) as left:
        restore.main([REPO, "back"])
    assert left.value.code == EXIT_INTERRUPTED
    assert said == ["stopped; what was received is kept: the same command goes on from there"]
