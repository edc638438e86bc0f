"""`llmtrain checkpoints`, its actions: best, verify, show, push, prune, and --test."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.choosing import checkpoints, final_score
from launcher.choosing.checkpoints import Action, Options, act
from llmtrain import jsonl, ledger, origin, scoring_place
from llmtrain.errors import CheckpointError, ConfigError, RunFolderError, UserError
from llmtrain.ledger import Event, Score
from llmtrain.rundir import RunDir
from tests.support import checkpoint_runs
from tests.support.checkpoint_runs import config_of, make_run, save, score, stretches, upload
from tests.support.runs import Workplace, environment

narrow, run = checkpoint_runs.narrow, checkpoint_runs.run  # fixtures


# ---------------------------------------------------------------------------------------------- best


def test_best_prints_the_path_alone(run: RunDir, capsys: pytest.CaptureFixture[str]):
    score(run, 800, stretches(0.3))
    act(run.path, "best", None, Options())
    output = capsys.readouterr()
    assert (output.out, output.err) == (f"{run.checkpoint(300)}\n", "")


def test_best_says_how_to_fetch_what_is_on_the_hub_alone(run: RunDir, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(run.checkpoint(300))
    shutil.rmtree(run.checkpoint(400))
    with pytest.raises(CheckpointError) as error:
        act(run.path, "best", None, Options())
    assert "hf://ada/gpt@step-00000300" in str(error.value)
    assert "hf download ada/gpt --revision step-00000300 --local-dir step-00000300" in str(error.value)
    assert capsys.readouterr().out == ""


def test_best_of_nothing_is_an_error(tmp_path: Path, run: RunDir):
    empty = make_run(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no checkpoint has a held-out loss yet"):
        act(empty.path, "best", None, Options())
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    ledger.append(run.uploads, ledger.uploads(run)[300].model_copy(update={"removed": True}))
    ledger.append(run.uploads, ledger.uploads(run)[100].model_copy(update={"removed": True}))
    with pytest.raises(CheckpointError, match="none is left, neither on disk nor on the Hub"):
        act(run.path, "best", None, Options())


def test_where_the_scored_ones_are_gone_the_lowest_loss_at_a_save_is_proposed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = make_run(tmp_path / "resumed")
    save(run, 10)
    score(run, 10, 3.0)
    shutil.rmtree(run.checkpoint(10))
    save(run, 20, 2.5)
    save(run, 30, 2.75)
    act(run.path, "best", None, Options())
    output = capsys.readouterr()
    assert output.out == f"{run.checkpoint(20)}\n"
    assert "none is left of those that were scored from disk" in output.err


# ---------------------------------------------------------------------------------------------- verify


def test_verify_names_the_bad_file_and_moves_nothing(run: RunDir, capsys: pytest.CaptureFixture[str]):
    act(run.path, "verify", None, Options())
    assert capsys.readouterr().out.count(" whole ") == 5
    file = run.checkpoint(400) / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="1 of 5 checkpoints do not verify: step 400") as error:
        act(run.path, "verify", None, Options())
    assert error.value.exit_code == 18
    output = capsys.readouterr().out
    assert f"BAD      {file}: altered" in output
    assert output.count(" whole ") == 4
    assert run.checkpoint_steps() == [200, 300, 400, 500, 800]
    act(run.path, "verify", 300, Options())
    assert capsys.readouterr().out.count("step ") == 1
    with pytest.raises(CheckpointError, match="step 100 is not on disk; there are steps 200, 300, 400, 500 and 800"):
        act(run.path, "verify", 100, Options())


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_bad(run: RunDir, capsys: pytest.CaptureFixture[str]):
    found = checkpoints.verified(run, [200, 250])
    assert found[0] == (200, None)
    assert found[1][1] is not None
    shutil.rmtree(run.checkpoint(500))
    steps_then = [*run.checkpoint_steps(), 500]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "checkpoint_steps", lambda self: steps_then)
        act(run.path, "verify", None, Options())
    assert "deleted while it was read" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- show


def test_show_tells_all_and_obeys_no_escape_sequence(run: RunDir, capsys: pytest.CaptureFixture[str]):
    evil = "ok\x1b[2J\x1b]0;owned\x07\x9b31m\u202eabc\n"
    jsonl.append(
        run.samples, [{"step": 290, "prompt": "def main(", "text": evil}, {"step": 9, "prompt": "", "text": ""}]
    )
    ledger.append(run.service_events, Event(kind="upload-failed", message=f"503 {evil}", step=300))
    score(run, 300, stretches(0.3), split="test")
    act(run.path, "show", 300, Options())
    output = capsys.readouterr().out
    flat = " ".join(output.split())
    for text in (
        "> proposed, within noise of the best",
        "epoch 9.60: 9,600 rows, 614,400 learned tokens",
        "2 ranks, ZeRO-2",
        "model/model.safetensors",
        "from disk, cpu fp32, 2 s",
        "test 3.",
        "ada/gpt, tag step-00000300, commit c0ffeec0ffee",
        "(123.5 kB in 4 s, 2 attempts)",
        "upload-failed: 503 ok\\x1b[2J",
        "(at step 290) 'def main(' -> 'ok\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\u202eabc\\n'",
    ):
        assert text in flat, text
    assert all(c == "\n" or c.isprintable() for c in output)


def test_show_of_what_is_not_on_disk(run: RunDir, capsys: pytest.CaptureFixture[str]):
    act(run.path, "show", 100, Options())
    assert "worse than the best one" in " ".join(capsys.readouterr().out.split())
    act(run.path, "show", 700, Options())
    assert str(run.quarantined(700)) in "".join(capsys.readouterr().out.split())
    with pytest.raises(CheckpointError, match="nothing is known of a step 123"):
        act(run.path, "show", 123, Options())


# ---------------------------------------------------------------------------------------------- push, prune


def test_push_becomes_the_service(run: RunDir, tmp_path: Path):
    assert act(run.path, "push", None, Options()) == ["--run", str(run.path), "--drain"]
    nowhere = make_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"hub.repo=null .*--repo user/name, or start training's command again with"):
        act(nowhere.path, "push", None, Options())
    with pytest.raises(ConfigError, match="--repo gpt: must be of the form user/name"):
        act(nowhere.path, "push", None, Options(repo="gpt"))
    wanted = ["--run", str(nowhere.path), "--drain", "--repo", "ada/gpt"]
    assert act(nowhere.path, "push", None, Options(repo="ada/gpt")) == wanted


def test_beside_a_service_nothing_is_pushed_or_pruned(run: RunDir):
    lock = run.lock_service()
    assert lock is not None
    with lock, pytest.raises(RunFolderError, match="a checkpoint service is at work here"):
        act(run.path, "push", None, Options())


def test_prune_shows_before_it_deletes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run", "hub.repo=ada/gpt", "checkpoint.keep_last=1", "checkpoint.keep_best=1")
    for step, shift in {100: 0.3, 200: 0.001, 300: 0.0, 400: 0.1, 500: 0.2, 600: 0.3}.items():
        save(run, step)
        if step != 400:
            score(run, step, stretches(shift, noise=0.03, seed=step))
    for step in (100, 200):
        upload(run, step)
    assert act(run.path, "prune", None, Options()) is None
    output = capsys.readouterr().out
    assert "kept by it     steps 300 and 600" in output
    assert "held back      step 400: not scored yet" in output
    assert "held back      step 500: not confirmed on the Hub yet" in output
    assert "to be deleted  steps 100 and 200, " in output
    assert "step 200 is the one that is proposed now; only its upload is left then" in output
    assert "it asks the Hub, and keeps what ada/gpt does not hold any more (all of these, where" in output
    assert "prune --yes" in output
    assert len(run.checkpoint_steps()) == 6
    assert act(run.path, "prune", None, Options(yes=True)) == ["--run", str(run.path), "--only", "prune"]
    (run.checkpoint(600) / "model" / "model.safetensors").write_text("short")
    capsys.readouterr()
    act(run.path, "prune", None, Options())
    assert "held back      step 500: the newest one that verifies" in capsys.readouterr().out


def test_prune_without_uploads_asks_no_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run", "checkpoint.keep_last=1", "checkpoint.keep_best=1")
    for step, loss in ((100, 3.0), (200, 2.9)):
        save(run, step, loss)
        score(run, step, loss)
    act(run.path, "prune", None, Options())
    output = capsys.readouterr().out
    assert "to be deleted  step 100, " in output
    assert "puts one that is damaged into quarantine instead\nnothing was deleted" in output


def test_prune_of_what_is_kept_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run")
    save(run, 100)
    assert act(run.path, "prune", None, Options(yes=True)) is None
    assert "to be deleted  none" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- --test


@pytest.fixture
def validator(monkeypatch: pytest.MonkeyPatch, run: RunDir) -> list[list[str]]:
    """In place of the validator: notes its command and records a score."""
    commands: list[list[str]] = []

    def validate(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append(command[3:])
        score(run, int(command[command.index("--steps") + 1]), stretches(0.5), split="test")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(final_score.subprocess, "run", validate)
    return commands


def test_the_test_split_is_used_once(run: RunDir, validator: list[list[str]], capsys: pytest.CaptureFixture[str]):
    test = Options(test=True)
    act(run.path, None, None, test)
    first = capsys.readouterr().out
    assert "held-out  3.0003" in first
    assert "test      3.4983" in first
    assert validator[0][:5] == [str(run.path), "--steps", "300", "--split", "test"]
    assert validator[0][-2:] == ["--device", "cpu"]
    act(run.path, None, None, test)
    assert capsys.readouterr().out == first
    assert len(validator) == 1  # the recorded one was shown

    save(run, 50)
    score(run, 50, stretches(-1.0))
    with pytest.raises(
        UserError, match=r"used for step 300 .* now step 50 is proposed.*second held-out split"
    ) as error:
        act(run.path, None, None, test)
    assert error.value.exit_code == 2
    act(run.path, None, None, Options(test=True, again=True, device="cuda:1"))
    assert validator[1][-2:] == ["--device", "cuda:1"]
    assert "the test split was used for 300 too" in capsys.readouterr().out


def test_a_step_that_was_saved_anew_is_another_checkpoint_for_the_test_split(run: RunDir, validator: list[list[str]]):
    act(run.path, None, None, Options(test=True))
    save(run, 300, 3.002, content="saved again")
    score(run, 300, stretches(0.002, noise=0.03, seed=300))
    with pytest.raises(UserError, match="the test split was used for step 300"):
        act(run.path, None, None, Options(test=True))
    assert len(validator) == 1


@pytest.mark.parametrize(
    ("place", "free", "device"),
    [
        ("auto", True, "cuda:0"),  # as training computed
        ("training", True, "cuda:0"),
        ("auto", False, "cpu"),  # somebody else's
        ("cuda:1", True, "cuda:1"),
    ],
)
def test_the_test_split_is_scored_where_the_service_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, free: bool, device: str
):
    run = make_run(tmp_path / "run", f"service.score={place}")
    origin.note(run, "cuda", 1, 1)
    monkeypatch.setattr(scoring_place, "num_gpus", lambda: 1)
    monkeypatch.setattr(scoring_place, "memory_used", lambda _: 0.0 if free else 9e9)
    assert final_score._device_of(run, config_of(run))[0] == device


def test_the_test_split_needs_a_split_a_choice_and_files(run: RunDir, tmp_path: Path):
    test = Options(test=True)
    with pytest.raises(ConfigError, match=r"data.split.test=0 .*there is no test split"):
        act(make_run(tmp_path / "none", "data.split.test=0").path, None, None, test)
    unscored = make_run(tmp_path / "unscored")
    save(unscored, 100)
    with pytest.raises(CheckpointError, match="none has been scored from disk"):
        act(unscored.path, None, None, test)
    shutil.rmtree(run.checkpoint(300))
    shutil.rmtree(run.checkpoint(400))
    with pytest.raises(CheckpointError, match="step 300 is not on this disk any more"):
        act(run.path, None, None, test)


def test_a_validator_that_fails_gives_its_exit_code(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(final_score.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 13))
    with pytest.raises(SystemExit) as error:
        act(run.path, None, None, Options(test=True))
    assert error.value.code == 13


def test_a_real_run(workplace: Workplace, capsys: pytest.CaptureFixture[str]):
    """From training's files alone to a score on the test split."""
    workplace.train("run.name=listed", "train.steps=8", "checkpoint.every_steps=4", "service.start=never")
    run = RunDir(workplace.run_folder("listed"))
    command = [sys.executable, "-m", "llmtrain.service.validate", str(run.path), "--steps", "4", "8"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    for line in done.stdout.splitlines():
        ledger.append(run.scores, Score.model_validate_json(line))
    act(run.path, None, None, Options(as_json=True))
    told = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in told["checkpoints"]] == [4, 8]
    assert told["proposed"] == 8
    assert told["checkpoints"][0]["difference"][0] > 0
    act(run.path, "verify", None, Options())
    act(run.path, None, None, Options(test=True))
    assert "scored on the test split" in capsys.readouterr().out
    assert ledger.scores(run, "test")[8].loss == pytest.approx(ledger.scores(run)[8].loss, rel=0.2)


@pytest.mark.parametrize(
    ("action", "options", "missing"),
    [
        (None, Options(yes=True), "--yes: it goes with prune: llmtrain checkpoints RUN prune --yes"),
        ("verify", Options(yes=True), "--yes: it goes with prune"),
        (None, Options(again=True), "--again: it goes with --test"),
        (None, Options(device="cpu"), "--device cpu: it goes with --test"),
        ("best", Options(test=True), "--test: leave best out"),
        ("prune", Options(repo="ada/gpt"), "--repo ada/gpt: it goes with push"),
        (None, Options(test=True, as_json=True), "--json: it is for the table alone"),
        ("best", Options(by_loss=True), "--by-loss: it is for the table alone"),
    ],
)
def test_no_option_is_ignored_in_silence(run: RunDir, action: Action | None, options: Options, missing: str):
    with pytest.raises(ConfigError) as caught:
        act(run.path, action, None, options)
    (problem,) = caught.value.problems
    assert problem.startswith(missing)
