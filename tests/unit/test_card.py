"""What the Hub shows of a run: which checkpoint on `main` and what is said of it, and whose repository it is."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

from llmtrain import base_facts, jsonl, ledger, origin
from llmtrain.config import load_config
from llmtrain.rundir import RunDir
from llmtrain.service import card, plan, publish, uploading
from llmtrain.service import hub as conversation
from llmtrain.service.plan import Shown
from llmtrain.service.queue import Work
from llmtrain.service.remote import BRANCH, Refused, Repo
from llmtrain.service.uploading import Uploading
from tests.support import checkpoint_runs, hub_client
from tests.support.checkpoint_runs import config_of, make_run, save, score, stretches, train, upload
from tests.support.hub_client import REPO, add, commit, sent
from tests.support.hub_server import TOKEN, Hub

run = checkpoint_runs.run  # fixtures
hub, waits, api, make_own = hub_client.hub, hub_client.waits, hub_client.api, hub_client.make_own
HERE = "ada/gpt"


def shown(run: RunDir) -> Shown:
    found = plan.to_show(run, HERE)
    assert found is not None
    return found


def rendered(run: RunDir) -> str:
    return card.render(HERE, config_of(run), run, shown(run))


def row(text: str, step: int) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {step} |"))


def test_the_card_tells_the_lowest_measured_from_the_lowest_saved(run: RunDir):
    train(run, 800)
    assert "Lowest of the saved ones" not in rendered(run)
    jsonl.append(run.heldout, [{"step": 420, "epoch": 13.44, "loss": 2.9}])
    lowest = f"Lowest of the saved ones {ledger.scores(run)[400].loss:.4f} (step 400)"
    assert f"{lowest}; lowest measured 2.9000 (step 420, not saved)." in rendered(run)
    save(run, 900, 2.95)
    assert "Lowest of the scored ones" in rendered(run)  # the one that waits may be lower


# ---------------------------------------------------------------------------------------------- what stands on main


def test_of_several_ties_main_shows_the_one_that_is_proposed(run: RunDir):
    """300 comes before it and is uploaded too, but it is gone from the disk, and the table does not propose it."""
    save(run, 500)
    score(run, 500, stretches(0.001, noise=0.03, seed=1))
    shutil.rmtree(run.checkpoint(300))
    shutil.rmtree(run.checkpoint(400))
    upload(run, 500)
    assert shown(run).upload.step == 500
    text = rendered(run)
    assert "**proposed**" in row(text, 500)
    assert "cannot be told from the lowest one so far, that of step 400" in text
    assert "the best checkpoint" not in text
    assert shown(run).title() == "cannot be told from the best so far: step 500"


def test_main_follows_the_disk(run: RunDir):
    upload(run, 400)
    before = plan.digest(run, HERE)
    assert shown(run).upload.step == 300
    shutil.rmtree(run.checkpoint(300))
    assert shown(run).upload.step == 400
    assert plan.digest(run, HERE) != before


def test_main_follows_what_is_removed_from_the_hub(run: RunDir):
    before = plan.digest(run, HERE)
    upload(run, 100, removed=True)
    assert plan.digest(run, HERE) != before


def test_the_lowest_is_the_best(run: RunDir):
    upload(run, 400)
    shutil.rmtree(run.checkpoint(300))
    assert "step 400, the best checkpoint so far: it has the lowest loss on held-out data." in rendered(run)
    assert shown(run).title() == "best so far: step 400"


def test_the_best_of_what_is_uploaded_is_not_called_the_best(run: RunDir):
    upload(run, 300, removed=True)
    assert shown(run).upload.step == 100
    assert "step 100, which of those uploaded has the lowest loss on held-out data; that of step 400" in rendered(run)
    assert shown(run).title() == "best of those uploaded: step 100"


@pytest.mark.parametrize("others", [False, True])
def test_the_newest_that_nobody_has_scored_is_not_called_the_best(tmp_path: Path, others: bool):
    run = make_run(tmp_path / "run", f"hub.repo={HERE}")
    for step in (100, 200):
        save(run, step)
    if others:
        score(run, 100, stretches(0.0))
    upload(run, 200)
    assert "step 200, the newest one uploaded, which is not scored on held-out data yet." in rendered(run)
    assert shown(run).title() == "newest, not scored yet: step 200"


def test_the_results_are_those_of_the_very_checkpoint(run: RunDir):
    upload(run, 400)
    shutil.rmtree(run.checkpoint(300))
    assert "bits_per_byte" in rendered(run)
    of_another = ledger.uploads(run)[400].model_copy(update={"checkpoint": "saved anew"})
    assert not card.metadata(config_of(run), run, of_another).eval_results


def test_a_base_in_a_folder_is_not_called_one_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "bases" / "llama"

    def named(name: str, *settings: str) -> tuple[str | None, bool]:
        run = make_run(tmp_path / name, "hub.repo=ada/gpt", "model.kind=qlora", "model.base=bases/llama", *settings)
        save(run, 100)
        upload(run, 100)
        origin.note(run, "cpu", 1, 1)
        with contextlib.chdir("/"):  # seen from the folder that training was started in
            text = rendered(run)
        return card.metadata(config_of(run), run, shown(run).upload).base_model, "on `bases/llama`," in text

    elsewhere = "data.tokenizer.name=openai-community/gpt2"
    assert named("hub") == ("bases/llama", True)
    base.mkdir(parents=True)
    assert named("folder", elsewhere) == (None, False)
    assert named("gone") == (None, False)
    base.rmdir()
    config = config_of(RunDir(tmp_path / "gone"))
    assert base_facts.hub_name(config, tmp_path) is None
    assert base_facts.hub_name(load_config(None)[0], tmp_path) is None


@pytest.mark.parametrize("base", ["./llama", "../llama", "~/llama", "/jane/llama"])
def test_a_path_to_a_base_is_not_told_though_it_leads_nowhere_here(tmp_path: Path, base: str):
    run = make_run(tmp_path / "run", "model.kind=qlora", f"model.base={base}", "data.tokenizer.name=gpt2")
    save(run, 100)
    upload(run, 100)
    text = rendered(run)
    assert card.metadata(config_of(run), run, shown(run).upload).base_model is None
    assert "on a base model," in text
    assert "llama`" not in text


def test_the_card_says_what_the_test_split_was_used_for(run: RunDir):
    assert "test data (1%) was not used for choosing: no checkpoint was scored on it." in rendered(run)
    score(run, 300, stretches(0.0), split="test")
    score(run, 300, stretches(0.0), split="test")
    assert "test data (1%) was not used for choosing: step 300 alone was scored on it." in rendered(run)
    score(run, 400, stretches(0.0), split="test")
    said = "takes no part in the ranking, but 2 checkpoints were scored on it (steps 300 and 400)"
    assert said in rendered(run)
    assert "not used for choosing" not in rendered(run)


def test_a_second_repository_tells_of_its_own_uploads_alone(run: RunDir):
    upload(run, 400, "ada/second")
    found = plan.to_show(run, "ada/second")
    assert found is not None
    text = card.render("ada/second", config_of(run), run, found)
    assert [step for step in (100, 200, 300, 400) if "not here" in row(text, step)] == [100, 200, 300]
    assert "not here" not in row(rendered(run), 300)  # 300 is in the first one
    assert "not here" in row(rendered(run), 400)


def test_no_tag_is_taken_away_of_what_the_rule_keeps_here(run: RunDir):
    """800 and 500 are of a life that `restore --step` has abandoned: on the Hub they are the last ones."""
    config = config_of(run)
    rule = config.checkpoint.model_copy(update={"keep_last": 1, "keep_best": 0})
    config = config.model_copy(update={"checkpoint": rule, "hub": config.hub.model_copy(update={"prune": True})})
    for step in (200, 500):
        upload(run, step)
    for step in (300, 400, 500, 800):
        shutil.rmtree(run.checkpoint(step))
    assert run.checkpoint_steps() == [200]
    assert plan.untaggable(run, config) == [100, 300]


class Children:
    """In place of the upload lane's processes: each has done its task by the time that anybody looks."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def __call__(self, _module: str, arguments: list[str], *_: Any) -> Any:
        self.tasks.append(arguments[0])
        said = {"message": "", "private": True, "digest": ""}
        return SimpleNamespace(exit_code=0, seconds=0.0, lines=lambda: [said], close=lambda: None)


