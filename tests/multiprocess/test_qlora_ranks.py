"""QLoRA on 1, 2 and 4 ranks (gloo) under DDP and ZeRO-2: the same samples, the same losses, the same resume."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest

from llmtrain.errors import RunFolderError
from tests.multiprocess.test_kill import family, kill_all, newest_step
from tests.support.bases import write_llama
from tests.support.runs import TIMEOUT_S, Workplace

CONFIG = """
run: {name: run}
model: {kind: qlora, base: llama, context: 96, lora: {r: 4}}
data:
  dir: shards
  sources: [{kind: json, paths: [records.json]}]
  format: {kind: completion}
  split: {by: tail, heldout: 0.1, test: 0.0}
train: {steps: 6, global_batch_size: 8, micro_batch_size: 2, precision: fp32}
optim: {lr: 5e-3, schedule: {warmup_steps: 2}}
evaluate: {every_steps: null, train_rows: 0}
checkpoint: {every_steps: 3}
service: {start: never}
log: {every_steps: 1}
"""
CELLS = [(q, kind, ranks) for q in ("nf4", "int8") for kind in ("ddp", "zero2") for ranks in (1, 2, 4)]
DRAW = [("nf4", "zero2", 2)]


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Completions of uneven length, packed."""
    folder = tmp_path_factory.mktemp("ranks")
    write_llama(folder / "llama")
    draw = random.Random(0)
    records = [
        {"prompt": f"Count to {n}:" + " word" * draw.randrange(10), "completion": " one" * draw.randrange(1, 12)}
        for n in range(300)
    ]
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "config.yaml").write_text(CONFIG)
    return Workplace(folder)


def trained(tuning: Workplace, quantisation: str, kind: str, ranks: int, *settings: str) -> str:
    name = f"{quantisation}-{kind}-{ranks}"
    if not tuning.run_folder(name).exists():
        choice = [f"run.name={name}", f"model.quantisation={quantisation}", f"strategy.kind={kind}"]
        tuning.train(*choice, *settings, ranks=ranks)
    return name


def check(tuning: Workplace, quantisation: str, kind: str, ranks: int) -> None:
    alone = tuning.ledger(trained(tuning, quantisation, "ddp", 1))
    name = trained(tuning, quantisation, kind, ranks)
    spread = tuning.ledger(name)
    assert [r["digest"] for r in spread] == [r["digest"] for r in alone]
    assert [r["targets"] for r in spread] == [r["targets"] for r in alone]
    assert len(spread) == 6
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.05
    for mine, theirs in zip(spread, alone, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    mine, theirs = (tuning.ledger(n, "heldout")[-1]["loss"] for n in (name, f"{quantisation}-ddp-1"))
    assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(("quantisation", "kind", "ranks"), DRAW)
def test_the_losses_are_those_of_one_rank(tuning: Workplace, quantisation: str, kind: str, ranks: int):
    check(tuning, quantisation, kind, ranks)


@pytest.mark.soak
@pytest.mark.parametrize(("quantisation", "kind", "ranks"), [cell for cell in CELLS if cell not in DRAW])
def test_the_losses_of_every_other_cell(tuning: Workplace, quantisation: str, kind: str, ranks: int):
    check(tuning, quantisation, kind, ranks)


def adapter(tuning: Workplace, name: str) -> bytes:
    newest = max((tuning.run_folder(name) / "checkpoints").glob("step-*"))
    files = [newest / "model/adapter_model.safetensors", *sorted((newest / "state").iterdir())]
    return b"".join(path.read_bytes() for path in files)


def kill_and_resume(tuning: Workplace, quantisation: str, kind: str, ranks: int, *settings: str) -> None:
    label = "-".join([quantisation, kind, str(ranks), *settings]).replace("=", "-")
    choice = [
        f"model.quantisation={quantisation}", f"strategy.kind={kind}", "model.lora.dropout=0.1", "train.steps=16",
        "checkpoint.every_steps=2", *settings,
    ]  # fmt: skip
    tuning.train(f"run.name=calm-{label}", *choice, ranks=ranks)
    process = tuning.start(f"run.name=killed-{label}", *choice, ranks=ranks)
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and newest_step(tuning, f"killed-{label}") < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None
    kill_all(family(process.pid))
    process.communicate()
    assert newest_step(tuning, f"killed-{label}") < 16
    output = tuning.train(f"run.name=killed-{label}", *choice, ranks=ranks)
    assert "resuming   from step" in output
    assert adapter(tuning, f"killed-{label}") == adapter(tuning, f"calm-{label}")
    assert tuning.ledger(f"killed-{label}") == tuning.ledger(f"calm-{label}")


@pytest.mark.parametrize(
    ("quantisation", "kind", "ranks", "settings"),
    [("int8", "ddp", 1, ["optim.kind=adamw8bit"])],
)
def test_a_killed_run_ends_bit_equal(tuning: Workplace, quantisation: str, kind: str, ranks: int, settings: list[str]):
    kill_and_resume(tuning, quantisation, kind, ranks, *settings)


@pytest.mark.soak
@pytest.mark.parametrize(("quantisation", "kind", "ranks"), CELLS)
def test_killed_runs_of_every_cell_end_bit_equal(tuning: Workplace, quantisation: str, kind: str, ranks: int):
    kill_and_resume(tuning, quantisation, kind, ranks)


def test_an_adapter_does_not_go_on_with_another_base(tuning: Workplace):
    name = trained(tuning, "nf4", "ddp", 1)
    settings = [f"run.name={name}", "run.dir=runs/swapped", "train.steps=7"]
    shutil.copytree(tuning.run_folder(name), tuning.folder / "runs/swapped" / name)
    weights = tuning.folder / "llama/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3] + b"abc")
    try:
        output = tuning.train(*settings, code=RunFolderError.exit_code)
        assert "(model.safetensors changed)" in output
    finally:
        weights.write_bytes(whole)  # another time of modification, the same bytes: read again, and right
    assert "resuming   from step 6" in tuning.train(*settings)


def test_an_adapter_goes_on_under_the_other_strategy_on_other_ranks(tuning: Workplace, tmp_path: Path):
    name = trained(tuning, "nf4", "ddp", 1)
    copied = tuning.folder / "runs/elsewhere" / name
    shutil.copytree(tuning.run_folder(name), copied)
    shutil.rmtree(copied / "checkpoints/step-00000006")
    settings = [f"run.name={name}", "run.dir=runs/elsewhere", "strategy.kind=zero2", "model.quantisation=nf4"]
    output = tuning.train(*settings, ranks=2)
    assert "resuming   from step 3" in output
    whole, mine = tuning.ledger(name), tuning.ledger(f"elsewhere/{name}")
    assert [r["digest"] for r in mine] == [r["digest"] for r in whole]
    assert mine[-1]["loss"] == pytest.approx(whole[-1]["loss"], abs=1e-4)
