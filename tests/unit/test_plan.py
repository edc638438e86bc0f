"""What `llmtrain plan` says of a run over its time, and what it must not need for that."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cluster import Profile
from launcher.planning import forecast
from launcher.slurm.limits import Request
from launcher.submitting.plan_job import Wishes, find_job, find_nodes, machine_for, train_seconds
from launcher.submitting.submit import Order
from llmtrain.batches import BatchPlan
from llmtrain.config import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.memory import GPTSizes
from tests.support.runs import environment

ROOT = Path(__file__).parents[2]


def configured(*settings: str) -> RunConfig:
    return load_config(None, settings)[0]


def steps(total: int, batch: int = 8) -> BatchPlan:
    return BatchPlan(batch, batch, 1, total)


# ---------------------------------------------------------------------------------------------- saves, disk, uploads


@pytest.mark.parametrize(
    ("settings", "total", "rows", "saves"),
    [
        (["checkpoint.every_steps=100"], 300, None, 3),  # the last one is one of them
        (["checkpoint.every_steps=100"], 301, None, 4),
        (["checkpoint.every_steps=100"], 50, None, 1),
        (["checkpoint.every_steps=null"], 300, None, 1),
        (["checkpoint.every_steps=null", "checkpoint.every_epochs=1"], 30, 80, 3),  # 10 steps a pass
        (["checkpoint.every_steps=null", "checkpoint.every_epochs=0.5"], 30, 84, 6),  # 5.25, 10.5, 15.75, ...
        (["checkpoint.every_steps=10", "checkpoint.every_epochs=1"], 30, 80, 3),  # the same steps
        (["checkpoint.every_steps=10", "checkpoint.every_epochs=1"], 30, None, 3),  # passes are not known
    ],
)
def test_checkpoints_are_counted_as_training_saves_them(settings: list[str], total: int, rows: int | None, saves: int):
    assert forecast.count_saves(configured(*settings), steps(total), rows) == saves


def test_what_is_on_disk_and_what_is_uploaded():
    config = configured("checkpoint.keep_last=2", "checkpoint.keep_best=1")
    assert forecast.most_on_disk(config, steps(1000), 10) == 4
    assert forecast.most_on_disk(config, steps(1000), 2) == 2
    assert forecast.most_on_disk(configured("checkpoint.keep_every=100"), steps(1000), 100) == 15
    sizes = GPTSizes(config.model, 1000)  # pyright: ignore[reportArgumentType]
    assert forecast.upload_volume(config, sizes, 10) is None
    weights = forecast.upload_volume(configured("hub.repo=a/b"), sizes, 10)
    whole = forecast.upload_volume(configured("hub.repo=a/b", "hub.optimizer_state=true"), sizes, 10)
    assert weights is not None
    assert whole is not None
    assert (weights.each_bytes, weights.all_bytes) == (4 * sizes.trainable, 40 * sizes.trainable)
    assert whole.each_bytes == 3 * weights.each_bytes


# ---------------------------------------------------------------------------------------------- time


def test_the_pace_is_told_or_measured(tmp_path: Path):
    config = configured(f"run.dir={tmp_path}", "model.context=256")
    assert forecast.find_pace(config, steps(300), None) is None
    assert forecast.find_pace(config, steps(300), 5000.0) == forecast.Pace(5000.0, "as you say")
    run = tmp_path / "stdlib-gpt"
    run.mkdir()
    began = time.time() - 100
    events = [{"kind": "started", "message": "", "step": 0, "time": 0}, {"kind": "resumed", "message": "", "step": 40, "time": began}]  # fmt: skip  # noqa: E501
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "metrics.jsonl").write_text('{"step": 40}\n')
    assert forecast.find_pace(config, steps(300), None) is None  # not a step since
    (run / "metrics.jsonl").write_text('{"step": 40}\n{"step": 90}\n')
    os.utime(run / "metrics.jsonl", (began + 100, began + 100))
    pace = forecast.find_pace(config, steps(300), None)
    assert pace is not None
    assert pace.tokens_per_s == pytest.approx(50 * 8 * 256 / 100, rel=1e-6)
    assert str(run) in pace.told


def test_a_run_is_spread_over_jobs(tmp_path: Path):
    assert [forecast.num_jobs(seconds, 3480) for seconds in (10, 3480, 3481)] == [1, 1, 2]
    (tmp_path / "p.yaml").write_text("gpus_per_node: 4\ntime: 60\n")
    wishes = Wishes(nodes=2, cluster=tmp_path / "p.yaml")
    job = find_job(wishes)
    assert job is not None
    assert (job.request, train_seconds(wishes, job)) == (Request(2, 4, 4), 3480)
    longer = Wishes(gpus_per_node=1, cluster=tmp_path / "p.yaml", time="2:00:00")
    assert train_seconds(longer, find_job(longer)) == 7080
    alone = Wishes(gpus=8, time="10:00")
    assert (find_job(alone), train_seconds(alone, None)) == (None, 480)


# ---------------------------------------------------------------------------------------------- machines


def test_what_nodes_have_comes_from_the_profile_and_the_command_line():
    job = Order(Profile(gpus_per_node=4, gpu_memory_gb=80), Request(2, 4, 4))
    machine = find_nodes(job, None, "auto")
    assert (machine.device, machine.ranks, machine.memory_bytes) == ("cuda", 8, 80e9)
    unknown = replace(job, profile=Profile(gpus_per_node=4))
    sizes = [find_nodes(unknown, described, "auto").memory_bytes for described in (40.0, None)]
    assert sizes == [40e9, None]
    assert find_nodes(job, None, "cpu").device == "cpu"  # train.device=cpu on nodes that have GPUs
    cpu = find_nodes(Order(Profile(gpus_per_node=0, mem="64G"), Request(2, ranks_per_node=4)), None, "auto")
    assert (cpu.device, cpu.ranks, cpu.memory_bytes) == ("cpu", 8, 16 * 1024**3)
    assert find_nodes(Order(Profile(gpus_per_node=0, mem="0"), Request()), None, "auto").memory_bytes is None
    assert Profile(gpus_per_node=0, mem="1000").mem_bytes == 1000 * 1024**2


def test_nodes_without_a_profile():
    machine = machine_for(Wishes(nodes=2, gpus_per_node=4), None, 80.0, "auto")
    assert (machine.device, machine.ranks, machine.memory_bytes) == ("cuda", 8, 80e9)
    assert machine_for(Wishes(nodes=2, gpus_per_node=0), None, None, "auto").ranks == 2
    assert machine_for(Wishes(nodes=2, ranks_per_node=3), None, None, "auto").ranks == 6


def test_wishes_that_contradict_each_other_are_told_together(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        find_job(Wishes(gpus=8, nodes=2, cluster=tmp_path, time="soon"))
    assert len(caught.value.problems) == 2


# ---------------------------------------------------------------------------------------------- what it needs

WATCH = """
import json, sys
started = []
sys.addaudithook(lambda event, words: started.append(str(words[0])) if event == "subprocess.Popen" else None)
from launcher.cli import app
try:
    app()
