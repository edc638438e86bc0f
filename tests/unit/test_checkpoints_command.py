"""`llmtrain checkpoints`, its table: what people are shown, and what scripts can rely on."""

import json
import shutil
from pathlib import Path

import pytest

from launcher.choosing import listing
from launcher.choosing.checkpoints import Options, act
from launcher.display import Column, duration, fitted, printable, size
from llmtrain import jsonl, ledger
from llmtrain.errors import RunFolderError, UserError
from llmtrain.rundir import RunDir
from tests.support import checkpoint_runs
from tests.support.checkpoint_runs import make_run, save, score, stretches

narrow, run = checkpoint_runs.narrow, checkpoint_runs.run  # fixtures


def lines_of(output: str) -> dict[int, str]:
    """The table's lines by step."""
    found = {}
    for line in output.splitlines():
        first = line.removeprefix(">").split()[:1]
        if first and first[0].isdigit():
            found[int(first[0])] = line
    return found


# ---------------------------------------------------------------------------------------------- the table


def test_the_table_says_which_one_to_use_and_why(run: RunDir, capsys: pytest.CaptureFixture[str]):
    assert act(run.path, None, None, Options()) is None
    output = capsys.readouterr().out
    lines = lines_of(output)
    assert list(lines) == [100, 200, 300, 400, 500, 600, 700, 800]
    assert lines[300].startswith("> 300")
    assert "within noise" in lines[300]
    assert "disk+Hub" in lines[300]
    assert " best " in lines[400]
    assert " Hub " in lines[100]
    assert " gone" in lines[600]
    assert "quarantined" in lines[700]
    assert "(3.2500)  not scored" in lines[800]
    assert "step 300 cannot be told from the best (step 400); 300 was first" in output
    assert f"llmtrain generate {run.checkpoint(300)}\n" in output  # not folded: it can be copied
    assert "began after step 400" in output
    assert "left out     perplexity, bits/byte, train, gap, tag" in output
    assert "\x1b" not in output
    folded = [line.rstrip() for line in output.splitlines() if "llmtrain generate" not in line]
    assert max(map(len, folded)) <= 80


def test_a_wide_terminal_shows_every_column(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "160")
    jsonl.append(run.heldout, [{"step": 300, "loss": 3.0, "train_loss": 2.75, "task_exact_match": 0.625}])
    act(run.path, None, None, Options())
    output = capsys.readouterr().out
    header = output.splitlines()[0]
    for name in ("perplexity", "bits/byte", "train", "gap", "exact match", "tag", "size", "95% above the best"):
        assert name in header
    for figure in ("2.7500", "0.250", "0.625", "step-00000300", "20.09", "1.2001"):
        assert figure in lines_of(output)[300]
    assert "left out" not in output


def test_sorted_by_loss_the_unscored_come_last(run: RunDir, capsys: pytest.CaptureFixture[str]):
    act(run.path, None, None, Options(by_loss=True))
    assert list(lines_of(capsys.readouterr().out)) == [400, 300, 500, 200, 600, 100, 800, 700]


def test_json_holds_every_figure(run: RunDir, capsys: pytest.CaptureFixture[str]):
    act(run.path, None, None, Options(as_json=True))
    told = json.loads(capsys.readouterr().out)
    by_step = {row["step"]: row for row in told["checkpoints"]}
    assert (told["proposed"], told["overfitting"]["began"]) == (300, True)
    assert by_step[300]["path"] == str(run.checkpoint(300))
    assert by_step[300]["within_noise"]
    assert by_step[300]["difference"][0] < 0 < by_step[300]["difference"][1]
    assert by_step[400]["best"]
    assert by_step[100]["hub"] == {"repo": "ada/gpt", "tag": "step-00000100", "commit": "c0ffee" * 6}
    assert by_step[600]["place"] == "gone"
    assert by_step[800]["score"] is None
    assert by_step[800]["loss_at_save"] == 3.25
    assert by_step[500]["score"]["loss"] == pytest.approx(ledger.scores(run)[500].loss)


def test_why_there_are_no_intervals_is_said(tmp_path: Path):
    by_training = make_run(tmp_path / "a")
    few = make_run(tmp_path / "b")
    lost = make_run(tmp_path / "c")
    for step in (100, 200):
        for run in (by_training, few, lost):
            save(run, step)
        score(by_training, step, 3 + step / 1000)
        score(few, step, stretches(step / 1000, count=5))
        score(lost, step, stretches(step / 1000))
    shutil.rmtree(lost.service / "losses")
    assert "training computed its loss as a whole" in listing.gather(by_training).notes[0]
    assert "has 5 stretches; 16 are needed" in listing.gather(few).notes[0]
    assert "heldout.npy is not in service/losses" in listing.gather(lost).notes[0]
    save(few, 300)
    score(few, 300, 3.05)
    save(by_training, 50)
    score(by_training, 50, stretches(-1))
    assert listing.gather(by_training).notes == [
        "no interval for steps 100 and 200: training computed the loss as a whole"
    ]


