"""The same run on 1, 2 and 4 ranks (gloo): the same samples, the same losses, the same scores."""

import subprocess
import sys

import numpy as np
import pytest

from llmtrain import files, shards
from llmtrain.errors import ConfigError
from llmtrain.shards import Rows
from tests.support.runs import TIMEOUT_S, Workplace, environment, make_workplace, torchrun

SETTINGS = ["model.dropout=0.0", "train.steps=16", "checkpoint.every_steps=16", "evaluate.also_at=[0, 1]"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Rows with uneven supervision: several documents a row, padding, and a loss mask with few or many tokens."""
    workplace = make_workplace(tmp_path_factory.mktemp("masked"), packing="bestfit")
    workplace.train("run.name=shards", "train.steps=1", *SETTINGS[:1])
    folder = workplace.folder / "shards"
    manifest = shards.open_folder(folder).manifest.model_copy(deep=True)
    draw = np.random.default_rng(0)
    for name, split in manifest.splits.items():
        table = shards.ShardSet(folder, split, manifest.context)
        rows = table.rows(np.arange(split.rows))
        mask = (draw.random(rows.tokens.shape) < draw.random((split.rows, 1)) ** 3).astype(np.uint8)
        path = folder / f"{name}-00000.arrow"
        shards.write_shard(path, Rows(rows.tokens, rows.doc_lens, mask))
        info = split.shards[0].model_copy(update={"size_bytes": path.stat().st_size, "sha256": files.sha256(path)})
        manifest.splits[name] = split.model_copy(update={"shards": [info]})
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return workplace


@pytest.fixture(scope="module")
def runs(masked: Workplace) -> Workplace:
    for ranks in (1, 2, 4):
        masked.train(f"run.name=r{ranks}", *SETTINGS, ranks=ranks)
    masked.train("run.name=r2a2", *SETTINGS, "train.micro_batch_size=2", ranks=2)
    return masked


@pytest.mark.parametrize("name", ["r2", "r4", "r2a2"])
def test_every_step_sees_the_same_samples_and_has_the_same_loss(runs: Workplace, name: str):
    alone, spread = runs.ledger("r1"), runs.ledger(name)
    assert [r["digest"] for r in spread] == [r["digest"] for r in alone]
    assert len({r["digest"] for r in alone}) == len(alone)
    assert [r["targets"] for r in spread] == [r["targets"] for r in alone]
    for mine, theirs in zip(spread, alone, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_the_supervision_is_uneven(runs: Workplace):
    targets = [r["targets"] for r in runs.ledger("r1")]
    steps = np.diff([0, *targets])
    assert steps.max() > 1.5 * steps.min()


CELLS = [(batch_size, ranks) for batch_size in (1, 3, 8) for ranks in (1, 2, 4)]
DRAW = [(3, 1), (8, 2), (1, 4)]  # each size and each number of ranks


@pytest.mark.parametrize(
    ("batch_size", "ranks"),
    [*DRAW, *(pytest.param(*cell, marks=pytest.mark.soak) for cell in CELLS if cell not in DRAW)],
)
def test_the_heldout_loss_is_the_same_for_any_batch_and_any_number_of_ranks(
    runs: Workplace, batch_size: int, ranks: int
):
    name = f"e{batch_size}-{ranks}"
    runs.train(f"run.name={name}", *SETTINGS[:1], "train.steps=1", f"evaluate.batch_size={batch_size}", ranks=ranks)
    mine, reference = runs.ledger(name, "heldout")[0], runs.ledger("r1", "heldout")[0]
    for key in ("loss", "train_loss", "bits_per_byte"):
        assert mine[key] == pytest.approx(reference[key], abs=1e-6)


def test_an_indivisible_batch_is_one_message(masked: Workplace):
    output = masked.train("run.name=odd", "train.global_batch_size=9", ranks=2, code=1)  # torchrun's own code
    assert output.count("2 ranks do not divide it; use 8 or 10, or 1, 3, 9 ranks") == 1
    assert f"exitcode  : {ConfigError.exit_code}" in output


def test_a_slow_rank_0_still_says_what_is_wrong(masked: Workplace):
    """The others meet the error first; if they left, torchrun would end rank 0 before it has said a word."""
    start = f"test $RANK != 0 || sleep 1; exec {sys.executable} -m llmtrain {masked.config} train.stpes=9"
    done = subprocess.run(
        [*torchrun(2), "--no-python", "sh", "-c", start],
        cwd=masked.folder, env=environment(), text=True, capture_output=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("did you mean train.steps?") == 1


def test_a_typing_error_is_reported_once_not_by_every_rank(masked: Workplace):
    output = masked.train("run.name=typo", "train.stpes=9", ranks=2, code=1)
    assert output.count("did you mean train.steps?") == 1
