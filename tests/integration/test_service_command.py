"""`python -m llmtrain.service` beside training and without it: scoring, ranking, quarantine, ending early."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from llmtrain import intervals, ledger, log, origin, ranking, rundir
from llmtrain.rundir import RunDir
from llmtrain.service import plan, validate
from llmtrain.service.beside import Companion, waiting
from tests.support import checkpoint_runs
from tests.support.checkpoint_runs import config_of, make_run, save, stretches, upload
from tests.support.hub_server import Hub
from tests.support.runs import Workplace, make_workplace
from tests.support.service_runs import (
    MANY_SAVES,
    REPO,
    copy_run,
    end_service,
    flip,
    score_records,
    serve,
    serving,
    status_of,
    surroundings,
    tags,
    train,
    wait_until,
)

SAVES = range(1, 11)


@pytest.fixture(scope="module")
def many(workplace: Workplace) -> str:
    """Name of a run whose checkpoints nobody has looked after."""
    train(workplace, "run.name=many", f"train.steps={SAVES[-1]}", *MANY_SAVES)
    assert not RunDir(workplace.run_folder("many")).service.exists()
    return "many"


@pytest.fixture(scope="module")
def scored(workplace: Workplace, many: str, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """That run after a service that was started by hand, later, and in another folder."""
    run = RunDir(workplace.run_folder(many))
    serve(run, "--drain", cwd=tmp_path_factory.mktemp("elsewhere"))
    return run


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """A run on short documents, several in a row, whose training has started the service."""
    workplace = make_workplace(tmp_path_factory.mktemp("served"), packing="bestfit")
    settings = workplace.config.read_text()
    workplace.config.write_text(settings.replace("{kind: text,", '{kind: text, separator: "\\n\\n",'))
    output = train(workplace, "service.start=auto", "checkpoint.keep_last=100")
    run = RunDir(workplace.run_folder("run"))
    (run.path / "said.txt").write_text(output)
    (run.path / "steps-scored-by-then.json").write_text(json.dumps(sorted(ledger.scores(run))))
    yield run
    end_service(run)


def check_scores(run: RunDir) -> None:
    """Every checkpoint's, against what the training ranks computed at that step, and against the stretches."""
    measured, scores = ledger.heldout_at_saves(run), ledger.scores(run)
    assert sorted(scores) == run.checkpoint_steps()
    for step, score in scores.items():
        assert (score.origin, score.how) == ("disk", "cpu fp32")
        assert score.loss == pytest.approx(measured[step]["loss"], abs=1e-6)
        assert score.bits_per_byte == pytest.approx(measured[step]["bits_per_byte"], abs=1e-6)
        losses = ranking.read_losses(run, score)
        assert losses is not None
        assert losses.shape[1] >= 8
        assert losses[1].sum() == score.targets
        assert losses[0].sum() / losses[1].sum() == pytest.approx(score.loss, rel=1e-12)
    assert len({score.loss for score in scores.values()}) == len(scores)


def points(run: RunDir, tag: str = "heldout/loss") -> dict[int, float]:
    """What TensorBoard shows; fails where a step stands there twice or too late."""
    if not list(run.validation_board.glob("events.*")):
        return {}
    events = EventAccumulator(str(run.validation_board), size_guidance={SCALARS: 0}).Reload()
    found = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    steps = [point.step for point in found]
    assert steps == sorted(set(steps))
    return {point.step: point.value for point in found}


def test_scores_from_disk_are_those_of_training_also_from_another_folder(scored: RunDir):
    assert "dir: shards\n" in scored.config.read_text()  # as seen from the folder that training was started in
    check_scores(scored)
    assert "scored from disk" in json.loads(scored.summary.read_text())["best_reason"]  # at the end nothing was


@pytest.mark.usefixtures("scored")
def test_all_scores_of_a_run_are_in_one_precision(workplace: Workplace, many: str, monkeypatch: pytest.MonkeyPatch):
    """As if the first checkpoint had been scored on a GPU, and the next one on the CPU that training left."""
    run = copy_run(workplace, many, "in-bf16", [1])
    first = ledger.scores(run)[1].model_copy(update={"how": "cuda:1 bf16"})
    run.scores.unlink()
    ledger.append(run.scores, first)
    shutil.copytree(RunDir(workplace.run_folder(many)).checkpoint(2), run.checkpoint(2))
    shutil.rmtree(run.service / "losses")
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr(intervals, "MAX_UNITS", 50)
    (score,) = validate.validate(run, config_of(run), [2], "heldout", torch.device("cpu"))
    assert score.how == "cpu bf16"
    losses = ranking.read_losses(run, score)
    assert losses is not None
    assert losses.shape[1] <= intervals.MAX_UNITS


