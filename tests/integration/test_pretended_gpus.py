"""What runs where, and what waits for a GPU, on GPUs that are pretended (tests/support/pretended_gpu)."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llmtrain import ledger
from llmtrain.rundir import RunDir
from tests.support.bases import write_llama, write_stirred, write_tokenizer
from tests.support.data import shared
from tests.support.runs import GPT, LLAMA, Workplace, environment, make_workplace
from tests.support.service_runs import run_module, run_python, train

PRETENDED = Path(__file__).parents[1] / "support" / "pretended_gpu"
STEP = {"data", "counts", "forward", "backward"}
"""The phases of a step in which nothing may wait (heartbeat.PHASES)."""
TUNING = """
run: {name: tuned}
model: {kind: qlora, base: base, context: 256, lora: {r: 4, dropout: 0.05}}
data:
  dir: tuning
  sources: [{kind: json, paths: [RECORDS]}]
  format: {kind: instruction}
  split: {heldout: 0.03, test: 0.01}
  packing: bestfit
train: {steps: 4, global_batch_size: 4, micro_batch_size: 2, compile: false}
optim: {lr: 5e-3, kind: paged_adamw8bit, schedule: {warmup_steps: 0}}
evaluate: {every_steps: null, train_rows: 0}
checkpoint: {every_steps: 2}
service: {start: never}
log: {report: false, every_steps: 2}
"""


@dataclass(frozen=True)
class Wait:
    """The host has waited for a GPU."""

    thread: str
    phase: str
    what: str
    caller: str
    times: int


@dataclass(frozen=True)
class Machine:
    """One with pretended GPUs."""

    engine: Path
    notes: Path

    def environment(self, gpus: int) -> dict[str, str]:
        own = environment()
        return {
            **own,
            "PYTHONPATH": f"{PRETENDED}:{own['PYTHONPATH']}",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus))),
            "LLMTRAIN_PRETENDED_ENGINE": str(self.engine),
            "LLMTRAIN_PRETENDED_WAITS": str(self.notes),
        }

    def waits(self) -> list[Wait]:
        """Of all processes, since it was last asked."""
        found = [Wait(**each) for file in self.notes.iterdir() for each in json.loads(file.read_text())]
        shutil.rmtree(self.notes)
        self.notes.mkdir()
        return found


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    if torch.version.cuda or torch.version.hip:
        pytest.skip("pretended GPUs need a build of torch for CPUs (for real ones: pytest --gpu)")
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("pretended GPUs need g++")
    folder, there = tmp_path_factory.mktemp("pretended"), Path(torch.__file__).parent
    engine, notes = folder / "engine.so", folder / "waits"
    notes.mkdir()
    libraries = [f"-L{there / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{there / 'lib'}"]
    flags = ["-std=c++20", "-fPIC", "-shared", "-w", f"-I{there / 'include'}"]
    done = subprocess.run(
        [compiler, *flags, str(PRETENDED / "engine.cpp"), "-o", str(engine), *libraries],
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return Machine(engine, notes)


def in_steps(waits: list[Wait]) -> list[Wait]:
    return [wait for wait in waits if wait.phase in STEP and wait.thread == "MainThread"]


MISTAKES = """
import torch
from llmtrain import heartbeat

heartbeat.at("forward")
a = torch.arange(3.0, device="cuda")
for wrong in (lambda: a + torch.ones(3), lambda: a.numpy(), lambda: a.pin_memory(), lambda: a.to("cuda:1") + a):
    try:
        wrong()
    except (RuntimeError, TypeError):
        pass
    else:
        raise SystemExit("not refused")
assert (a + 1).device == torch.device("cuda:0")
torch.ones(3).pin_memory().to("cuda", non_blocking=True)
a.to("cpu", non_blocking=True)
weight = torch.nn.Linear(3, 2).cuda()
weight(a).sum().backward()
assert weight.weight.grad.device == a.device
with torch.autocast("cuda", torch.bfloat16):
    assert weight(a).dtype == torch.bfloat16
