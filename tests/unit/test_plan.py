"""What `llmtrain plan` says of a run over its time, and what it must not need for that."""

import io
import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launcher.cluster import Profile
from launcher.display import duration
from launcher.planning import forecast
from launcher.planning.plan import Given, Machine, show
from launcher.sharding.build import build
from launcher.submitting.order import Order
from launcher.submitting.plan_job import Wishes, find_job, find_nodes, machine_for, train_seconds
from llmtrain import model_files, origin
from llmtrain.batches import ANY_ROWS, BatchPlan, plan_batches
from llmtrain.config import load_config, resolved_yaml
from llmtrain.config.load import Origins, with_precision
from llmtrain.config.model_sections import GPTModel
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError, DataMismatch
from llmtrain.memory import WholeSizes
from llmtrain.rundir import RunDir
from tests.support.runs import environment

ROOT = Path(__file__).parents[2]

NO_WISHES = Wishes(None, None, None, None, None, None)
NOTHING_GIVEN = Given(None, None, None, None, None)


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


@given(
    every=st.none() | st.integers(1, 50), total=st.integers(1, 200), rows=st.integers(1, 500),
    epochs=st.sampled_from([0.01, 0.3, 0.5, 1.0, 2.0]),
)  # fmt: skip
def test_saves_by_steps_and_by_passes_are_counted_once(every: int | None, total: int, rows: int, epochs: float):
    config = configured(f"checkpoint.every_steps={json.dumps(every)}", f"checkpoint.every_epochs={epochs}")
    saved = {total, *(range(every, total, every) if every else ())}
    apart = epochs * rows / 8
    saved |= {min(total, math.ceil(number * apart - 1e-9)) for number in range(1, int(total / apart) + 1)}
    assert forecast.count_saves(config, steps(total), rows) == len(saved)


def test_a_billion_steps_take_no_memory_to_count():
    config = configured("checkpoint.every_steps=100")
    tracemalloc.start()
    try:
        assert forecast.count_saves(config, steps(10**9), None) == 10**7
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    both = configured("checkpoint.every_steps=100", "checkpoint.every_epochs=1")
    assert forecast.count_saves(both, steps(10**15), 80) == 10**13 + 10**14  # at most


def test_what_is_on_disk_and_what_is_uploaded():
    config = configured("checkpoint.keep_last=2", "checkpoint.keep_best=1")
    assert forecast.most_on_disk(config, steps(1000), 10) == 4
    assert forecast.most_on_disk(config, steps(1000), 2) == 2
    assert forecast.most_on_disk(configured("checkpoint.keep_every=100"), steps(1000), 100) == 15
    sizes = WholeSizes(config.model, 1000)  # pyright: ignore[reportArgumentType]
    assert forecast.upload_volume(config, sizes, 10) is None
    weights = forecast.upload_volume(configured("hub.repo=a/b"), sizes, 10)
    whole = forecast.upload_volume(configured("hub.repo=a/b", "hub.optimizer_state=true"), sizes, 10)
    assert weights is not None
    assert whole is not None
    assert (weights.each_bytes, weights.all_bytes) == (4 * sizes.trainable, 40 * sizes.trainable)
    assert whole.each_bytes == 3 * weights.each_bytes


# ---------------------------------------------------------------------------------------------- time


def pace_of(
    config: RunConfig, tokens_per_s: float | None = None, ranks: int = 2, device: str = "cpu"
) -> forecast.Pace | str:
    plan = plan_batches(config, Origins(), ranks, ANY_ROWS)
    return forecast.find_pace(config, plan, tokens_per_s, float(config.model.context), ranks, device)


def test_the_pace_is_told_or_measured(tmp_path: Path):
    config = configured(f"run.dir={tmp_path}", "model.context=256", "train.global_batch_size=8")
    assert "start the run: its pace is then taken" in str(pace_of(config))
    assert pace_of(config, 5000.0) == forecast.Pace(5000.0, "as you say")
    run = tmp_path / "stdlib-gpt"
    run.mkdir()
    (run / "config.yaml").write_text(resolved_yaml(with_precision(config, "fp32")))
    origin.note(RunDir(run), "cpu", 2, 2)
    began = time.time() - 100
    events = [{"kind": "started", "message": "", "step": 0, "time": 0}, {"kind": "resumed", "message": "", "step": 40, "time": began}]  # fmt: skip  # noqa: E501
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "metrics.jsonl").write_text('{"step": 40}\n')
    assert "start the run" in str(pace_of(config))  # not a step since
    (run / "metrics.jsonl").write_text('{"step": 40}\n{"step": 90}\n')
    os.utime(run / "metrics.jsonl", (began + 100, began + 100))
    pace = pace_of(config)
    assert isinstance(pace, forecast.Pace)
    assert pace.tokens_per_s == pytest.approx(50 * 8 * 256 / 100, rel=1e-6)
    assert str(run) in pace.source


