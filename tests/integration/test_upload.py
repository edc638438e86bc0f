"""The checkpoint service against a Hub on the loopback, with the real client: what arrives there, and what does not."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.report.speed import read_speed
from llmtrain import errors, ledger, manifest, ranking
from llmtrain.rundir import RunDir
from tests.support import jobs
from tests.support.hub_server import TOKEN, Hub
from tests.support.runs import Workplace
from tests.support.service_runs import (
    MANY_SAVES,
    REPO,
    checkpoint_commits,
    configure,
    copy_run,
    end_service,
    files_with,
    flip,
    processes_below,
    run_module,
    run_python,
    serve,
    serving,
    shown_on_main,
    status_of,
    surroundings,
    tags,
    train,
    upload_records,
    wait_until,
)

SAVES = range(1, 10)
ALWAYS = 10**6
READER, STRANGER = "hf_" + "r" * 34, "hf_" + "s" * 34


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub", {TOKEN: "write", READER: "read"}) as hub:
        yield hub
    assert not hub.bugs


@pytest.fixture(scope="module")
def many(workplace: Workplace) -> str:
    """Name of a run that was scored and never uploaded."""
    train(workplace, "run.name=many-to-upload", f"train.steps={SAVES[-1]}", *MANY_SAVES)
    serve(RunDir(workplace.run_folder("many-to-upload")), "--drain")
    return "many-to-upload"


class Copies:
    """Makes runs of their own, of some of its checkpoints, to be uploaded to REPO."""

    def __init__(self, workplace: Workplace, many: str) -> None:
        self._workplace, self._many = workplace, many
        self.losses = {step: s.loss for step, s in ledger.scores(RunDir(workplace.run_folder(many))).items()}

    def make(self, name: str, *steps: int, **settings: Any) -> RunDir:
        return copy_run(self._workplace, self._many, name, steps, **{"hub_repo": REPO, "hub_pause_s": 0.2} | settings)

    def around_the_best(self) -> list[int]:
        """Three steps, of which the middle one has the lowest loss by far."""
        best = min(range(3, 9), key=self.losses.__getitem__)
        return [1, best, best + 1]


@pytest.fixture(scope="module")
def copies(workplace: Workplace, many: str) -> Copies:
    return Copies(workplace, many)


class Uploaded:
    """A run whose every checkpoint is on the Hub, and what was seen on the way."""

    def __init__(self, run: RunDir, hub: Hub) -> None:
        self.run, self.hub = run, hub
        self.commands: list[str] = []
        with serving(run, "--drain", env=surroundings(hub)) as service:
            while service.poll() is None:
                self.commands += [" ".join(words) for words in processes_below(service.pid)]
            assert service.returncode == 0, (run.path / "said.txt").read_text()


@pytest.fixture(scope="module")
def uploaded(copies: Copies, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uploaded]:
    source = {"kind": "text", "paths": ["/data/hf_datasets_of_my_own/from_2024.txt"]}  # looks a little like a token
    settings = {"hub_optimizer_state": True, "data_sources": [source]}
    run = copies.make("uploaded", *copies.around_the_best(), **settings)
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield Uploaded(run, hub)
        assert not hub.bugs


# What arrives


def test_every_tag_holds_the_checkpoint_byte_for_byte(uploaded: Uploaded):
    run, hub = uploaded.run, uploaded.hub
    assert tags(hub) == run.checkpoint_steps()
    for step in run.checkpoint_steps():
        folder, tag = run.checkpoint(step), f"step-{step}"
        paths = [path for path in folder.rglob("*") if path.is_file()]
        local = {p.relative_to(folder).as_posix().removeprefix("model/"): p for p in paths if p.name != manifest.NAME}
        local |= {f"llmtrain/{manifest.NAME}": folder / manifest.NAME, "llmtrain/config.yaml": run.config}
        assert {"model.safetensors", "tokenizer.json", "state/optimizer-00000-of-00001.safetensors"} <= local.keys()
        assert hub.files(REPO, tag).keys() == {*local, ".gitattributes"}
        assert all(hub.read(REPO, path, tag) == local[path].read_bytes() for path in local)
    assert [record.attempts for record in upload_records(run)] == [1, 1, 1]
    assert len(checkpoint_commits(hub)) == 3


def test_main_shows_the_proposed_one_with_a_card_that_the_hub_understands(uploaded: Uploaded, tmp_path: Path):
    run, hub = uploaded.run, uploaded.hub
    ranked = ranking.rank(run)
    assert ranked is not None
    step = ranked.proposed.step
    assert step != run.checkpoint_steps()[-1]
    assert shown_on_main(hub) == step
    assert {path for path in hub.files(REPO) if not path.startswith("llmtrain/")} == {
        ".gitattributes", "README.md", *(path.name for path in (run.checkpoint(step) / "model").iterdir()),
    }  # fmt: skip
    assert hub.read(REPO, "model.safetensors") == (run.checkpoint(step) / "model/model.safetensors").read_bytes()
    visit = """