a.sum().item()
a[a > 1]
a.cpu()
bool(a[0])
"""


def test_pretended_gpus_refuse_and_notice_what_real_ones_do(machine: Machine):
    run_python("-c", MISTAKES, env=machine.environment(2))
    found = {wait.what: wait.times for wait in in_steps(machine.waits())}
    assert found == {
        "copy to the GPU": 2,  # the layer's weight and bias
        "aten::_local_scalar_dense": 2,
        "indexing by a mask": 1,
        "copy to the host": 1,
    }


@pytest.mark.parametrize(("model", "own"), [(GPT, ["model.dropout=0"]), (LLAMA, ["optim.kind=muon"])])
def test_a_run_on_two_gpus_waits_for_them_in_no_step_and_is_scored_there(
    model: str, own: list[str], machine: Machine, tmp_path: Path
):
    work = make_workplace(tmp_path, packing="bestfit", model=model)
    common = ["train.precision=bf16", "train.compile=false", "train.steps=12", "log.every_steps=4"]
    settings = [str(work.config), *own, *common, "evaluate.train_rows=0"]
    said = run_module(
        "launcher", "run", *settings, "run.name=gpus", "service.start=auto",
        cwd=work.folder, env=machine.environment(2),
    )  # fmt: skip
    assert "2 ranks on cuda, bf16" in said
    waits = machine.waits()
    assert in_steps(waits) == []
    assert {wait.caller for wait in waits if wait.phase == "log"} == {"metrics.py flush"}
    assert {wait.what for wait in waits if wait.thread == "save"} == {"event.synchronize"}
    scores = ledger.scores(RunDir(work.run_folder("gpus")))
    assert scores.keys() == {4, 8, 12}
    assert {score.how for score in scores.values()} == {"cuda:0 bf16"}

    run_module("launcher", "run", *settings, "run.name=cpu", "--gpus", "0", cwd=work.folder, env=environment())
    ours, theirs = (work.ledger(name, "heldout")[-1]["loss"] for name in ("gpus", "cpu"))
    assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.fixture
def tuning(tmp_path: Path) -> Workplace:
    write_llama(tmp_path / "base")
    work = Workplace(tmp_path)
    work.config.write_text(TUNING.replace("RECORDS", str(shared("instruction-data.json"))))
    return work


@pytest.mark.parametrize("quantisation", ["nf4", pytest.param("int8", marks=pytest.mark.soak)])
def test_tuning_a_quantised_base_waits_in_no_step_and_goes_on(quantisation: str, machine: Machine, tuning: Workplace):
    settings = ["train.device=cuda", f"model.quantisation={quantisation}", "train.activation_checkpointing=true"]
    said = train(tuning, *settings, env=machine.environment(1))
    assert "2 samples in a row keep apart" in said
    assert "Warning" not in said
    assert in_steps(machine.waits()) == []
    assert "resuming   from step 4" in train(tuning, *settings, "train.steps=6", env=machine.environment(1))
    assert in_steps(machine.waits()) == []
    losses = [record["loss"] for record in tuning.ledger("tuned", "heldout")]
    assert losses[-1] < losses[0]
    assert (tuning.run_folder("tuned") / "checkpoints" / "step-00000006").is_dir()


@pytest.mark.soak
def test_a_mixture_in_four_bits_waits_in_no_step(machine: Machine, tuning: Workplace):
    mixture = {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    write_tokenizer(write_stirred(tuning.folder / "mixture", "qwen3_moe", **mixture))
    settings = ["train.device=cuda", "model.base=mixture", "data.dir=of-mixture", "run.name=mixture"]
    assert "weights frozen in 4 bits (nf4), LoRA" in train(tuning, *settings, env=machine.environment(1))
    assert in_steps(machine.waits()) == []
    losses = [record["loss"] for record in tuning.ledger("mixture", "heldout")]
    assert losses[-1] < losses[0]


@pytest.mark.soak
def test_under_zero2_deepspeed_alone_waits(machine: Machine, tmp_path: Path):
    work = make_workplace(tmp_path, packing="bestfit")
    settings = ["model.dropout=0", "train.precision=bf16", "train.compile=false", "strategy.kind=zero2"]
    for steps in (12, 16):
        words = ["launcher", "run", str(work.config), *settings, f"train.steps={steps}"]
        said = run_module(*words, cwd=work.folder, env=machine.environment(2))
        assert "2 ranks on cuda, bf16, ZeRO-2" in said
        assert "Warning" not in said
    waits = in_steps(machine.waits())
    assert {wait.caller for wait in waits} == {"zero2.py accumulate", "zero2.py update"}