def test_training_ends_with_all_checkpoints_scored_and_ranked(served: RunDir):
    steps = served.checkpoint_steps()
    assert steps == [4, 8, 12, 16, 20, 24]
    assert json.loads((served.path / "steps-scored-by-then.json").read_text()) == steps
    check_scores(served)
    assert origin.read(served).finished  # its GPUs, if it had any, are for scoring
    ranked = ranking.rank(served)
    assert ranked is not None
    assert [entry.step for entry in ranked.entries] == steps
    assert all(entry.difference is not None for entry in ranked.entries if not entry.is_best)
    summary = json.loads(served.summary.read_text())
    proposed = str(served.checkpoint(ranked.proposed.step))
    assert proposed.endswith(summary["best_checkpoint"])
    assert summary["best_reason"].startswith("scored from disk")
    assert f"use checkpoint  {summary['best_checkpoint']} (held-out loss" in (served.path / "said.txt").read_text()


def test_tensorboard_shows_every_score_once(served: RunDir):
    losses = {step: score.loss for step, score in ledger.scores(served).items()}
    wait_until(lambda: points(served).keys() == losses.keys())  # the view follows the ledger, a turn later
    assert points(served) == pytest.approx(losses, abs=1e-6)
    assert points(served, "heldout/bits_per_byte").keys() == losses.keys()


def test_tensorboard_is_rebuilt_for_a_late_step_and_after_a_loss(workplace: Workplace, many: str, scored: RunDir):
    run = copy_run(workplace, many, "board", [1, 3, 5])
    late, aside = run.checkpoint(3), run.path / "aside"
    late.rename(aside)
    records = [score for score in score_records(run) if score.step != 3]
    run.scores.write_text("".join(score.model_dump_json() + "\n" for score in records))
    with run.lock(), serving(run):  # as if training went on: with nothing to wait for it would leave
        wait_until(lambda: list(points(run)) == [1, 5])
        aside.rename(late)
        wait_until(lambda: list(points(run)) == [1, 3, 5])
        assert [score.step for score in score_records(run)] == [1, 5, 3]
    shutil.rmtree(run.validation_board)
    serve(run, "--drain")
    assert points(run) == pytest.approx({score.step: score.loss for score in score_records(run)}, abs=1e-6)


def test_a_byte_that_changed_after_the_save_is_quarantined_and_the_others_go_on(workplace: Workplace, many: str):
    run = copy_run(workplace, many, "flipped", range(1, 5), scored=False)
    flip(run.checkpoint(2) / "model/model.safetensors")
    flip(run.checkpoint(4) / "state/optimizer-00000-of-00001.safetensors")
    serve(run, "--drain")
    assert run.checkpoint_steps() == sorted(ledger.scores(run)) == [1, 3]
    status = status_of(run)
    assert status["checkpoints"]["quarantined"] == [2, 4]
    assert status["problems"] == ["in quarantine, because a file did not match its hash: steps 2 and 4"]
    reasons = [event.message for event in ledger.events(run) if event.kind == "quarantined"]
    assert [reason.split(": ")[1] for reason in reasons] == ["altered"] * 2
    output = train(workplace, "run.name=flipped", "train.steps=5", *MANY_SAVES)
    assert "resuming   from step 3" in output


def test_of_several_services_one_is_at_work(workplace: Workplace, many: str):
    run = copy_run(workplace, many, "crowd", SAVES, scored=False)
    with run.lock() as training, serving(run) as first:
        wait_until(run.is_served)
        assert f"another service (process {first.pid} on" in serve(run)  # leaves at once, with 0
        with serving(run, "--drain") as second:  # waits for its turn
            wait_until(lambda: len(ledger.scores(run)) == len(SAVES))
            training.close()
            assert first.wait(60) == 0
            assert second.wait(60) == 0
    assert [score.step for score in score_records(run)] == list(SAVES)