def test_without_a_service_training_s_own_loss_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run", "service.start=never")
    assert act(run.path, None, None, Options()) is None
    assert "no checkpoint has been saved yet" in capsys.readouterr().out
    for step, loss in ((100, 3.5), (200, 3.0), (300, 3.2), (400, None)):
        save(run, step, loss)
    act(run.path, "best", None, Options())
    output = capsys.readouterr()
    assert output.out == f"{run.checkpoint(200)}\n"
    assert "training computed" in output.err
    act(run.path, None, None, Options())
    output = capsys.readouterr().out
    assert lines_of(output)[200].startswith("> 200")
    said = " ".join(output.split())
    assert "overfitting not known without scores from disk" in said
    assert "never scored from disk (service.start=never): steps 100, 200, 300 and 400" in said
    assert f"to score: python -m llmtrain.service --run {run.path} --drain" in listing.gather(run).notes


def test_an_unscored_one_that_was_better_at_its_save_is_named(run: RunDir, capsys: pytest.CaptureFixture[str]):
    act(run.path, "best", None, Options())
    assert capsys.readouterr().err == "note: step 300 is taken; this is of the 6 scored so far: 1 later one waits\n"
    save(run, 900, 2.5)
    act(run.path, "best", None, Options())
    output = capsys.readouterr()
    assert output.out == f"{run.checkpoint(300)}\n"
    assert output.err == (
        "note: step 300 is taken; this is of the 6 scored so far: 2 later ones wait; step 900's loss was lower at its "
        "save: 2.5000\n"
    )
    act(run.path, None, None, Options())
    said = " ".join(capsys.readouterr().out.split())
    assert "this is of the 6 scored so far: 2 later ones wait; step 900's loss was lower at its save: 2.5000" in said
    assert "not scored from disk yet: steps 800 and 900" in said


def test_a_checkpoint_without_a_readable_manifest_is_damaged(run: RunDir, capsys: pytest.CaptureFixture[str]):
    (run.checkpoint(300) / "manifest.json").write_text("{")
    shutil.rmtree(run.checkpoint(400))
    act(run.path, None, None, Options())
    output = capsys.readouterr().out
    assert "damaged" in lines_of(output)[300]
    assert "hf download ada/gpt --revision step-00000300" in output  # its upload is whole, and it is still proposed


def test_a_step_that_was_saved_again_has_neither_score_nor_upload(run: RunDir, capsys: pytest.CaptureFixture[str]):
    save(run, 300, 3.125, content="saved again")
    act(run.path, None, None, Options())
    line = lines_of(capsys.readouterr().out)[300]
    assert "(3.1250)  not scored" in line
    assert "Hub" not in line


def test_columns_are_left_out_by_importance():
    columns = [
        Column("step", ["100"], 9),
        Column("what", ["x" * 30], 1),
        Column("loss", ["3.0"], 5),
        Column("", [""], 8),
    ]
    assert fitted(columns, [""], 80)[1] == []
    assert fitted(columns, [""], 20)[1] == ["what"]
    assert fitted(columns, [""], 5)[1] == ["what", "loss"]
    table, _ = fitted(columns, [""], 20)
    assert len(table.columns) == 2  # one without any figure is not shown


# ---------------------------------------------------------------------------------------------- finding the run


def test_a_folder_that_is_no_run_is_refused_with_what_is_near(run: RunDir, tmp_path: Path):
    with pytest.raises(RunFolderError, match=rf"not a run folder.*there are: {run.path}"):
        act(tmp_path, None, None, Options())
    with pytest.raises(RunFolderError, match="no such folder"):
        act(tmp_path / "nope", None, None, Options())
    with pytest.raises(RunFolderError, match=rf"did you mean {run.path}\?"):
        act(run.checkpoint(300), None, None, Options())


def test_a_step_that_an_action_does_not_take_is_refused(run: RunDir):
    with pytest.raises(UserError, match="best is about all checkpoints"):
        act(run.path, "best", 300, Options())
    with pytest.raises(UserError, match=r"show needs a step; there are: 200, 300, 400, 500 and 800"):
        act(run.path, "show", None, Options())


# ---------------------------------------------------------------------------------------------- words


def test_figures_for_people():
    assert [size(n) for n in (12, 1_500, 2_000_000, 3.2e9, 1e12)] == ["12 B", "1.5 kB", "2.0 MB", "3.2 GB", "1.0 TB"]
    assert [duration(s) for s in (-1, 40, 61, 3600 * 3 + 120, 90_000)] == [
        "0 s",
        "40 s",
        "1 min",
        "3 h 02 min",
        "1 d 1 h",
    ]
    assert printable("a\x1b[0m\u202eé\n") == "a\\x1b[0m\\u202eé\\n"