def test_the_pace_of_other_settings_says_nothing(tmp_path: Path):
    given = [f"run.dir={tmp_path}", "model.context=64", "train.global_batch_size=8"]
    run = RunDir(tmp_path / "stdlib-gpt")
    run.path.mkdir()
    run.events.write_text(json.dumps({"kind": "started", "message": "", "step": 0, "time": time.time() - 100}) + "\n")
    run.metrics.write_text('{"step": 40}\n')
    run.config.write_text(resolved_yaml(with_precision(configured(*given), "fp32")))
    assert "how many ranks" in str(pace_of(configured(*given)))
    origin.note(run, "cpu", 2, 2)
    same = ["optim.lr=0.5", "train.steps=7", "train.micro_batch_size=4", "checkpoint.every_steps=3", "data.dir=x"]
    assert isinstance(pace_of(configured(*given, *same)), forecast.Pace)
    for setting, expected in [
        ("model.context=128", "(model)"),
        ("model.num_layers=1", "(model)"),
        ("data.tokenizer.vocab_size=300", "(data)"),
        ("train.global_batch_size=16", "(train.global_batch_size=8, train.micro_batch_size=4)"),
        ("train.micro_batch_size=2", "(train.micro_batch_size=4)"),
        ("train.precision=bf16", "(train.precision=fp32)"),
        ("strategy.kind=zero2", "(strategy)"),
    ]:
        said = pace_of(configured(*given, setting))
        assert "not known for these settings" in str(said)
        assert expected in str(said)
    assert "(ranks=2" in str(pace_of(configured(*given), ranks=1))
    assert "(device=cpu)" in str(pace_of(configured(*given), device="cuda"))


def time_line(config: RunConfig, known: Given) -> str:
    out = io.StringIO()
    show(config, Origins(), Machine("cpu", 1, None, ""), known, Console(file=out, width=300))
    return next(line for line in out.getvalue().splitlines() if line.startswith("time "))


def short_texts(folder: Path, *settings: str) -> RunConfig:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(300)))
    return configured(
        f"data.sources=[{{kind: jsonl, paths: ['{folder}/a.jsonl']}}]", "data.tokenizer.vocab_size=300",
        f"data.dir={folder}/shards", "data.packing=none", "model.context=64", "train.steps=100",
        "train.global_batch_size=10", f"run.dir={folder}", *settings,
    )  # fmt: skip


def test_padding_takes_no_time_where_shards_tell_how_much_there_is(tmp_path: Path):
    """--tokens-per-s is what training shows, which leaves padding out."""
    config = short_texts(tmp_path)
    known = replace(NOTHING_GIVEN, tokens_per_s=100.0, vocab_size=300)
    full = time_line(config, known)
    assert f" {duration(100 * 10 * 64 / 100)} at 100 tokens/s" in full
    assert "rows are counted as full" in full
    train = build(config, workers=1).folder.manifest.splits["train"]
    assert train.tokens / train.rows < 32
    line = time_line(config, known)
    assert f" {duration(100 * 10 * train.tokens / train.rows / 100)} at 100 tokens/s" in line
    assert "full" not in line
    with pytest.raises(DataMismatch, match="built by another recipe; context: shards have 64, the configuration 32"):
        time_line(short_texts(tmp_path, "model.context=32"), known)  # which training refuses


def test_a_plan_says_that_the_warmup_is_too_long():
    for total, said in ((30, True), (50, False)):
        out = io.StringIO()
        config = configured(f"train.steps={total}")
        known = replace(NOTHING_GIVEN, vocab_size=300)
        show(config, Origins(), Machine("cpu", 1, None, ""), known, Console(file=out, width=300))
        assert ("\nwarm-up      50 of 30 steps: the learning rate ends at 0.0012 and" in out.getvalue()) == said


def test_a_plan_looks_at_the_weights_that_a_run_begins_with(tmp_path: Path):
    folder = tmp_path / "weights"
    config = configured(f"model.start_from={folder}")
    known = replace(NOTHING_GIVEN, vocab_size=300)

    def planned() -> str:
        out = io.StringIO()
        show(config, Origins(), Machine("cpu", 1, None, ""), known, Console(file=out, width=300))
        return out.getvalue()

    assert f"those of {folder}, which is not here to be looked at" in planned()
    folder.mkdir()
    (folder / "model.safetensors").touch()
    assert isinstance(config.model, GPTModel)
    model_files.write(folder, config.model, 300, 0)
    assert f"those of {folder}\n" in planned()
    model_files.write(folder, config.model.model_copy(update={"width": 48}), 300, 0)
    with pytest.raises(ConfigError, match="it has width=48"):
        planned()


