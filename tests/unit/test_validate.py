"""How a checkpoint is scored, so that all scores of a run can be compared."""

import errno
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.sharding.build import build
from llmtrain import files, intervals, ledger, manifest, origin, ranking, shards
from llmtrain.errors import CheckpointError, DiskFull
from llmtrain.evaluate import SplitLoss
from llmtrain.models import build_model
from llmtrain.rundir import RunDir
from llmtrain.service import validate
from llmtrain.shards import ShardFolder, SplitInfo
from tests.support.checkpoint_runs import config_of, make_run, save, score, stretches
from tests.support.data import python_sources


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = make_run(tmp_path / "run")
    for step in (100, 200, 300):
        save(made, step)
    return made


def test_no_more_stretches_are_recorded_than_are_compared(run: RunDir):
    assert validate.most_stretches(run, "heldout") == intervals.MAX_UNITS
    all_of_it = (
        stretches(0.0, count=3 * intervals.MAX_UNITS + 5),
        stretches(0.1, 3 * intervals.MAX_UNITS + 5, noise=0.03),
    )
    found: list[tuple[float, float]] = []
    for most in (1 << 16, intervals.MAX_UNITS):
        best, other = (intervals.merged(losses, most) for losses in all_of_it)
        assert best.shape[1] <= most
        (interval,) = ranking.differences((run, score(run, 100, best)), [(run, score(run, 200, other))])
        assert interval is not None
        found.append(interval)
    assert found[1] == pytest.approx(found[0])


def test_a_run_with_more_of_them_goes_on_as_it_began(run: RunDir):
    score(run, 100, stretches(0.0, count=200), split="test")
    score(run, 100, stretches(0.0, count=intervals.MAX_UNITS + 1))
    most = validate.most_stretches(run, "heldout")
    assert validate.most_stretches(run, "test") == intervals.MAX_UNITS
    old = ranking.read_losses(run, ledger.scores(run)[100])
    assert old is not None
    assert np.array_equal(intervals.merged(old, most), old)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_by_the_exit_code(run: RunDir, monkeypatch: pytest.MonkeyPatch, number: int):
    """The service then makes room for the next attempt."""

    def full(*_: object) -> None:
        raise OSError(number, "no room")

    monkeypatch.setattr(files, "write_atomic", full)
    with pytest.raises(DiskFull, match=r"score: no space left in .*losses"):
        validate.write_losses(run.losses(100, "identity", "heldout"), stretches(0.0))


def test_the_first_score_says_in_which_precision_the_others_are_computed(run: RunDir):
    assert validate.recorded_precision(run) is None
    first = score(run, 300, 3.0).model_copy(update={"how": "the training ranks"})
    ledger.append(run.scores, first)
    assert validate.recorded_precision(run) is None
    for step, how in ((200, "cuda:1 bf16"), (100, "cpu fp32")):
        ledger.append(run.scores, first.model_copy(update={"step": step, "how": how}))
    assert validate.recorded_precision(run) == "bf16"


def test_bits_per_byte_and_perplexity_are_what_their_names_say():
    """One bit a token, and four bytes of text in each."""
    split = SplitInfo(
        rows=1, tokens=0, targets=0, documents=1, text_bytes=1200, text_tokens=300, tokens_dropped=0, shards=[]
    )
    found = SplitLoss(loss=math.log(2), targets=300)
    assert found.perplexity == pytest.approx(2.0)
    assert found.bits_per_byte(split) == pytest.approx(0.25)


def run_with_shards(tmp_path: Path) -> tuple[RunDir, ShardFolder]:
    """And a checkpoint of other data."""
    run = make_run(
        tmp_path / "run", f"data.sources=[{{kind: text, paths: ['{python_sources(1)[0]}']}}]",
        f"data.dir={tmp_path}/shards", "data.tokenizer.vocab_size=300", "data.split={by: tail, heldout: 0.2, test: 0}",
        "model.context=32", "model.num_layers=1", "model.num_heads=1", "model.width=8",
    )  # fmt: skip
    build(config_of(run), workers=1)
    save(run, 100)
    return run, shards.open_folder(tmp_path / "shards")


def test_no_checkpoint_is_scored_on_other_data_than_its_own(tmp_path: Path):
    run, _ = run_with_shards(tmp_path)
    with pytest.raises(CheckpointError, match="step-00000100 was trained on other data than the shards in"):
        next(validate.validate(run, config_of(run), [100], "heldout", torch.device("cpu")))


def test_a_loss_that_is_no_number_is_no_score(tmp_path: Path):
    run, data = run_with_shards(tmp_path)
    folder, model = run.checkpoint(100), build_model(config_of(run), 300, torch.device("cpu"))
    (folder / "model" / "model.safetensors").unlink()
    model.save(folder / "model", {name: p.detach() * math.nan for name, p in model.named_parameters()}, eos_id=0)
    manifest.write(folder, manifest.read(folder).model_copy(update={"fingerprint": data.fingerprint}))
    with pytest.raises(CheckpointError, match="step-00000100: its heldout loss is nan"):
        next(validate.validate(run, config_of(run), [100], "heldout", torch.device("cpu")))


@pytest.mark.parametrize("full", ["before", "after"])
def test_the_test_split_is_not_scored_for_nothing(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full: str
):
    """A disk that is full is found before the scoring, and one that fills up meanwhile is no bug."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    scored: list[int] = []
    found = score(run, 100, 3.0)

    def scores(_run: RunDir, _config: object, steps: list[int], *_: object) -> Iterator[ledger.Score]:
        scored.extend(steps)
        yield found

    monkeypatch.setattr(origin, "enter", lambda _: None)
    monkeypatch.setattr(validate, "validate", scores)
    monkeypatch.setattr(*((tempfile, "TemporaryFile") if full == "before" else (validate.ledger, "append")), refuse)
    with pytest.raises(SystemExit) as left:
        validate.main([str(run.path), "--steps", "100", "--split", "test"])
    assert left.value.code == DiskFull.exit_code
    assert capsys.readouterr().err.startswith(f"error: scores: no space left in {run.service} ")
    assert not scored or full == "after"
