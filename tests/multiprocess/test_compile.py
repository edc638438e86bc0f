"""`train.compile`, with the compiler's own kernels: the same losses (tests/unit/test_models.py has the graph alone)."""

import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import Workplace
from tests.support.supervised import Supervised

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs"),
]
SETTINGS = ["model.dropout=0.0", "train.steps=6", "train.micro_batch_size=2", "evaluate.every_steps=3"]


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 1), ("ddp", 2), ("zero2", 2)])
def test_a_compiled_run_has_the_same_losses_and_resumes(own_workplace: Workplace, kind: str, ranks: int):
    workplace, strategy = own_workplace, f"strategy.kind={kind}"
    workplace.train("run.name=plain", *SETTINGS, strategy, ranks=ranks)
    compiled = ["run.name=compiled", *SETTINGS, strategy, "train.compile=true"]
    workplace.train(*compiled, "train.steps=4", ranks=ranks)
    workplace.train(*compiled, ranks=ranks)
    for which in ("metrics", "heldout"):
        mine, reference = workplace.ledger("compiled", which), workplace.ledger("plain", which)
        assert {r["step"] for r in mine} >= {r["step"] for r in reference}
        losses = {r["step"]: r["loss"] for r in mine}
        for expected in reference:
            assert losses[expected["step"]] == pytest.approx(expected["loss"], abs=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_a_rank_that_compiles_does_not_hang(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    """It takes ten seconds and more, which any other step would not be given."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    name, settings = f"compiles-{kind}", [*SETTINGS, "train.compile=true", f"strategy.kind={kind}"]
    with Supervised(workplace, name, "--ranks", "1", "--hang-after", "4", *settings) as run:
        assert run.end() == 0, run.said
        assert "stands still" not in run.said
    events = EventAccumulator(str(workplace.run_folder(name) / "tensorboard")).Reload()
    assert events.Scalars("speed/step_ms")[0].value > 4000, "nothing was shown: compiling was quicker than the limit"