def test_a_run_is_spread_over_jobs(tmp_path: Path):
    assert [forecast.num_jobs(seconds, 3480) for seconds in (10, 3480, 3481)] == [1, 1, 2]
    (tmp_path / "p.yaml").write_text("gpus_per_node: 4\ntime: 60\n")
    wishes = replace(NO_WISHES, nodes=2, cluster=tmp_path / "p.yaml")
    job = find_job(wishes)
    assert job is not None
    assert (job.nodes, job.gpus_per_node, job.ranks_per_node, train_seconds(wishes, job)) == (2, 4, 4, 3480)
    longer = replace(NO_WISHES, gpus_per_node=1, cluster=tmp_path / "p.yaml", time="2:00:00")
    assert train_seconds(longer, find_job(longer)) == 7080
    alone = replace(NO_WISHES, gpus=8, time="10:00")
    assert (find_job(alone), train_seconds(alone, None)) == (None, 480)


# ---------------------------------------------------------------------------------------------- machines


def test_what_nodes_have_comes_from_the_profile_and_the_command_line():
    job = Order(Profile(gpus_per_node=4, gpu_memory_gb=80), Path("p.yaml"), 2, 4, 4, "")
    machine = find_nodes(job, None, "auto")
    assert (machine.device, machine.ranks, machine.memory_bytes) == ("cuda", 8, 80e9)
    unknown = replace(job, profile=Profile(gpus_per_node=4))
    sizes = [find_nodes(unknown, described, "auto").memory_bytes for described in (40.0, None)]
    assert sizes == [40e9, None]
    assert find_nodes(job, None, "cpu").device == "cpu"  # train.device=cpu on nodes that have GPUs
    on_cpus = replace(job, profile=Profile(gpus_per_node=0, mem="64G"), gpus_per_node=0)
    cpu = find_nodes(on_cpus, None, "auto")
    assert (cpu.device, cpu.ranks, cpu.memory_bytes) == ("cpu", 8, 16 * 1024**3)
    whole_nodes = replace(on_cpus, profile=Profile(gpus_per_node=0, mem="0"))
    assert find_nodes(whole_nodes, None, "auto").memory_bytes is None
    assert Profile(gpus_per_node=0, mem="1000").mem_bytes == 1000 * 1024**2


def test_nodes_without_a_profile():
    machine = machine_for(replace(NO_WISHES, nodes=2, gpus_per_node=4), None, 80.0, "auto")
    assert (machine.device, machine.ranks, machine.memory_bytes) == ("cuda", 8, 80e9)
    assert machine_for(replace(NO_WISHES, nodes=2, gpus_per_node=0), None, None, "auto").ranks == 2
    assert machine_for(replace(NO_WISHES, nodes=2, ranks_per_node=3), None, None, "auto").ranks == 6


def test_the_tokens_of_a_run_are_those_of_all_its_micro_batches():
    config = configured("train.steps=100", "train.global_batch_size=8", "train.micro_batch_size=2", "model.context=64")
    out = io.StringIO()
    show(config, Origins(), Machine("cpu", 2, None, ""), NOTHING_GIVEN, Console(file=out, width=200))
    assert "\nbatch        8 rows = 2 ranks x 2 x 2\n" in out.getvalue()
    assert "\nsteps        100, 51,200 tokens\n" in out.getvalue()


@pytest.mark.parametrize(
    ("bf16", "settings", "memory_gb", "said"),
    [
        (None, [], 7.1, True),  # too small in fp32
        (None, [], None, True),
        (None, [], 80.0, False),  # fits in fp32, too
        (None, ["train.precision=bf16"], 7.1, False),
        (True, [], 7.1, False),
        (False, [], 7.1, False),
    ],
)
def test_bf16_that_nobody_has_promised_is_told(
    bf16: bool | None, settings: list[str], memory_gb: float | None, said: bool
):
    out = io.StringIO()
    machine = Machine("cuda", 1, memory_gb and memory_gb * 1e9, "", bf16)
    config = configured("model.width=1024", "model.num_layers=12", "train.micro_batch_size=8", *settings)
    fits = show(config, Origins(), machine, replace(NOTHING_GIVEN, vocab_size=50_000), Console(file=out, width=300))
    assert ("\nprecision    counted in bf16; GPUs before Ampere take fp32" in out.getvalue()) == said
    assert fits == (memory_gb != 7.1 or bf16 is not False), out.getvalue()


def test_wishes_that_contradict_each_other_are_told_together(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        find_job(replace(NO_WISHES, gpus=8, nodes=2, cluster=tmp_path, time="soon"))
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