except SystemExit as leaving:
    print(json.dumps({"code": leaving.code, "started": started, "modules": sorted(sys.modules)}), file=sys.stderr)
"""
HEAVY = {"torch", "transformers", "submitit", "huggingface_hub", "datasets", "tensorboard", "deepspeed", "accelerate",
         "pandas", "scipy", "matplotlib"}  # fmt: skip


QLORA = ["model.kind=qlora", "model.base=meta-llama/Llama-3.1-8B", "model.context=512", "--gpu-memory", "180",
         "--base-config", str(ROOT / "configs/shapes/llama-3.1-8b")]  # fmt: skip


@pytest.mark.parametrize(
    "job", [[], QLORA, ["--cluster", str(ROOT / "configs/clusters/example.yaml"), "--nodes", "2"]], ids=len
)
def test_plan_starts_nothing_and_loads_nothing_heavy(tmp_path: Path, job: list[str]):
    words = ["plan", "--tokens-per-s", "100000", "hub.repo=a/b", "train.global_batch_size=32", *job]
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *words],
        cwd=tmp_path, env={**environment(), "PATH": "/nowhere"}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    seen = json.loads(done.stderr.splitlines()[-1])
    assert seen["code"] in (0, None), done.stdout
    assert seen["started"] == []
    allowed = {"submitit"} if "--cluster" in job else set[str]()  # it writes the batch script
    assert HEAVY & {name.split(".")[0] for name in seen["modules"]} == allowed
    assert ("#SBATCH --nodes=2" in done.stdout) == ("--cluster" in job)
    for line in ("saves ", "disk ", "upload ", "time "):
        assert f"\n{line}" in done.stdout
    assert list(tmp_path.iterdir()) == []
