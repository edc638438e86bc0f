"""The loop: in which order it calls its parts, what is due after which step, and when it ends."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from llmtrain import jsonl
from llmtrain.batches import BatchPlan
from llmtrain.config import load_config
from llmtrain.data import Batch, StepData
from llmtrain.errors import DiskFull, NotFinite
from llmtrain.evaluation import make_evaluate
from llmtrain.manifest import Manifest, TrainState
from llmtrain.metrics import Meter
from llmtrain.optim import learning_rate
from llmtrain.progress import Progress
from llmtrain.rundir import RunDir
from llmtrain.shards import Rows
from llmtrain.stop import StopFlag
from llmtrain.trainer import Due, Parts, advanced, train, what_is_due
from llmtrain.world import World

PLAN = BatchPlan(8, 8, 1, 100)
ALONE = World(0, 1, 0, torch.device("cpu"))


class Noted:
    """Takes the place of strategy, saver, meter and loader: notes in which order the loop calls them."""

    def __init__(self, batches: int, targets: int):
        ids = torch.zeros(1, 4, dtype=torch.int64)
        self._data = StepData([Batch(ids, ids, None, None, targets // batches)] * batches, targets, 0)
        self.calls: list[str] = []
        self.rates: list[float] = []
        self.scales: list[float] = []
        self.scored: dict[int, bool] = {}
        """Whether answers are generated too, by step."""
        self.saved: list[float | None] = []
        """Held-out loss of each save."""
        self.wait_s, self.has_failed = 0.0, False

    def steps(self, first: int, count: int) -> list[StepData]:
        return [self._data] * count

    def accumulate(self, batch: Batch, scale: float, last: bool) -> torch.Tensor:
        self.calls.append("last" if last else "more")
        self.scales.append(scale)
        return torch.tensor(1.0)

    def update(self, lr: float) -> torch.Tensor:
        self.calls.append("update")
        self.rates.append(lr)
        return torch.tensor(1.0)

    def score(self, state: TrainState, with_task: bool) -> dict[str, float]:
        self.scored[state.step] = with_task
        return {"loss": 1.0}

    def save(self, described: Manifest, beside: bool) -> None:
        self.calls.append("save")
        self.saved.append(described.heldout_loss)

    def until_copied(self) -> None:
        self.calls.append("copied")

    def wait(self) -> None:
        self.calls.append("written")

    def __getattr__(self, name: str) -> Any:  # of the meter
        return lambda *_, **__: None


def resumed(noted: Noted, step: int, *other: str, stop: StopFlag | None = None) -> None:
    """Train from there to step 100, with a save at each one, or with other settings."""
    settings = ["evaluate.also_at=[]", "evaluate.every_steps=null", "checkpoint.every_steps=1", "train.steps=100"]
    given: dict[str, Any] = dict.fromkeys(("strategy", "loader", "meter", "saver"), noted)
    parts = Parts(
        load_config(None, [*settings, *other])[0], PLAN, ALONE, stop=stop or StopFlag(), rows_per_epoch=100,
        fingerprint="f", evaluate=noted.score, write_sample=noted.sample, **given,
    )  # fmt: skip
    train(parts, TrainState(step=step, samples=8 * step))


def test_nothing_changes_before_what_is_being_saved_has_been_copied():
    resumed(noted := Noted(batches=3, targets=60), 97)
    step = ["more", "more", "last", "copied", "update", "save"]
    assert noted.calls == [*step * 3, "written", "copied"]


def test_each_step_takes_the_learning_rate_of_its_own_number_and_the_tokens_of_all_its_batches():
    resumed(noted := Noted(batches=3, targets=60), 97)
    optim = load_config(None)[0].optim
    assert noted.rates == [learning_rate(step, 100, optim) for step in (97, 98, 99)]
    assert noted.scales == [1 / 60] * 9


def test_answers_are_generated_at_saves_and_before_the_first_step_alone():
    """They take longer than the loss."""
    resumed(noted := Noted(1, 20), 0, "evaluate.every_steps=10", "checkpoint.every_steps=40", "evaluate.also_at=[0]")
    assert list(noted.scored) == list(range(0, 101, 10))
    assert [step for step, with_task in noted.scored.items() if with_task] == [0, 40, 80, 100]


class NotedMeter(Noted):
    """Also notes what the meter is asked for."""

    def flush(self, waited_s: float, at_once: bool) -> None:
        self.calls.append("written now" if at_once else "read")

    def restart_clock(self) -> None:
        self.calls.append("clock")


def test_the_figures_up_to_a_checkpoint_are_written_before_it():
    """Also where a stop forces it and nothing is evaluated: the process may be killed right after."""
    stop = StopFlag()
    stop.signal_name = "SIGTERM"
    resumed(noted := NotedMeter(1, 20), 97, stop=stop)
    assert [call for call in noted.calls if call in ("written now", "save")] == ["written now", "save"]


def test_the_time_of_an_evaluation_counts_for_no_step():
    resumed(noted := NotedMeter(1, 20), 97, "evaluate.every_steps=1", "checkpoint.every_steps=null")
    assert noted.calls.count("clock") == len(noted.scored) == 3


def test_a_save_that_failed_ends_training_at_the_next_step():
    def wait() -> None:
        raise DiskFull("no room")

    noted = Noted(1, 20)
    noted.has_failed, noted.wait = True, wait
    with pytest.raises(DiskFull):
        resumed(noted, 97)
    assert noted.calls == []


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (64.0, math.inf), (64.0, math.nan)])
def test_a_loss_or_a_norm_that_is_not_finite_ends_the_run(tmp_path: Path, loss: float, norm: float):
    """With a norm that is none the weights are already lost, though the loss of that step was fine."""
    run = RunDir(tmp_path / "run")
    run.create()
    meter = Meter(run, ALONE, None, Progress(PLAN.total_steps, 0, enabled=False), PLAN, 100, 8.0, 1.0, bf16=False)
    for step, figures in ((1, (64.0, 1.0)), (2, (loss, norm))):
        state = TrainState(step=step, samples=8 * step, targets=64 * step)
        meter.observe(state, 64, 0, 1e-3, *map(torch.tensor, figures))
    with pytest.raises(NotFinite, match="step 2: loss"):
        meter.flush(0.0, at_once=False)
    assert [record["step"] for record in jsonl.read(run.metrics)] == [1, 2]


def due(step: int, *settings: str, stopping: bool = False, rows_per_epoch: int = 100) -> Due:
    config = load_config(None, ["evaluate.also_at=[]", *settings])[0]
    parts = cast(Parts, SimpleNamespace(config=config, plan=PLAN, rows_per_epoch=rows_per_epoch))
    before = TrainState(step=step - 1, samples=8 * (step - 1))
    return what_is_due(parts, before, advanced(before, 8, 64), stopping)


@pytest.mark.parametrize(("step", "saves", "evaluates"), [(7, False, False), (10, False, True), (20, True, True)])
def test_a_save_that_a_stop_forces_does_not_wait_for_scores(step: int, saves: bool, evaluates: bool):
    """The time until the process is killed may be short."""
    every = ["evaluate.every_steps=10", "checkpoint.every_steps=20"]
    found = due(step, *every)
    assert (found.save, found.evaluate) == (saves, evaluates)
    assert due(step, *every, stopping=True) == Due(log=True, evaluate=False, sample=False, save=True)


def test_the_last_save_is_scored_in_spite_of_a_stop():
    """No later step would make up for it: the run would have ended with its last checkpoint unscored for good."""
    found = due(100, stopping=True)
    assert found == Due(log=True, evaluate=True, sample=False, save=True)
    stop = StopFlag()
    stop.signal_name = "SIGTERM"
    resumed(noted := Noted(1, 20), 99, stop=stop)
    assert noted.scored == {100: False}, "answers take longer than the loss"
    assert noted.saved == [1.0]


@pytest.mark.parametrize("rows", [100, 164, 240])
def test_passes_end_where_they_end_whatever_floats_say(rows: int):
    """Of 164 rows a tenth is 16.400000000000002 in floats: five of them end at the same row, and not a step later."""
    every = ["checkpoint.every_steps=null", "checkpoint.every_epochs=0.1", "evaluate.every_steps=null"]
    saves = [step for step in range(1, 60) if due(step, *every, rows_per_epoch=rows).save]
    assert saves == [step for step in range(1, 60) if 80 * step // rows > 80 * (step - 1) // rows]


def test_a_sample_for_each_pass_comes_at_its_end_whenever_the_loss_is_measured():
    every = ["evaluate.sample.every=epoch", "evaluate.every_steps=5"]
    assert [step for step in range(1, 41) if due(step, *every).sample] == [13, 25, 38]  # of 12.5 steps each


def test_single_steps_can_be_named_for_an_evaluation():
    named = ["evaluate.also_at=[3, 7]", "evaluate.every_steps=null"]
    assert [step for step in range(1, 20) if due(step, *named).evaluate] == [3, 7]


def test_each_split_is_scored_on_rows_of_its_own():
    asked: dict[str, list[int]] = {"heldout": [], "train": []}

    def split(name: str) -> Any:
        """All its tokens are the number of the split, which is what the strategy takes for their losses."""
        ids = list(asked).index(name) + 1

        def rows(numbers: np.ndarray) -> Rows:
            asked[name] += numbers.tolist()
            return Rows(np.full((len(numbers), 5), ids, np.uint16), [np.array([5], np.int32)] * len(numbers), None)

        return SimpleNamespace(num_rows=20, rows=rows, info=SimpleNamespace(text_tokens=30, text_bytes=60))

    config = load_config(None, ["evaluate.train_rows=4", "evaluate.batch_size=3"])[0]
    data, strategy = SimpleNamespace(split=split), SimpleNamespace(loss=lambda batch: batch.targets.float().sum())
    evaluate = make_evaluate(config, cast(Any, data), PLAN, cast(Any, strategy), ALONE, lambda _: {"task_exact": 0.5})
    expected = {"loss": 1.0, "perplexity": math.e, "bits_per_byte": 0.5 / math.log(2), "train_loss": 2.0}
    assert evaluate(TrainState(), False) == pytest.approx(expected)
    assert asked == {"heldout": [*range(20)], "train": [0, 5, 10, 15]}
    assert evaluate(TrainState(), True) == pytest.approx({**expected, "task_exact": 0.5})
