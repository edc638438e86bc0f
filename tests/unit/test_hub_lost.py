"""What was uploaded and is not on the Hub any more: found by the next check, told once, sent again, never counted."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from llmtrain import ledger, retention
from llmtrain.rundir import RunDir
from llmtrain.service import gone, plan, publish, uploading
from llmtrain.service import hub as conversation
from llmtrain.service.queue import Inspector
from llmtrain.service.remote import BRANCH, Repo
from llmtrain.service.uploading import Uploading
from llmtrain.service.worker import Service, ServiceOptions
from tests.support import hub_client
from tests.support.checkpoint_runs import config_of, save, score, stretches
from tests.support.hub_client import REPO, add, commit, sent
from tests.support.hub_server import TOKEN, Hub

hub, waits, api, make_own = hub_client.hub, hub_client.waits, hub_client.api, hub_client.make_own


@pytest.fixture
def run(api: HfApi, make_own: Callable[[str], RunDir]) -> RunDir:
    """With step 100 on the Hub, and on disk."""
    made = make_own("run")
    conversation.check(Repo(api, REPO), config_of(made), made)
    sent(api, made)
    return made


def check(api: HfApi, run: RunDir) -> dict[str, Any]:
    """As the service does it, with what it records."""
    answer = conversation.check(Repo(api, REPO), config_of(run), run)
    gone.record(run, REPO, answer)
    return answer


def told(run: RunDir) -> list[str]:
    return [event.message for event in ledger.events(run) if event.kind == "upload-gone"]


def reworded(api: HfApi, hub: Hub, description: str) -> str:
    """The same commit once more under the same tag, as after a history was rewritten."""
    oid = commit(api, add("notes.txt", description.encode()), commit_description=description, revision=BRANCH)
    hub.repos[REPO].tags["step-100"] = oid
    return oid


def test_a_repository_that_was_deleted_makes_its_uploads_wait_again(hub: Hub, api: HfApi, run: RunDir):
    save(run, 200)
    score(run, 200, stretches(0.0))
    config = config_of(run)
    once = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep_last": 1})})
    del hub.repos[REPO]
    assert check(api, run)["gone"] == [100]
    assert ledger.uploads(run) == {}
    assert Inspector(run).look(config, scoring=True).to_upload == [100, 200]
    held = {100: "not confirmed on the Hub yet"}
    keeps_one = once.model_copy(update={"checkpoint": once.checkpoint.model_copy(update={"keep_best": 0})})
    assert retention.deletable(run, keeps_one, 200) == (set(), held)
    assert plan.to_show(run, REPO) is None
    said = f"{REPO} does not hold step 100 any more as uploaded (deleted or changed on the Hub?): "
    assert told(run) == [f"{said}step 100 will be sent again from this disk"]
    assert check(api, run)["gone"] == []
    sent(api, run)
    assert check(api, run)["gone"] == []
    assert len(told(run)) == 1
    assert retention.deletable(run, keeps_one, 200) == ({100}, {})


def test_what_is_lost_for_good_is_said_to_be(hub: Hub, api: HfApi, run: RunDir):
    retention.remove(run, [100])
    del hub.repos[REPO].tags["step-100"]
    check(api, run)
    assert told(run)[0].endswith("of step 100 nothing is left on this disk")


def test_one_request_compares_and_a_removal_that_was_not_recorded_is_no_loss(hub: Hub, api: HfApi, run: RunDir):
    save(run, 200)
    score(run, 200, stretches(-0.1))
    score(run, 100, stretches(0.0))
    config = config_of(run)
    answer = conversation.upload(Repo(api, REPO), config, run, 200, TOKEN)
    ledger.append(run.uploads, ledger.Upload(step=200, repo=REPO, **answer["upload"]))
    rule = config.checkpoint.model_copy(update={"keep_last": 1, "keep_best": 1})
    pruned = config.model_copy(update={"checkpoint": rule, "hub": config.hub.model_copy(update={"prune": True})})
    requests = len(hub.log)
    assert conversation.find_lost(Repo(api, REPO), pruned, run) == {"gone": [], "to_read": [], "moved": []}
    assert [entry.path for entry in hub.log[requests:]] == [f"/api/models/{REPO}/refs"]
    assert plan.untaggable(run, pruned) == [100]
    api.delete_tag(REPO, tag="step-100")
    assert conversation.find_lost(Repo(api, REPO), pruned, run)["gone"] == []
    assert conversation.find_lost(Repo(api, REPO), config, run)["gone"] == [100]


def test_a_rewritten_history_is_found_again_by_its_tags(hub: Hub, api: HfApi, run: RunDir):
    before = ledger.uploads(run)[100]
    oid = reworded(api, hub, hub.commits(REPO, "step-100")[0].description)
    assert check(api, run)["to_read"] == [100]  # on this disk: read back before it counts
    assert ledger.uploads(run) == {}
    ledger.append(run.uploads, before)
    retention.remove(run, [100])
    check(api, run)
    assert ledger.uploads(run)[100].commit == oid
    assert told(run) == []
    publish.publish(Repo(api, REPO), config_of(run), run)
    assert hub.commits(REPO)[0].title == "best so far: step 100"
    reworded(api, hub, "checkpoint: of another\nrun: x")
    assert check(api, run)["gone"] == [100]


def test_a_commit_that_is_not_there_leads_to_another_look(hub: Hub, api: HfApi, run: RunDir):
    """Not to advice about tokens."""
    first = hub.repos[REPO].branches.pop(BRANCH)
    record = ledger.uploads(run)[100]
    ledger.append(run.uploads, record.model_copy(update={"commit": "c0ffee" * 6}))
    hub.repos[REPO].branches[BRANCH] = first
    with pytest.raises(HfHubHTTPError) as error:
        publish.publish(Repo(api, REPO), config_of(run), run)
    answer = conversation.explain(error.value, REPO) | conversation._as_gone("publish", error.value)
    assert answer["error"] == "gone"
    assert "the Hub refuses (404" in answer["message"]
    assert "token" not in answer["message"]
    assert conversation._as_gone("check", error.value) == {}
    assert check(api, run)["to_read"] == [100]


# ---------------------------------------------------------------------------------------------- the service


class Children:
    """In place of the upload lane's processes, which answer at once."""

    def __init__(self, **answers: dict[str, Any]) -> None:
        self.tasks: list[str] = []
        self.answers = answers

    def __call__(self, _module: str, arguments: list[str], *_: Any) -> Any:
        self.tasks.append(arguments[0])
        said = self.answers.get(arguments[0], {"message": "", "private": True, "digest": ""})
        return SimpleNamespace(exit_code=0, seconds=0.0, lines=lambda: [said], close=lambda: None)