import json, sys
import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, tag = sys.argv[1:]
card = ModelCard.load(repo)
results = {r.metric_type: r.metric_value for r in card.data.eval_results}
folder = snapshot_download(repo, revision=tag)
model = AutoModelForCausalLM.from_pretrained(repo, revision=tag)
stored = load_file(folder + "/model.safetensors")
loaded = model.state_dict()
equal = all(torch.equal(loaded[name], stored[name]) for name in stored)
size = len(AutoTokenizer.from_pretrained(repo, revision=tag))
print(json.dumps({"card": card.data.to_dict(), "results": results, "folder": folder, "equal": equal, "size": size}))
"""
    first = run.checkpoint_steps()[0]
    seen = json.loads(run_python("-c", visit, REPO, f"step-{first}", env=surroundings(hub)).splitlines()[-1])
    assert seen["card"]["library_name"] == "transformers"
    assert seen["card"]["model-index"][0]["name"] == "uploaded"
    score = ranked.proposed.score
    expected = {"loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
    assert seen["results"] == pytest.approx(expected, rel=1e-5)
    assert seen["equal"]
    assert seen["size"] == 512

    downloaded, again = Path(seen["folder"]), tmp_path / "again"
    for name in [*manifest.read(downloaded / "llmtrain").files, manifest.NAME]:
        source = f"llmtrain/{name}" if name == manifest.NAME else name.removeprefix("model/")
        (again / name).parent.mkdir(parents=True, exist_ok=True)
        (again / name).write_bytes((downloaded / source).read_bytes())
    assert manifest.verify(again).train_state.step == first


def test_the_token_stands_nowhere(uploaded: Uploaded):
    run, hub = uploaded.run, uploaded.hub
    secret = TOKEN.encode()
    assert any("llmtrain.service.hub upload" in command for command in uploaded.commands)
    assert not any(TOKEN in command for command in uploaded.commands)
    assert "uploaded   step" in (run.path / "said.txt").read_text()
    assert not files_with(run.path, secret)
    assert len(list((hub.folder / "lfs").iterdir())) >= 6
    assert not files_with(hub.folder / "lfs", secret)
    contents = [f.content for commit in hub.repos[REPO].commits.values() for f in commit.tree.values()]
    assert not any(secret in content for content in contents)
    assert not any(secret in f"{c.title} {c.description}".encode() for c in hub.repos[REPO].commits.values())


def test_the_command_line_shows_verifies_deletes_and_pushes(uploaded: Uploaded, copies: Copies):
    run = uploaded.run
    first, best, last = run.checkpoint_steps()
    env = {**surroundings(uploaded.hub), "COLUMNS": "200"}

    def checkpoints(*words: str) -> str:
        return run_module("launcher", "checkpoints", str(run.path), *words, env=env)

    table = checkpoints()
    assert f"> {best}" in table
    assert f"step-{best}" in table
    assert checkpoints("best").strip() == str(run.checkpoint(best))
    assert [line.split()[1:3] for line in checkpoints("verify").splitlines()] == [
        [str(step), "whole"] for step in (first, best, last)
    ]
    shown = checkpoints("--test")
    losses = {step: score.loss for step, score in ledger.scores(run, "test").items()}
    assert losses.keys() == {best}
    assert f"{losses[best]:.4f}" in shown
    recorded = run.scores.read_bytes()
    assert f"{losses[best]:.4f}" in checkpoints("--test")
    assert run.scores.read_bytes() == recorded

    configure(run, checkpoint_keep_last=1, checkpoint_keep_best=1)
    assert f"to be deleted  step {first}," in checkpoints("prune")
    assert run.checkpoint_steps() == [first, best, last]
    checkpoints("prune", "--yes")
    assert run.checkpoint_steps() == [best, last]
    checkpoints("push", "--repo", "tester/second")
    assert tags(uploaded.hub, "tester/second") == [best, last]


# What does not


def test_altered_bytes_are_never_uploaded(copies: Copies, hub: Hub):
    run = copies.make("altered", 1, 2, 3, 4, hub_repo=None)
    flip(run.checkpoint(1) / "state/optimizer-00000-of-00001.safetensors")
    with run.lock(), serving(run, env=surroundings(hub)):  # as if training went on: it waits for more
        wait_until(lambda: (status := ledger.status(run)) is not None and status.idle)
        assert run.quarantined_steps() == [1]
        flip(run.checkpoint(2) / "model/model.safetensors")  # all have been verified and scored by now
        flip(run.checkpoint(3) / "model/config.json")
        configure(run, hub_repo=REPO)
        wait_until(lambda: 4 in ledger.uploads(run) and run.quarantined_steps() == [1, 2, 3])
    assert tags(hub) == [4]
    assert [commit.title for commit in checkpoint_commits(hub)] == ["step 4"]
    assert run.checkpoint_steps() == [4]
    status = status_of(run)
    assert status["checkpoints"]["quarantined"] == [1, 2, 3]
    assert status["problems"] == ["in quarantine, because a file did not match its hash: steps 1, 2 and 3"]


def test_text_with_a_token_in_it_is_refused(copies: Copies, hub: Hub):
    run = copies.make("leaky", 1, data_sources=[{"kind": "text", "paths": [f"/data/{STRANGER}/a.txt"]}])
    said = serve(run, "--drain", code=errors.HubError.exit_code, env=surroundings(hub))
    assert f"something like an access token stands in {run.config}" in said
    assert checkpoint_commits(hub) == []
    assert not any(STRANGER.encode() in f.content for c in hub.repos[REPO].commits.values() for f in c.tree.values())
    assert STRANGER not in said


def test_what_the_hub_refuses_is_said_and_sent_when_it_is_mended(copies: Copies, hub: Hub):
    run = copies.make("refused", 2)

    def refused(why: str, token: str | None = TOKEN) -> None:
        said = serve(run, "--drain", code=errors.HubError.exit_code, env=surroundings(hub, token))
        state = ledger.hub_state(run)
        assert state is not None
        assert state.state == "refused"
        assert state.message.startswith(REPO)
        assert why in state.message
        assert said.count(f"HUB: {state.message}") == 1
        assert state.message in jobs.status_of(run).problems
        assert upload_records(run) == []
        assert run.checkpoint_steps() == [2]

    refused("there is no token; set HF_TOKEN", token=None)
    refused("the Hub refuses (401: Invalid credentials", token=STRANGER)
    refused("the Hub refuses (403: You need a token with write access", token=READER)
    hub.faults.add("wrong_visibility")
    refused("is public although hub.private=true")
    hub.repos[REPO].private = True
    serve(run, "--drain", env=surroundings(hub))
    assert tags(hub) == [2]
    state = ledger.hub_state(run)
    assert state is not None
    assert (state.state, state.private) == ("ok", True)
    assert jobs.status_of(run).problems == []
    another = copies.make("another", 2)
    said = serve(another, "--drain", code=errors.HubError.exit_code, env=surroundings(hub))
    assert f"{REPO} holds the checkpoints of another run" in said
    assert len(checkpoint_commits(hub)) == 1


# Training beside it


def hub_settings(name: str, *more: str) -> list[str]:
    auto = ["service.start=auto", f"hub.repo={REPO}", "hub.pause_s=0.2", "train.steps=8"]
    return [f"run.name={name}", *MANY_SAVES, *auto, *more]


def test_training_goes_on_without_a_hub_that_refuses(workplace: Workplace, hub: Hub):
    run = RunDir(workplace.run_folder("not-taken"))
    try:
        output = train(
            workplace, *hub_settings("not-taken", "checkpoint.every_steps=4"), env=surroundings(hub, STRANGER)
        )
        assert output.count(f"HUB        {REPO}: the Hub refuses (401") == 1
        assert STRANGER not in output
        assert sorted(ledger.scores(run)) == run.checkpoint_steps() == [4, 8]
        assert any("the Hub refuses" in problem for problem in jobs.status_of(run).problems)
        wait_until(lambda: not run.is_served())  # only a person can mend it: nobody waits for that
    finally:
        end_service(run)
    serve(run, "--drain", env=surroundings(hub))
    assert tags(hub) == run.checkpoint_steps()
    assert jobs.status_of(run).problems == []


def test_a_hub_that_hangs_costs_training_nothing(workplace: Workplace, many: str, hub: Hub):
    hub.faults.add("hang", times=ALWAYS)
    stall_s, run = 1.0, RunDir(workplace.run_folder("hanging"))
    try:
        settings = hub_settings("hanging", "train.steps=5", f"hub.stall_s={stall_s}", "service.wait_s=0.1")
        output = train(workplace, *settings, env=surroundings(hub))
        assert "training goes on; checkpoints wait on disk" in output
        assert run.checkpoint_steps() == [1, 2, 3, 4, 5]
        assert upload_records(run) == []
        waits, usual = (
            statistics.median(read_speed(one).save_wait_s.values())
            for one in (run, RunDir(workplace.run_folder(many)))
        )  # fmt: skip
        assert waits < 3 * usual + stall_s / 2  # whoever waited for the Hub would wait for `stall_s`
        wait_until(lambda: len([event for event in ledger.events(run) if event.kind == "stalled"]) >= 2)
        hub.faults.clear()
        wait_until(lambda: sorted(ledger.uploads(run)) == [1, 2, 3, 4, 5])
    finally:
        end_service(run)
    assert tags(hub) == [1, 2, 3, 4, 5]


# What goes wrong on the way


def test_an_answer_that_was_lost_leads_to_no_second_commit(copies: Copies, hub: Hub):
    run = copies.make("lost", 1, 2)
    hub.empty_commits = True
    requests = ("^POST .*/commit/checkpoints", "^POST .*/tag/", "^POST .*/commit/main")
    lost = [hub.faults.add("lost_answer", request) for request in requests]
    hub.faults.add("status", "^POST .*/preupload/checkpoints", skip=1, status=400)  # who repeats it blindly gives up
    serve(run, "--drain", env=surroundings(hub))
    assert [fault.struck for fault in lost] == [1, 1, 1]
    assert [commit.title for commit in checkpoint_commits(hub)] == ["step 1", "step 2"]
    assert {tag: oid for tag, oid in hub.repos[REPO].tags.items()} == {
        record.tag: record.commit for record in upload_records(run)
    }
    assert tags(hub) == [1, 2]
    renewals = [commit.title for commit in hub.commits(REPO) if commit.title.startswith("best so far")]
    assert renewals[0] == "best so far: step 2"
    assert len(renewals) == len(set(renewals))  # once for each checkpoint that became the best


def test_a_hash_that_is_not_ours_is_never_taken_for_confirmed(copies: Copies, hub: Hub):
    run = copies.make("misreported", 1)
    hub.faults.add("wrong_hash", "^model.safetensors$")
    with serving(run, "--drain", env=surroundings(hub)) as service:
        wait_until(lambda: len([event for event in ledger.events(run) if event.kind == "upload-failed"]) >= 2)
        status = ledger.status(run)
        assert status is not None
        assert "model.safetensors is not what was sent" in (status.last_error or "")
        assert upload_records(run) == []
        assert tags(hub) == []
        hub.faults.clear()
        assert service.wait(60) == 0
    assert [record.step for record in upload_records(run)] == tags(hub) == [1]
    assert len(checkpoint_commits(hub)) == 1


def test_the_hub_is_asked_again_when_it_said_and_not_before(copies: Copies, hub: Hub):
    run = copies.make("quota", 1)
    hub.faults.add("quota", minutes=7)
    with serving(run, env=surroundings(hub)):
        status = wait_until(lambda: (s := ledger.status(run)) is not None and s.next_try_s and s)
        assert 400 < status.next_try_s <= 420
        assert "rate limit for repository commits" in status.last_error
    hub.faults.clear()
    hub.faults.add("status", "^POST .*/commit/", status=429, retry_after_s=3)
    serve(run, "--drain", env=surroundings(hub))
    _, refused, accepted = (e for e in hub.log if e.method == "POST" and e.path.endswith("/commit/checkpoints"))
    assert (refused.status, accepted.status) == (429, 200)
    assert accepted.started - refused.started >= 3
    assert tags(hub) == [1]


def test_one_that_fails_holds_up_nothing_and_comes_late_without_turning_main_back(copies: Copies, hub: Hub):
    worse, best, _ = copies.around_the_best()
    run = copies.make("late", worse, best)
    weights = manifest.read(run.checkpoint(worse)).files["model/model.safetensors"].sha256
    hub.faults.add("reject_upload", f"^PUT .*{weights}", times=ALWAYS)
    with serving(run, "--drain", env=surroundings(hub)) as service:
        wait_until(lambda: REPO in hub.repos and len(hub.commits(REPO)) == 2)  # main was renewed without it
        assert tags(hub) == [best]
        hub.faults.clear()
        assert service.wait(60) == 0
    assert tags(hub) == [worse, best]
    assert [commit.title for commit in checkpoint_commits(hub)] == [f"step {best}", f"step {worse}"]
    assert shown_on_main(hub) == best
    assert len(hub.changes(REPO, "model.safetensors")) == 1
