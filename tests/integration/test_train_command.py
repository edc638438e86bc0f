"""`python -m llmtrain` as a user runs it: training, resuming, stopping, refusing."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain import errors
from llmtrain.rundir import RunDir
from tests.support.runs import TIMEOUT_S, Workplace, environment


def wait_for_step(workplace: Workplace, name: str, step: int, process: subprocess.Popen[str]) -> None:
    ledger = workplace.run_folder(name) / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while not (ledger.exists() and f'"step": {step},' in ledger.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_learns_and_leaves_everything_that_was_promised(workplace: Workplace):
    output = workplace.train("run.name=whole", "model.dropout=0.0", "log.report=true")
    run = workplace.run_folder("whole")
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints", "config.yaml", "curve.png", "events.jsonl", "heldout.jsonl", "lock", "log.txt", "metrics.jsonl",
        "origin.json", "report", "samples.jsonl", "saves.jsonl", "summary.json", "tensorboard",
    ]  # fmt: skip
    steps = [record["step"] for record in workplace.ledger("whole")]
    assert steps == list(range(1, 25))
    heldout = workplace.ledger("whole", "heldout")
    assert [record["step"] for record in heldout] == [0, 4, 8, 12, 16, 20, 24]
    assert heldout[-1]["loss"] < heldout[0]["loss"] - 0.5
    assert {"perplexity", "bits_per_byte", "train_loss"} <= set(heldout[0])
    summary = json.loads((run / "summary.json").read_text())
    assert f"use checkpoint  {summary['best_checkpoint']}" in output
    assert (workplace.folder / summary["best_checkpoint"] / "model/config.json").exists()
    for said in ("tensorboard --logdir", f"report          {run / 'report'}", f"curves          {run / 'curve.png'}"):
        assert said.replace(f"{workplace.folder}/", "") in output
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000016", "step-00000020", "step-00000024",
    ]  # fmt: skip


def test_a_checkpoint_loads_with_transformers_and_generates(workplace: Workplace):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    workplace.train("run.name=hf", "train.steps=4")
    folder = workplace.run_folder("hf") / "checkpoints/step-00000004/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def main(", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))

    def generate(*options: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launcher", "generate", *options],
            cwd=workplace.folder, env=environment(), text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    first = generate("runs/hf", "--prompt", "import ", "--tokens", "12", "--seed", "3")
    assert first.startswith("import ")
    assert first == generate(str(folder), "--prompt", "import ", "--tokens", "12", "--seed", "3")
    assert first != generate(str(folder), "--prompt", "import ", "--tokens", "12", "--seed", "4")
    assert "no model here; give a run folder" in generate("shards", code=errors.CheckpointError.exit_code)
    assert "--top-p" in generate("runs/hf", "--top-p", "0", code=errors.ConfigError.exit_code)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_exits_with_requeue_and_the_resumed_run_is_bit_equal(
    workplace: Workplace, longer: str, number: signal.Signals
):
    name = f"stopped-{number.name}"
    process = workplace.start(f"run.name={name}", *LONGER)
    wait_for_step(workplace, name, 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == errors.EXIT_REQUEUE, output
    assert f"stopped by {number.name} at step" in output
    saved = list((workplace.run_folder(name) / "checkpoints").glob("step-*"))
    assert len(saved) == 1
    stopped_at = int(saved[0].name.removeprefix("step-"))
    stopped = workplace.ledger(name, "events")[-1]
    assert (stopped["kind"], stopped["step"], stopped["message"]) == ("stopped", stopped_at, f"by {number.name}, saved")
    output = workplace.train(f"run.name={name}", *LONGER)
    assert f"resuming   from step {stopped_at}" in output
    assert workplace.weights(name) == workplace.weights(longer)
    assert workplace.ledger(name) == workplace.ledger(longer)


LONGER = ["train.steps=240", "evaluate.every_steps=80", "checkpoint.every_steps=1000"]
"""Two seconds: time enough to be stopped before the end."""


@pytest.fixture(scope="module")
def longer(workplace: Workplace) -> str:
    """A run of that length to its end; returns its name."""
    workplace.train("run.name=undisturbed-240", *LONGER)
    return "undisturbed-240"


@pytest.fixture(scope="module")
def undisturbed(workplace: Workplace) -> str:
    """A run to the end; returns its name."""
    workplace.train("run.name=undisturbed")
    return "undisturbed"


def test_a_second_ctrl_c_leaves_at_once(workplace: Workplace):
    process = workplace.start("run.name=impatient", "train.steps=100000", "log.every_steps=1", "evaluate.also_at=[]")
    wait_for_step(workplace, "impatient", 2, process)
    process.send_signal(signal.SIGSTOP)  # so that both arrive before the loop can look
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode in (-signal.SIGINT, 130, errors.EXIT_REQUEUE)


def test_a_run_that_starts_anew_is_held_like_any_other(workplace: Workplace):
    workplace.train("run.name=anew", "train.steps=2")
    process = workplace.start("run.name=anew", "train.steps=100000", "log.every_steps=1", "run.resume=never")
    wait_for_step(workplace, "anew", 3, process)
    assert RunDir(workplace.run_folder("anew")).is_training()
    assert "is training in this run folder" in workplace.train("run.name=anew", code=errors.RunFolderError.exit_code)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == errors.EXIT_REQUEUE


def test_a_longer_run_goes_on_and_another_configuration_is_refused(workplace: Workplace):
    workplace.train("run.name=longer", "train.steps=8")
    output = workplace.train("run.name=longer", "train.steps=12", "log.every_steps=2")
    assert "resuming   from step 8" in output
    assert [r["step"] for r in workplace.ledger("longer")] == list(range(1, 13))

    output = workplace.train("run.name=longer", "optim.lr=5e-4", code=errors.RunFolderError.exit_code)
    assert "optim.lr: the run has 0.003, now 0.0005 (command line)" in output
    assert "run.resume=never" in output
    assert workplace.ledger("longer")[-1]["step"] == 12

    output = workplace.train("run.name=longer", "optim.lr=5e-4", "train.steps=4", "run.resume=never")
    assert "the old run is now in runs/longer." in output
    assert len(workplace.ledger("longer")) == 4
    assert len(list((workplace.folder / "runs").glob("longer.*"))) == 1


def test_records_that_a_power_loss_took_are_missed(workplace: Workplace):
    settings = ["run.name=powerless", "checkpoint.keep_last=1", "checkpoint.keep_best=100"]
    assert "records  " not in workplace.train(*settings, "train.steps=8")
    run = RunDir(workplace.run_folder("powerless"))
    for records in (run.metrics, run.heldout):
        records.write_text("")
    output = workplace.train(*settings, "train.steps=12")
    assert "metrics.jsonl ends at step 0, before the checkpoint of step 8 that the run goes on from" in output
    assert run.checkpoint_steps() == [4, 8, 12]


def test_resume_must_find_something(workplace: Workplace):
    output = workplace.train("run.name=none", "run.resume=must", code=errors.CheckpointError.exit_code)
    assert 'run.resume="must" (command line)' in output


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again_in_its_old_ledgers(workplace: Workplace):
    workplace.train("run.name=emptied", "train.steps=4")
    run = RunDir(workplace.run_folder("emptied"))
    (newest,) = run.checkpoint_steps()
    run.checkpoint(newest).rename(run.quarantined(newest))
    before = workplace.ledger("emptied"), sorted(run.tensorboard.iterdir())
    for changed in ([], ["optim.lr=5e-4"]):
        output = workplace.train("run.name=emptied", *changed, code=errors.CheckpointError.exit_code)
        assert "step-00000004 is the newest of 1 in quarantine" in output
    shutil.rmtree(run.quarantined(newest))
    output = workplace.train("run.name=emptied", "optim.lr=5e-4", code=errors.CheckpointError.exit_code)
    assert "has saved checkpoints, and none of them is there any more" in output
    assert "run.resume=never" in output
    assert (workplace.ledger("emptied"), sorted(run.tensorboard.iterdir())) == before
    assert "lr: 0.003" in run.config.read_text()
    workplace.train("run.name=emptied", "train.steps=2", "run.resume=never")
    assert len(workplace.ledger("emptied")) == 2


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_used(workplace: Workplace, undisturbed: str):
    workplace.train("run.name=corrupt", "train.steps=24")
    path = workplace.run_folder("corrupt") / "checkpoints/step-00000024/state/optimizer-00000-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    output = workplace.train("run.name=corrupt")
    assert "checkpoint step-00000024 rejected" in output
    assert "optimizer-00000-of-00001.safetensors: altered" in output
    assert "resuming   from step 20" in output
    assert workplace.weights("corrupt") == workplace.weights(undisturbed)
    assert (workplace.run_folder("corrupt") / "checkpoints/quarantined-step-00000024").is_dir()


def test_two_processes_cannot_train_in_one_folder(workplace: Workplace):
    process = workplace.start("run.name=busy", "train.steps=100000")
    wait_for_step(workplace, "busy", 1, process)
    output = workplace.train("run.name=busy", code=errors.RunFolderError.exit_code)
    assert f"process {process.pid} on" in output
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_a_run_that_is_not_finite_publishes_nothing(workplace: Workplace, kind: str):
    name = f"nan-{kind}"
    settings = [
        f"run.name={name}",
        f"strategy.kind={kind}",
        "optim.lr=1e30",
        "optim.clip_norm=null",
        "checkpoint.every_steps=1",
    ]
    output = workplace.train(*settings, "evaluate.also_at=[]", code=errors.NotFinite.exit_code)
    assert "A lower optim.lr" in output or "held-out loss is" in output
    assert "Traceback" not in output
    last = workplace.ledger(name)[-1]["step"]
    checkpoints = sorted((workplace.run_folder(name) / "checkpoints").iterdir())
    assert all(int(p.name.removeprefix("step-")) < last or last == 1 for p in checkpoints)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (["train.global_batch_size=9000"], errors.TooLittleData, "fewer than one optimizer step takes"),
        (["train.micro_batch_size=3"], errors.ConfigError, "1 rank x 3 does not divide global_batch_size=8"),
        (["train.device=cuda"], errors.ConfigError, "train.device=cuda (command line): no such device here"),
        (["model.heads=2", "optim.lr=-1", "train.step=3"], errors.ConfigError, "configuration: 3 problems"),
        (["data.tokenizer.vocab_size=600"], errors.DataMismatch, "tokenizer: shards have"),
        (["model.context=32"], errors.DataMismatch, "context: shards have 64, the configuration 32"),
    ],
)
def test_wrong_settings_cost_seconds(
    workplace: Workplace, undisturbed: str, settings: list[str], kind: type[errors.UserError], message: str
):
    if message.startswith("train.device") and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has the device")
    output = workplace.train("run.name=wrong", *settings, code=kind.exit_code)
    assert message in output
    assert "Traceback" not in output
    assert not (workplace.run_folder("wrong") / "checkpoints").exists()


def test_an_altered_shard_stops_the_run(own_workplace: Workplace):
    own_workplace.train("train.steps=4")
    shard = own_workplace.folder / "shards/train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    output = own_workplace.train(code=errors.ShardError.exit_code)
    assert "train-00000.arrow: altered" in output


def test_changed_text_is_not_trained_on_as_if_it_were_the_same(own_workplace: Workplace):
    own_workplace.train("train.steps=4")
    config = own_workplace.config.read_text()
    text = own_workplace.folder / "more.txt"
    text.write_text("something new " * 2000)
    own_workplace.config.write_text(
        config.replace("paths: [", f'paths: ["{text}", ').replace("dir: shards", "dir: other")
    )
    output = own_workplace.train("train.steps=8", code=errors.RunFolderError.exit_code)
    assert "data.sources" in output


def test_a_full_disk_keeps_what_was_saved(own_workplace: Workplace, small_disk: Path):
    output = own_workplace.train(
        f"run.dir={small_disk}", "checkpoint.keep_last=100", "checkpoint.every_steps=1",
        code=errors.DiskFull.exit_code,
    )  # fmt: skip
    assert "free some space" in output.lower()
    left = sorted(p.name for p in (small_disk / "run/checkpoints").iterdir())
    assert left
    assert all(name.startswith("step-") for name in left)
    room = ["checkpoint.keep_last=1", "checkpoint.keep_best=0", "checkpoint.every_steps=8", "log.tensorboard=false"]
    for extra in left[:-1]:
        subprocess.run(["rm", "-rf", str(small_disk / "run/checkpoints" / extra)], check=True)
    assert "resuming   from step" in own_workplace.train(f"run.dir={small_disk}", *room, "train.steps=8")


def test_a_disk_that_fills_up_between_saves_is_said(own_workplace: Workplace, small_disk: Path):
    seldom = ["evaluate.every_steps=null", "checkpoint.every_steps=null"]
    process = own_workplace.start(f"run.dir={small_disk}", "run.name=run", "train.steps=100000", *seldom)
    ledger = small_disk / "run/metrics.jsonl"
    while not (ledger.exists() and ledger.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    with contextlib.suppress(OSError), (small_disk / "of somebody else").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == errors.DiskFull.exit_code, output
    assert output.count("error: ") == 1
    assert "no space left in" in output
    assert "Traceback" not in output
    (small_disk / "of somebody else").unlink()
    own_workplace.train(f"run.dir={small_disk}", "run.name=run", "train.steps=8", *seldom)
    steps = [json.loads(line)["step"] for line in ledger.read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_a_start_on_a_full_disk_is_no_bug(own_workplace: Workplace, small_disk: Path):
    with contextlib.suppress(OSError), (small_disk / "of somebody else").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    output = own_workplace.train(f"run.dir={small_disk}", code=errors.DiskFull.exit_code)
    assert f"run folder: no space left in {small_disk}/run" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("module", [["llmtrain"], ["launcher", "run"]])
def test_a_read_only_disk_is_named(own_workplace: Workplace, small_disk: Path, module: list[str]):
    settings = [f"run.dir={small_disk}", "train.steps=2", "checkpoint.keep_last=1", "log.tensorboard=false"]
    own_workplace.train(*settings)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", *module, str(own_workplace.config), *settings],
        cwd=own_workplace.folder, env=environment(), text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == errors.RunFolderError.exit_code, done.stderr
    assert "Read-only file system. See to it that this process may" in done.stderr
    assert str(small_disk) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_said_once_by_two_ranks(own_workplace: Workplace, small_disk: Path):
    settings = [f"run.dir={small_disk}", "checkpoint.keep_last=100", "checkpoint.every_steps=1"]
    output = own_workplace.train(*settings, ranks=2, code=1)  # torchrun's own code
    assert output.count("error: ") == 1
    assert f"exitcode  : {errors.DiskFull.exit_code}" in output
    left = [path.name for path in (small_disk / "run/checkpoints").iterdir()]
    assert left
    assert all(name.startswith("step-") for name in left)


def test_waiting_for_the_disk_gives_the_same_files(workplace: Workplace):
    workplace.train("run.name=beside")
    workplace.train("run.name=waiting", "checkpoint.background=false")
    assert workplace.weights("beside") == workplace.weights("waiting")


def test_help_and_argument_errors_do_not_wait_for_torch():
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llmtrain", "--help"], env=environment(), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert "torchrun --nproc_per_node 8" in said.stdout
    assert "| torch\n" not in said.stderr