def test_after_a_404_the_repository_is_looked_at_again(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    lost = {"error": "gone", "message": "the Hub refuses (404: not there)"}
    monkeypatch.setattr(uploading, "Child", children := Children(publish=lost))
    lane, config = Uploading(run, lock=0, pause_s=0.0), config_of(run)
    work = Inspector(run).look(config, scoring=True)
    for _ in range(3):  # the check, its answer, main
        lane.advance(config, work, hurry=True)
    assert lane.trusts_uploads(config)
    lane.advance(config, work, hurry=True)  # which is not there
    assert not lane.trusts_uploads(config)
    assert lane.problem is None
    for _ in range(8):
        lane.advance(config, work, hurry=True)
    assert children.tasks == ["check", "publish"] * 3
    assert lane.problem == lost["message"]  # every look has found nothing missing: a person has to


def test_the_service_goes_on_after_it_has_found_something_gone(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    found = {"message": "", "private": True, "gone": [100]}
    monkeypatch.setattr(uploading, "Child", Children(check=found))
    lane, config = Uploading(run, lock=0, pause_s=0.0), config_of(run)
    monkeypatch.setattr(plan, "is_stale", lambda *_: False)
    work = Inspector(run).look(config, scoring=True)
    for _ in range(2):
        lane.advance(config, work, hurry=True)
    assert work.to_upload == []
    assert lane.waits(config, work)


@pytest.mark.parametrize("only", [None, "prune"])
def test_nothing_is_deleted_before_the_hub_was_looked_at(run: RunDir, monkeypatch: pytest.MonkeyPatch, only: Any):
    save(run, 200)
    score(run, 200, stretches(-0.1))
    rule = "checkpoint.keep_last=1", "checkpoint.keep_best=1"
    failed = {"error": "failed", "message": "no answer"}
    monkeypatch.setattr(uploading, "Child", children := Children(check=failed, upload=failed))
    lock = run.lock_service()
    assert lock is not None
    with lock:
        service = Service(run, lock, ServiceOptions(only=only, overrides=rule))
        for _ in range(3):
            service.turn()
        assert run.checkpoint_steps() == [100, 200]
        assert children.tasks == ["check"]
        del children.answers["check"]
        service = Service(run, lock, ServiceOptions(only=only, overrides=rule))
        for _ in range(3):
            service.turn()
        assert run.checkpoint_steps() == [200]


def test_a_refusal_is_looked_at_again_now_and_then_alone(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """A person has to mend it, which takes longer than a Hub that is out of order."""
    refused = {"error": "refused", "message": "no"}
    monkeypatch.setattr(uploading, "Child", children := Children(check=refused))
    lane, config = Uploading(run, lock=0, pause_s=1.0), config_of(run)
    work = Inspector(run).look(config, scoring=True)
    for _ in range(4):
        lane.advance(config, work, hurry=False)
    assert children.tasks == ["check"]
    assert 30 < lane.pause.left_s <= 60


def test_what_has_no_room_on_the_hub_is_told_and_tried_once_an_hour(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """At every turn all bytes might be sent again."""
    save(run, 200)
    full = {"error": "refused", "message": "the Hub refuses (413: too large)", "retry_after_s": 3600.0}
    shown = {"message": "", "digest": plan.digest(run, REPO)}
    monkeypatch.setattr(uploading, "Child", children := Children(upload=full, publish=shown))
    lane, config = Uploading(run, lock=0, pause_s=1.0), config_of(run)
    work = Inspector(run).look(config, scoring=True)
    for _ in range(6):
        lane.advance(config, work, hurry=False)
    assert children.tasks == ["check", "upload"]
    assert 3590 < lane.pause.left_s <= 3600
    lane.pause.succeeded()  # the hour is over
    for _ in range(6):
        lane.advance(config, work, hurry=False)
    assert children.tasks == ["check", "upload", "check", "publish", "upload"]  # one that fails blocks no other
    assert lane.problem == full["message"]
    assert [event.message for event in ledger.events(run) if event.kind == "hub-refused"] == [full["message"]]
    state = ledger.hub_state(run)
    assert state is not None
    assert (state.state, state.message) == ("refused", full["message"])


@pytest.mark.parametrize(
    ("status", "words", "is_full"),
    [
        (413, "", True),
        (413, "Payload Too Large", True),
        (403, "Private repository storage limit reached, please upgrade your plan", True),
        (402, "You have exceeded your storage quota", True),
        (400, "Your proposed upload exceeds the maximum size limit", True),
        (400, "Invalid revision", False),
        (403, "You need a token with write access", False),
        (429, "You have exceeded the limit of 128 commits", False),
        (507, "Insufficient storage", False),
    ],
)
def test_what_time_cannot_mend_is_no_failure_to_be_tried_again(
    hub: Hub, api: HfApi, status: int, words: str, is_full: bool
):
    hub.faults.add("status", "^GET .*/refs", status=status, message=words, html=not words, times=100)
    with pytest.raises(HfHubHTTPError) as error:
        api.list_repo_refs(REPO)
    answer = conversation.explain(error.value, REPO)
    assert (answer["error"] == "refused" and answer.get("retry_after_s") == 3600.0) is is_full
    if is_full:
        assert answer["message"].startswith(f"{REPO}: the Hub refuses ({status}: ")
        assert "http" not in answer["message"]
        assert "Make room in that account" in answer["message"]


# ---------------------------------------------------------------------------------------------- advice


@pytest.mark.parametrize(
    ("status", "words", "advice"),
    [
        (401, "Invalid credentials", True),
        (403, "You need a token with write access", True),
        (403, "Forbidden: you must be granted the right to create", True),
        (403, "Private repository storage limit reached, please upgrade your plan", False),
        (404, "Repository not found", False),
    ],
)
def test_advice_about_tokens_where_it_is_about_tokens(
    hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch, status: int, words: str, advice: bool
):
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    hub.faults.add("status", "^GET .*/refs", status=status, message=words, times=100)
    with pytest.raises(HfHubHTTPError) as error:
        api.list_repo_refs(REPO)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    said = conversation.explain(error.value, REPO)["message"]
    assert said.startswith(f"{REPO}: the Hub refuses ({status}: {words})")
    assert ("; set HF_TOKEN, or run 'hf auth login'" in said) is advice
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    said = conversation.explain(error.value, REPO)["message"]
    assert ("HF_TOKEN in the environment, which goes before that of 'hf auth login'" in said) is advice
    assert ("start a running service again" in said) is advice