def test_an_adapter_is_scored_as_training_scored_it(tmp_path: Path):
    from tests.support.bases import write_llama

    write_llama(tmp_path / "llama")
    records = [{"prompt": f"Count from {n}:", "completion": f" {n + 1} {n + 2} {n + 3}"} for n in range(200)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "config.yaml").write_text(
        """
run: {name: run, dir: runs}
model: {kind: qlora, base: llama, context: 64, lora: {r: 4}}
data:
  dir: shards
  sources: [{kind: json, paths: [records.json]}]
  format: {kind: completion}
  split: {heldout: 0.1}
train: {steps: 4, global_batch_size: 8, precision: fp32}
optim: {lr: 5e-3}
evaluate: {every_steps: null, train_rows: 0}
checkpoint: {every_steps: 2, keep_last: 100}
service: {start: auto}
"""
    )
    train(Workplace(tmp_path))
    run = RunDir(tmp_path / "runs/run")
    end_service(run)
    assert run.checkpoint_steps() == [2, 4]
    check_scores(run)


@pytest.mark.parametrize(("saves", "rhythms"), [(10, (4, 3, 7)), pytest.param(30, (10, 9, 7), marks=pytest.mark.soak)])
def test_the_rule_holds_here_and_on_the_hub_also_through_crashes(
    workplace: Workplace, many: str, scored: RunDir, tmp_path: Path, saves: int, rhythms: tuple[int, ...]
):
    if saves > len(SAVES):
        train(workplace, "run.name=very-many", f"train.steps={saves}", *MANY_SAVES)
        many, scored = "very-many", RunDir(workplace.run_folder("very-many"))
        serve(scored, "--drain")
    losses = {step: score.loss for step, score in ledger.scores(scored).items() if step <= saves}
    best = sorted(losses, key=losses.__getitem__)[:2]
    # Which saves are the best is for training to say: an interval that keeps one of them anyway would show nothing.
    reasons = {every: {saves - 1, saves, *range(every, saves + 1, every)} for every in rhythms}
    every = next(every for every in rhythms if not reasons[every].issuperset(best))
    for_other_reasons = reasons[every]
    assert not for_other_reasons.issuperset(best)
    rule = {"checkpoint_keep_last": 2, "checkpoint_keep_best": 2, "checkpoint_keep_every": every}
    steps = range(1, saves + 1)
    run = copy_run(workplace, many, f"kept-{saves}", steps, **rule, hub_repo=REPO, hub_prune=True, hub_pause_s=0.2)
    kept = sorted({*best, *for_other_reasons})

    def leftovers() -> list[Path]:
        return list(run.checkpoints.glob(f"{rundir.DOOMED}*"))

    with Hub(tmp_path / "hub") as hub:
        crash = f"between-rename-and-delete:{tmp_path / 'first'}"
        serve(run, "--drain", code=-signal.SIGKILL, env=surroundings(hub, crash=crash))
        assert leftovers()
        crash = f"before-untag-record:{tmp_path / 'second'}"
        serve(run, "--drain", code=-signal.SIGKILL, env=surroundings(hub, crash=crash))
        assert len(tags(hub)) == saves - 1
        assert not any(upload.removed for upload in ledger.uploads(run).values())
        serve(run, "--drain", env=surroundings(hub))
        assert run.checkpoint_steps() == tags(hub) == kept
        assert not leftovers()
        removed = {step: upload.removed for step, upload in ledger.uploads(run).items()}
        assert removed == {step: step not in kept for step in steps}
        assert len(hub.commits(REPO)) == 2  # main was made once, when all of that was done
        assert not hub.bugs


def test_patience_ends_training_on_all_ranks_until_it_is_larger(workplace: Workplace):
    settings = [
        "run.name=patient", "service.start=auto", "service.score=training", "optim.lr=1e-30",
        "checkpoint.every_steps=50", "evaluate.every_steps=null", "evaluate.train_rows=0", 'evaluate.sample.prompt=""',
    ]  # fmt: skip
    run = RunDir(workplace.run_folder("patient"))

    def last_step() -> int:
        return workplace.ledger("patient")[-1]["step"]

    try:
        output = train(workplace, *settings, "train.steps=100000", "service.patience=2", ranks=2)
        ended = last_step()
        assert ended < 100_000
        assert "ended      early: the held-out loss has not improved for" in output
        assert "a larger service.patience" in output
        assert "stopped by" not in output
        again = train(workplace, *settings, "train.steps=100000", "service.patience=2")
        assert "ended      early: the held-out loss has not improved for" in again
        assert last_step() == ended
        on = train(workplace, *settings, f"train.steps={ended + 5}", "service.patience=100000")
        assert f"resuming   from step {ended:,}" in on
        assert "ended      early" not in on
        assert last_step() == ended + 5
        assert not run.early_stop.exists()
    finally:
        end_service(run)


