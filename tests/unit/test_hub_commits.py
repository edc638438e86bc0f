"""What is sent to the Hub: compared with what arrived, committed upon nobody else's work, and without a token in it."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http

from llmtrain import ledger, manifest
from llmtrain.errors import CheckpointError
from llmtrain.rundir import RunDir
from llmtrain.service import hub as conversation
from llmtrain.service import publish
from llmtrain.service.queue import Inspector
from llmtrain.service.remote import BRANCH, MAIN, LocalFile, Repo, asked_wait_s, patient, secrets_in
from tests.support import hub_client
from tests.support.checkpoint_runs import config_of, make_run, save, score, stretches
from tests.support.hub_client import REPO, add, commit, sent
from tests.support.hub_server import TOKEN, Hub

hub, waits, api, make_own = hub_client.hub, hub_client.waits, hub_client.api, hub_client.make_own


@pytest.mark.parametrize("name", ["config.yaml", "weights.safetensors"])
@pytest.mark.usefixtures("hub")
def test_what_the_hub_holds_is_told_by_its_own_hash(api: HfApi, tmp_path: Path, name: str):
    """Of a small file too, whose size is right, and whose hash the Hub names as git does."""
    content, other = b"layers: 12\n" * 3, b"layers: 21\n" * 3
    file = tmp_path / name
    file.write_bytes(content)
    known = LocalFile(file, len(content), manifest.describe_files(tmp_path, [file])[name].sha256)
    repo = Repo(api, REPO)
    assert repo.differences({name: known}, commit(api, add(name, content))) == []
    assert repo.differences({name: known}, commit(api, add(name, other))) == [name]
    assert repo.differences({"elsewhere": known}, "main") == ["elsewhere"]


def test_a_small_file_that_was_altered_before_it_was_sent_is_noticed(api: HfApi, tmp_path: Path):
    """The Hub's copy is the same as the one here, and neither is what the manifest says."""
    file = tmp_path / "config.yaml"
    file.write_bytes(b"layers: 12\n")
    known = LocalFile(file, 11, manifest.describe_files(tmp_path, [file])[file.name].sha256)
    file.write_bytes(b"layers: 21\n")
    head = commit(api, add(file.name, file.read_bytes()))
    assert Repo(api, REPO).differences({file.name: known}, head) == [file.name]


def test_a_tag_that_does_not_stay_is_not_taken_for_done(hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch):
    repo, first = Repo(api, REPO), commit(api, add("a.txt", b"1"))
    second = commit(api, add("a.txt", b"2"))
    repo.set_tag("step-1", first)
    repo.set_tag("step-1", second)  # the step was saved again
    assert hub.repos[REPO].tags == {"step-1": second}
    monkeypatch.setattr(api, "create_tag", lambda *_, **__: None)  # as where the client's exist_ok hides a refusal
    with pytest.raises(OSError, match="tag step-2 does not point at"):
        repo.set_tag("step-2", second)


def test_the_token_in_use_is_found_whatever_it_looks_like(tmp_path: Path):
    """Those of an organisation or of a mirror do not begin with hf_."""
    leaky, fine = tmp_path / "a.yaml", tmp_path / "b.yaml"
    leaky.write_text("paths: [/data/api_org-0123456789/x]\n")
    fine.write_text("paths: [/data/x]\n")
    assert secrets_in([fine, leaky], "api_org-0123456789") == [leaky]
    assert secrets_in([fine, leaky], TOKEN) == []


