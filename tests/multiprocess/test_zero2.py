"""ZeRO-2 against DDP: the same numbers, state that any of them reads, less memory, no compiler."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import TIMEOUT_S, Workplace, environment, make_workplace, torchrun

ZERO2 = "strategy.kind=zero2"
KINDS = ["ddp", "zero2"]
RANKS = [1, 2, 4]
CELLS = [(a, m, b, n) for a in KINDS for m in RANKS for b in KINDS for n in RANKS]
DIAGONAL = [cell for cell in CELLS if cell[:2] == cell[2:]]
CROSSINGS = [cell for cell in CELLS if cell not in DIAGONAL]
# That DDP goes on as it was is test_kill.py's.
DRAW = [*(cell for cell in DIAGONAL if cell[0] == "zero2" and cell[1] < 4), *random.Random(3).sample(CROSSINGS, 3)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """No dropout: the losses of different numbers of ranks can be compared."""
    workplace = make_workplace(tmp_path_factory.mktemp("zero2"))
    text = workplace.config.read_text()
    workplace.config.write_text(text.replace("dropout: 0.1", "dropout: 0.0"))
    return workplace


@pytest.mark.parametrize(
    ("ranks", "accumulation"),
    [(2, 4), *(pytest.param(*cell, marks=pytest.mark.soak) for cell in [(2, 1), (4, 1), (4, 4)])],
)
def test_the_losses_and_norms_are_those_of_ddp(plain: Workplace, ranks: int, accumulation: int):
    """Also where gradients are clipped, by their norm over all ranks; at some steps and not at others, because AdamW
    makes up for a factor that is always the same."""
    batch, clip_norm = 16, 0.45
    length = [
        f"optim.clip_norm={clip_norm}",
        "train.steps=50", "evaluate.every_steps=null", "checkpoint.every_steps=null",
        f"train.global_batch_size={batch}", f"train.micro_batch_size={batch // ranks // accumulation}",
    ]  # fmt: skip
    names = {kind: f"{kind}-{ranks}-{accumulation}" for kind in KINDS}
    for kind, name in names.items():
        plain.train(f"run.name={name}", f"strategy.kind={kind}", *length, ranks=ranks)
    ddp, zero2 = (plain.ledger(names[kind]) for kind in KINDS)
    assert len(zero2) == 50
    assert [r["digest"] for r in zero2] == [r["digest"] for r in ddp]
    for mine, theirs in zip(zero2, ddp, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert 10 < sum(record["grad_norm"] > clip_norm for record in ddp) < 40
    mine, theirs = (plain.ledger(names[kind], "heldout")[-1]["loss"] for kind in KINDS)
    assert mine == pytest.approx(theirs, abs=1e-6)
    assert (plain.run_folder(names["zero2"]) / "deepspeed.json").exists()


def test_an_offloaded_optimizer_gives_the_same_run_and_resumes(plain: Workplace):
    settings = ["train.steps=8", "checkpoint.every_steps=4", ZERO2]
    plain.train("run.name=here", *settings, ranks=2)
    plain.train("run.name=there", *settings, "strategy.offload_optimizer=cpu", ranks=2)
    assert plain.ledger("here")[-1]["loss"] == pytest.approx(plain.ledger("there")[-1]["loss"], abs=1e-6)
    whole = plain.weights("there")
    shutil.rmtree(plain.run_folder("there") / "checkpoints/step-00000008")
    plain.train("run.name=there", *settings, "strategy.offload_optimizer=cpu", ranks=2)
    assert plain.weights("there") == whole


class Matrix:
    """Runs of 16 steps under each strategy and number of ranks, whose first half others continue."""

    def __init__(self, workplace: Workplace):
        self.workplace = workplace

    def undisturbed(self, kind: str, ranks: int) -> str:
        name = f"whole-{kind}-{ranks}"
        if not self.workplace.run_folder(name).exists():
            self.workplace.train(f"run.name={name}", f"strategy.kind={kind}", *self.settings, ranks=ranks)
        return name

    def resumed(self, from_kind: str, from_ranks: int, kind: str, ranks: int) -> str:
        whole = self.undisturbed(from_kind, from_ranks)
        folder = f"from-{whole}-to-{kind}-{ranks}"  # another run.dir: the name is part of the run
        copy = self.workplace.run_folder(folder) / whole
        shutil.copytree(self.workplace.run_folder(whole), copy)
        shutil.rmtree(copy / "checkpoints/step-00000016")
        settings = [f"run.name={whole}", f"run.dir=runs/{folder}", f"strategy.kind={kind}", *self.settings]
        output = self.workplace.train(*settings, ranks=ranks)
        assert "resuming   from step 8" in output
        return f"{folder}/{whole}"

    settings = ("train.steps=16", "checkpoint.every_steps=8", "evaluate.every_steps=8")

    def check(self, from_kind: str, from_ranks: int, kind: str, ranks: int) -> None:
        name, whole = self.resumed(from_kind, from_ranks, kind, ranks), self.undisturbed(from_kind, from_ranks)
        mine, theirs = self.workplace.ledger(name), self.workplace.ledger(whole)
        assert [r["digest"] for r in mine] == [r["digest"] for r in theirs]
        assert len(mine) == 16
        for a, b in zip(mine, theirs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        if (from_kind, from_ranks) == (kind, ranks):
            assert mine == theirs
            assert self.workplace.weights(name) == self.workplace.weights(whole)


@pytest.fixture(scope="module")
def matrix(plain: Workplace) -> Matrix:
    return Matrix(plain)


@pytest.mark.parametrize(("from_kind", "from_ranks", "kind", "ranks"), DRAW)
def test_a_checkpoint_is_continued_by_any_strategy_on_any_number_of_ranks(
    matrix: Matrix, from_kind: str, from_ranks: int, kind: str, ranks: int
):
    matrix.check(from_kind, from_ranks, kind, ranks)


@pytest.mark.soak
@pytest.mark.parametrize(("from_kind", "from_ranks", "kind", "ranks"), [c for c in CELLS if c not in DRAW])
def test_every_other_cell_of_the_matrix(matrix: Matrix, from_kind: str, from_ranks: int, kind: str, ranks: int):
    matrix.check(from_kind, from_ranks, kind, ranks)


# Large blocks go back to the kernel when they are freed, so that resident memory is what is in use.
PRECISE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def memory_taken(kind: str, folder: Path) -> float:
    """Bytes of a rank's peak for gradients and optimizer, of four; for each parameter."""
    done = subprocess.run(
        [*torchrun(4), "-m", "tests.support.memory_probe", kind],
        cwd=folder, env={**environment(), **PRECISE}, text=True, capture_output=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found["bytes"] / found["parameters"]


def test_gradients_and_optimizer_take_a_share_of_the_memory(tmp_path: Path):
    taken = {kind: memory_taken(kind, tmp_path) for kind in KINDS}
    print(f"bytes a parameter on each of 4 ranks: DDP {taken['ddp']:.2f}, ZeRO-2 {taken['zero2']:.2f}")
    assert taken["ddp"] > 11  # 4 for gradients, 8 for two moments
    assert taken["zero2"] <= 0.4 * taken["ddp"]


def test_nothing_is_compiled(plain: Workplace, monkeypatch: pytest.MonkeyPatch):
    """No compiler to be found, and no cache of an earlier build either."""
    nowhere = plain.folder / "empty"
    nowhere.mkdir()
    monkeypatch.setenv("PATH", str(nowhere))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(nowhere))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    assert shutil.which("g++", path=environment()["PATH"]) is None
    output = plain.train("run.name=bare", ZERO2, "train.steps=2", ranks=2)
    assert "held-out loss" in output
    assert not list(nowhere.iterdir())


def test_deepspeed_leaves_bf16_switched_on_also_on_gpus(tmp_path: Path):
    """It asks whether autocast is on for a GPU, and switches it off for its own forward pass."""
    command = [sys.executable, "-m", "tests.support.autocast_probe"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=TIMEOUT_S, check=True
    )
    assert done.stdout.splitlines()[-2:] == ["True torch.bfloat16", "False torch.float32"]