# ---------------------------------------------------------------------------------------------- as training sees it


def refused_by_the_system(*_: object, **__: object) -> NoReturn:
    raise BlockingIOError(11, "Resource temporarily unavailable")


@pytest.mark.parametrize(
    ("start", "fails", "what"),
    [
        ("auto", (subprocess, "Popen"), "looking after the checkpoint service failed"),
        ("auto", (ledger, "append"), "looking after the checkpoint service failed"),
        ("auto", (RunDir, "is_served"), "looking after the checkpoint service failed"),
        ("never", (RunDir, "checkpoint_steps"), "deleting checkpoints that the rule does not keep failed"),
    ],
)
def test_what_goes_wrong_after_a_save_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, fails: tuple[object, str], what: str
):
    run = make_run(tmp_path / "run", f"service.start={start}")
    save(run, 100)
    said: list[str] = []
    monkeypatch.setattr(log, "warning", said.append)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: None)
    monkeypatch.setattr(*fails, refused_by_the_system)
    Companion(run, config_of(run)).after_save()
    assert [what in message and "BlockingIOError" in message for message in said][-1:] == [True]


def say_status(run: RunDir, **more: object) -> None:
    ledger.write(run.service_status, ledger.Status(pid=os.getpid(), host="here", **more))  # pyright: ignore[reportArgumentType]


def show_on_main(run: RunDir, repo: str) -> None:
    run.published.write_text(json.dumps({"digest": plan.digest(run, repo), "repo": repo, "time": time.time()}))


def test_the_end_waits_for_the_records_of_these_checkpoints_in_this_repository(tmp_path: Path):
    run = make_run(tmp_path / "run", "hub.repo=ada/gpt")

    def left() -> str | None:
        return waiting(run, config_of(run), since=0.0)

    save(run, 100)
    assert left() == "1 to score, 1 to upload (Ctrl-C leaves it at work)"
    checkpoint_runs.score(run, 100, stretches(0.0))
    upload(run, 100, "ada/another")
    assert left() == "0 to score, 1 to upload (Ctrl-C leaves it at work)"
    upload(run, 100)
    show_on_main(run, "ada/gpt")
    assert left() is None
    save(run, 100, content="other weights")
    assert left() == "1 to score, 1 to upload (Ctrl-C leaves it at work)"


def test_the_end_waits_for_what_training_measured_and_not_for_what_it_did_not(tmp_path: Path):
    run = make_run(tmp_path / "run", "service.score=training")
    began = time.time()
    save(run, 100)
    save(run, 107, None)  # a stop forced it
    waits = "1 to score, 0 to upload (Ctrl-C leaves it at work)"
    assert waiting(run, config_of(run), began) == waits
    save(run, 120)
    (run.checkpoint(120) / "manifest.json").unlink()  # the service deletes it
    assert waiting(run, config_of(run), began) == waits
    checkpoint_runs.score(run, 100, 3.0)
    assert waiting(run, config_of(run), began) is None


def test_the_end_waits_until_main_is_renewed_and_not_for_a_hub_that_refuses(tmp_path: Path):
    run = make_run(tmp_path / "run", "hub.repo=ada/gpt")
    save(run, 100)
    checkpoint_runs.score(run, 100, stretches(0.0))
    upload(run, 100)
    began = time.time()
    renewing = "main on the Hub to renew (Ctrl-C leaves it at work)"
    assert waiting(run, config_of(run), began) == renewing
    show_on_main(run, "ada/another")
    say_status(run, doing=["renewing main on the Hub"])
    assert waiting(run, config_of(run), began) == f"renewing main on the Hub; {renewing}"
    say_status(run, last_error="uploading step 100 failed")
    assert waiting(run, config_of(run), began) == f"{renewing}; uploading step 100 failed"
    say_status(run, problem="the Hub refuses (401)")
    assert waiting(run, config_of(run), began) is None
    say_status(run)
    show_on_main(run, "ada/gpt")
    assert waiting(run, config_of(run), began) is None
    checkpoint_runs.score(run, 100, stretches(0.1))
    assert waiting(run, config_of(run), began) == renewing
    without = make_run(tmp_path / "without")
    save(without, 100)
    checkpoint_runs.score(without, 100, stretches(0.0))
    assert waiting(without, config_of(without), began) is None