def test_a_configuration_with_a_token_does_not_come_onto_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another one than is in use: by what it looks like."""
    run = make_run(tmp_path / "run", f"hub.repo={REPO}", f"run.dir=hf_{'a' * 34}")
    monkeypatch.setattr(conversation, "publish", lambda *_: pytest.fail("published"))
    answer = conversation.converse("publish", run, REPO, 0, TOKEN)
    assert answer["error"] == "refused"
    assert "config.yaml: not uploaded" in answer["message"]


def test_a_hub_that_takes_a_request_and_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(httpx2.ReadTimeout):
        conversation.client(0.2).get(f"http://127.0.0.1:{silent.getsockname()[1]}/")


def test_an_answer_never_holds_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It goes into status, events and logs; an error may quote the request that it was sent with."""
    run = make_run(tmp_path / "run", f"hub.repo={REPO}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(conversation, "get_token", lambda: TOKEN)
    monkeypatch.setattr(conversation, "set_client_factory", lambda _: None)

    def fails(*_: Any) -> dict[str, Any]:
        raise OSError(f"no answer to GET /x with Authorization: Bearer {TOKEN}")

    monkeypatch.setattr(conversation, "check", fails)
    conversation.main(["check", str(run.path), "--repo", REPO])
    said = capsys.readouterr().out
    assert TOKEN not in said
    assert json.loads(said)["message"].endswith("Bearer ***")


@pytest.mark.parametrize(
    ("request_", "status"), [("/preupload/", 429), ("^PUT ", 503), ("/refs$", 429), ("/commit/checkpoints", 503)]
)
def test_a_long_wait_is_left_to_the_service(
    hub: Hub,
    api: HfApi,
    waits: list[float],
    make_own: Callable[[str], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request_: str,
    status: int,
):
    """The client would sleep through it, and whoever makes no progress for hub.stall_s is ended, and begins again."""
    run = make_own("run")
    conversation.check(Repo(api, REPO), config_of(run), run)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(conversation, "get_token", lambda: TOKEN)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)  # is put back at the end
    fault = hub.faults.add("status", request_, times=100, status=status, retry_after_s=25)
    conversation.main(["upload", str(run.path), "--repo", REPO, "--step", "100", "--stall", "20"])
    said = {"error": "failed", "message": f"the Hub answered {status}: Out of order", "retry_after_s": 25.0}
    assert json.loads(capsys.readouterr().out) == said
    assert fault.struck == 1
    assert waits == []


def test_how_long_the_hub_asks_to_wait_stands_in_two_headers():
    def asked(status: int = 429, **headers: str) -> float:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return asked_wait_s(httpx2.Response(status, headers=named))

    assert asked() == asked(Retry_After="Wed, 21 Oct 2026 07:28:00 GMT") == 0
    assert asked(Retry_After=" 7") == asked(503, Retry_After="7") == 7
    assert asked(RateLimit='"api";r=0;t=55', Retry_After="7") == 55  # as the client reads them
    assert asked(RateLimit='"api";r=3;t=55') == asked(503, RateLimit='"api";r=0;t=55') == 0


def test_what_changed_here_after_it_was_sent_is_this_sides_fault(
    hub: Hub, api: HfApi, make_own: Callable[[str], RunDir]
):
    """A commit is there from an attempt before, and then a disk alters a file: the checkpoint goes into quarantine."""
    run = make_own("run")
    repo, config = Repo(api, REPO), config_of(run)
    conversation.check(repo, config, run)
    sent(api, run)
    hub.faults.add("wrong_hash", "^model.safetensors$")
    with pytest.raises(OSError, match=r"model\.safetensors is not what was sent"):
        conversation.upload(repo, config, run, 100, TOKEN)
    weights = run.checkpoint(100) / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: altered"):
        conversation.upload(repo, config, run, 100, TOKEN)


def test_a_commit_holds_the_files_of_its_checkpoint_and_no_others(
    hub: Hub, api: HfApi, make_own: Callable[[str], RunDir]
):
    """The step before was written by two ranks: of the second one's share nothing may be left beside this one's."""
    run = make_own("run")
    known = config_of(run)
    config = known.model_copy(update={"hub": known.hub.model_copy(update={"optimizer_state": True})})
    repo = Repo(api, REPO)
    conversation.check(repo, config, run)
    described = manifest.read(run.checkpoint(100))
    second = run.checkpoint(100) / "state/optimizer-00001-of-00002.safetensors"
    second.write_text("the second rank's share")
    listed = {**described.files, **manifest.describe_files(run.checkpoint(100), [second])}
    manifest.write(run.checkpoint(100), described.model_copy(update={"files": listed}))
    save(run, 200)
    for step in (100, 200):
        conversation.upload(repo, config, run, step, TOKEN)
    assert "state/optimizer-00001-of-00002.safetensors" in hub.files(REPO, "step-100")
    names = {name.removeprefix("model/") for name in manifest.read(run.checkpoint(200)).files}
    own = {".gitattributes", "llmtrain/manifest.json", "llmtrain/config.yaml"}
    assert hub.files(REPO, "step-200").keys() == names | own


@pytest.mark.parametrize("is_recorded", [True, False])
def test_the_optimizers_state_follows_when_it_is_asked_for_later(
    hub: Hub, api: HfApi, make_own: Callable[[str], RunDir], is_recorded: bool
):
    """For the newest; also where the service was killed between the commit and its record."""
    run = make_own("run")
    repo, known = Repo(api, REPO), config_of(run)
    conversation.check(repo, known, run)
    first = sent(api, run)["upload"]["commit"]
    if not is_recorded:
        run.uploads.unlink()
    config = known.model_copy(update={"hub": known.hub.model_copy(update={"optimizer_state": True})})
    assert Inspector(run).look(known, scoring=True).to_upload == ([] if is_recorded else [100])
    assert Inspector(run).look(config, scoring=True).to_upload == [100]
    answer = conversation.upload(repo, config, run, 100, TOKEN)
    assert "state/optimizer-00000-of-00001.safetensors" in hub.files(REPO, "step-100")
    assert hub.repos[REPO].tags == {"step-100": answer["upload"]["commit"]}
    assert first != answer["upload"]["commit"]
    ledger.append(run.uploads, ledger.Upload(step=100, repo=REPO, **answer["upload"]))
    assert conversation.upload(repo, config, run, 100, TOKEN) == answer  # found again
    for asked in (known, config):
        assert Inspector(run).look(asked, scoring=True).to_upload == []
    save(run, 200)
    assert Inspector(run).look(config, scoring=True).to_upload == [200]


def test_main_loses_what_a_renewal_has_brought_and_nothing_else(
    hub: Hub, api: HfApi, make_own: Callable[[str], RunDir]
):
    run = make_own("run")
    repo, config = Repo(api, REPO), config_of(run)
    conversation.check(repo, config, run)
    weights = run.checkpoint(100) / "model/model-00001-of-00001.safetensors"
    weights.write_text("a name that the next one does not have")
    described = manifest.read(run.checkpoint(100))
    listed = {**described.files, **manifest.describe_files(run.checkpoint(100), [weights])}
    manifest.write(run.checkpoint(100), described.model_copy(update={"files": listed}))
    run.base.write_text("{}\n")
    sent(api, run)
    publish.publish(repo, config, run)
    assert {weights.name, "llmtrain/base.json"} <= hub.files(REPO).keys()
    commit(api, add("LICENSE", b"MIT"), add("images/a.svg", b"<svg/>"))
    run.base.unlink()
    save(run, 200)
    score(run, 200, stretches(-0.1))
    answer = conversation.upload(repo, config, run, 200, TOKEN)
    ledger.append(run.uploads, ledger.Upload(step=200, repo=REPO, **answer["upload"]))
    publish.publish(repo, config, run)
    own = {"README.md", "model.safetensors", "llmtrain/manifest.json", "llmtrain/config.yaml", "llmtrain/scores.jsonl"}
    there = hub.files(REPO).keys() - {".gitattributes", "llmtrain/curve.png"}
    assert there == own | {"LICENSE", "images/a.svg"}
    assert publish.publish(repo, config, run)["message"].endswith("shows step 200 already")


@pytest.mark.parametrize("branch", [MAIN, BRANCH])
def test_who_commits_in_between_is_noticed(
    hub: Hub, api: HfApi, make_own: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch, branch: str
):
    """The Hub refuses a commit upon a head that has moved: then all of it is looked at again."""
    run = make_own("run")
    repo, config = Repo(api, REPO), config_of(run)
    conversation.check(repo, config, run)
    if branch == MAIN:
        sent(api, run)
    create, heads = api.create_commit, list[str]()

    def in_between(*arguments: Any, **settings: Any) -> Any:
        heads.append(settings.get("parent_commit", ""))
        if len(heads) == 1:
            create(REPO, [add("meanwhile.txt", b"x")], commit_message="of somebody", revision=branch)
        return create(*arguments, **settings)

    monkeypatch.setattr(api, "create_commit", in_between)
    monkeypatch.setattr("llmtrain.service.remote._PAUSES_S", (0.0, 0.0))
    if branch == MAIN:
        patient(lambda: publish.publish(repo, config, run))
    else:
        sent(api, run)
    assert len(heads) == len(set(heads)) == 2  # the second time upon what somebody has brought
    stays = branch == MAIN  # the commits of checkpoints hold their files alone
    assert ("meanwhile.txt" in hub.files(REPO, branch)) is stays