def test_main_is_not_held_back_at_the_end_for_weights_that_do_not_come(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    record = ledger.uploads(run)[100]
    for number in range(100):
        ledger.append(run.uploads, record.model_copy(update={"step": 1000 + number}))
    monkeypatch.setattr(uploading, "Child", children := Children())
    lane = Uploading(run, lock=0, pause_s=1.0)
    for _ in range(2):  # started, and collected
        lane.advance(config_of(run), Work(), hurry=False)
    with run.lock():  # training goes on
        lane.advance(config_of(run), Work(), hurry=False)
    assert children.tasks == ["check"]
    lane.advance(config_of(run), Work(), hurry=False)
    assert children.tasks == ["check", "publish"]


@pytest.mark.parametrize(("ahead_s", "is_renewed"), [(-60.0, False), (7200.0, True)])
@pytest.mark.parametrize("uploads", [1, 100])
def test_a_clock_that_was_ahead_does_not_keep_main_stale(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, ahead_s: float, is_renewed: bool, uploads: int
):
    """It was set right since: main was renewed, and weights were uploaded, in what is the future now."""
    noted = time.time() + ahead_s
    record = ledger.uploads(run)[100]
    for number in range(uploads):
        ledger.append(run.uploads, record.model_copy(update={"step": 1000 + number, "time": noted}))
    run.published.write_text("{}")
    os.utime(run.published, (noted, noted))
    monkeypatch.setattr(uploading, "Child", children := Children())
    lane = Uploading(run, lock=0, pause_s=1.0)
    with run.lock():  # training goes on
        for _ in range(3):
            lane.advance(config_of(run), Work(), hurry=False)
    assert children.tasks == ["check", "publish"][: 1 + is_renewed]


# ---------------------------------------------------------------------------------------------- whose repository


def test_of_two_runs_that_found_it_empty_the_second_is_refused(hub: Hub, api: HfApi, make_own: Callable[[str], RunDir]):
    first, second = make_own("first"), make_own("second")
    repo = Repo(api, REPO)
    for run in (first, second):
        conversation.check(repo, config_of(run), run)
    answer = sent(api, first)
    requests = len(hub.log)
    with pytest.raises(Refused, match="holds the checkpoints of another run"):
        sent(api, second)
    assert {entry.method for entry in hub.log[requests:]} == {"GET"}  # not even bytes
    upload(second, 100, REPO)  # a record from before anybody looked
    with pytest.raises(Refused, match="holds the checkpoints of another run"):
        publish.publish(repo, config_of(second), second)
    with pytest.raises(Refused, match="holds the checkpoints of another run"):
        conversation.untag(repo, second, 100)
    with pytest.raises(Refused, match="holds the checkpoints of another run"):
        conversation.check(repo, config_of(second), second)
    assert hub.repos[REPO].tags == {"step-100": answer["upload"]["commit"]}
    publish.publish(repo, config_of(first), first)
    conversation.check(repo, config_of(first), first)  # its own, with files on main
    assert [commit.title for commit in hub.commits(REPO)] == ["best so far: step 100", "initial commit"]


def test_the_one_that_commits_while_the_other_sends_its_bytes_is_first(
    hub: Hub, api: HfApi, make_own: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
):
    first, second = make_own("first"), make_own("second")
    conversation.check(Repo(api, REPO), config_of(first), first)
    send = api.preupload_lfs_files

    def send_late(*arguments: Any, **settings: Any) -> None:
        monkeypatch.setattr(api, "preupload_lfs_files", send)
        sent(api, first)
        send(*arguments, **settings)

    monkeypatch.setattr(api, "preupload_lfs_files", send_late)
    with pytest.raises(Refused, match="holds the checkpoints of another run"):
        sent(api, second)
    assert [commit.title for commit in hub.commits(REPO, BRANCH)] == ["step 100", "initial commit"]


def test_the_run_whose_checkpoint_came_first_keeps_a_repository_that_holds_two(
    api: HfApi, make_own: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
):
    first, second = make_own("first"), make_own("second")
    conversation.check(Repo(api, REPO), config_of(first), first)
    sent(api, first)
    with monkeypatch.context() as before:  # as it was when nobody looked
        before.setattr(conversation, "refuse_others", lambda *_: None)
        sent(api, second)
    conversation.check(Repo(api, REPO), config_of(first), first)
    with pytest.raises(Refused, match="another run"):
        conversation.check(Repo(api, REPO), config_of(second), second)


@pytest.mark.parametrize("squashed", [True, False])
def test_a_branch_that_was_squashed_or_deleted_leaves_the_repository_its_owner(
    hub: Hub, api: HfApi, make_own: Callable[[str], RunDir], squashed: bool
):
    first, second = make_own("first"), make_own("second")
    repo, config = Repo(api, REPO), config_of(first)
    conversation.check(repo, config, first)
    sent(api, first)
    publish.publish(repo, config, first)
    if squashed:
        api.super_squash_history(REPO, branch=BRANCH)
    else:
        api.delete_branch(REPO, branch=BRANCH)
    with pytest.raises(Refused, match="another run"):
        conversation.check(repo, config_of(second), second)
    assert conversation.check(repo, config, first)["gone"] == []
    save(first, 200)
    conversation.upload(repo, config, first, 200, TOKEN)
    assert hub.repos[REPO].tags.keys() == {"step-100", "step-200"}


def test_a_repository_with_somebody_s_files_is_refused_before_anything_is_written(
    hub: Hub, api: HfApi, make_own: Callable[[str], RunDir]
):
    run = make_own("run")
    commit(api, add("README.md", b"# mine"), message="run: of somebody")
    names = ["config.json", "model.safetensors", "notes.txt", "tokenizer.json"]
    commit(api, *(add(name, b"{}") for name in names))
    words = r"brought \(config.json, model.safetensors, notes.txt and 1 more\).*name an empty or a new repository"
    with pytest.raises(Refused, match=words):
        conversation.check(Repo(api, REPO), config_of(run), run)
    assert list(hub.repos[REPO].branches) == ["main"]


def test_a_repository_with_a_readme_alone_is_taken(api: HfApi, make_own: Callable[[str], RunDir]):
    run = make_own("run")
    commit(api, add("README.md", b"# to be filled"), message="run: of somebody")
    for _ in range(2):  # the second time there is a branch, which has that commit in its history
        assert "takes the checkpoints" in conversation.check(Repo(api, REPO), config_of(run), run)["message"]
