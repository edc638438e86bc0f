"""`llmtrain plan`: what a run would take, before anything is started."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from launcher import display
from launcher.planning import forecast
from launcher.planning.sizes import find_sizes
from llmtrain import cpu, model_files, recipe, shards
from llmtrain.batches import ANY_ROWS, BatchPlan, plan_batches, warmup_problem
from llmtrain.config.load import Origins, with_precision
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.gpus import first_gpu
from llmtrain.memory import Device, MemoryPart, Sizes
from llmtrain.resume import settled_precision
from llmtrain.shards import ShardManifest
from llmtrain.wording import count

GB = 1e9
_SPARE = 0.95
"""Share of a GPU's memory that a run may take; allocators lose some of the rest to fragmentation."""


@dataclass(frozen=True)
class Machine:
    device: Device
    ranks: int
    memory_bytes: float | None
    """That one rank may take; None: nobody has said."""
    description: str
    bf16: bool | None = None
    """Whether its GPUs compute in bf16, which those before Ampere only emulate; None: nobody has said."""


def find_machine(gpus: int, gpu_memory_gb: float | None, device: str) -> Machine:
    """The GPUs that were described, or that are here; without any, this machine's CPU."""
    here = None if device == "cpu" or gpu_memory_gb is not None else first_gpu()
    if device == "cpu" or (device == "auto" and gpu_memory_gb is None and here is None):
        total = float(psutil.virtual_memory().total)
        return Machine("cpu", gpus, total / gpus, f"{total / GB:.0f} GB of host memory, {count(gpus, 'rank')}")
    if gpu_memory_gb is not None:
        here = gpu_memory_gb * GB, None
    if here is None:
        raise ConfigError(["there is no GPU on this machine to ask: give --gpu-memory in GB, or --device cpu"])
    size, bf16 = here
    return Machine("cuda", gpus, size, f"{count(gpus, 'GPU')} with {size / GB:.0f} GB", bf16)


def uses_bf16(config: RunConfig, machine: Machine) -> bool:
    """As training decides it; GPUs of which nobody has said what they are count as ones that do."""
    is_fast = machine.bf16 is not False if machine.device == "cuda" else cpu.has_fast_bf16()
    return settled_precision(config, None, is_fast) == "bf16"


@dataclass(frozen=True)
class Outlook:
    """What `plan` says about one way to run."""

    kind: str
    parts: list[MemoryPart]

    @property
    def total(self) -> float:
        return sum(part.size_bytes for part in self.parts)


def outlook(config: RunConfig, sizes: Sizes, plan: BatchPlan, machine: Machine, kind: str) -> Outlook:
    bf16 = uses_bf16(config, machine)
    parts = sizes.estimate(config, plan, machine.ranks, kind, bf16, machine.device)
    if machine.device == "cpu":  # GPUs' copies for saving are in host memory
        copy = sizes.host_copy(config, machine.ranks)
        parts.append(MemoryPart("save buffers", copy, "checkpoint.background: host copy of what is written"))
    return Outlook(kind, parts)


def fits(outlook: Outlook, machine: Machine) -> bool:
    return machine.memory_bytes is None or outlook.total <= _SPARE * machine.memory_bytes


def remedies(
    config: RunConfig, origins: Origins, sizes: Sizes, plan: BatchPlan, machine: Machine, rows: int
) -> list[str]:
    """The smallest changes with which the run would fit, as settings for the command line."""
    micros = [m for m in range(plan.micro_batch_size, 0, -1) if plan.global_batch_size // machine.ranks % m == 0]
    found: dict[tuple[str, str, bool], str] = {}  # the largest micro-batch of each kind of change
    choices = itertools.product(("none", "cpu"), micros, (False, True), _strategies(config))
    for offload, micro, recompute, kind in sorted(choices, key=lambda c: (c[0] == "cpu", c[2], -c[1])):
        if (offload == "cpu" and (kind == "ddp" or machine.device == "cpu")) or (kind, offload, recompute) in found:
            continue
        changed = _changed(config, kind, micro, recompute, offload)
        replanned = plan_batches(changed, origins, machine.ranks, rows)
        if fits(outlook(changed, sizes, replanned, machine, kind), machine):
            settings = {
                "strategy.kind": (kind, config.strategy.kind),
                "strategy.offload_optimizer": (offload, config.strategy.offload_optimizer),
                "train.micro_batch_size": (micro, plan.micro_batch_size),
                "train.activation_checkpointing": (
                    str(recompute).lower(),
                    str(config.train.activation_checkpointing).lower(),
                ),
            }
            changes = " ".join(f"{name}={new}" for name, (new, old) in settings.items() if new != old)
            found[kind, offload, recompute] = changes
    return list(found.values())[:3]


def _strategies(config: RunConfig) -> list[str]:
    """Those that this optimizer works with."""
    return list(display.STRATEGIES) if config.optim.kind == "adamw" else ["ddp"]


def _changed(config: RunConfig, kind: str, micro: int, recompute: bool, offload: str) -> RunConfig:
    strategy: Any = {"kind": kind, "offload_optimizer": offload}
    return config.model_copy(
        update={
            "strategy": config.strategy.model_copy(update=strategy),
            "train": config.train.model_copy(update={"micro_batch_size": micro, "activation_checkpointing": recompute}),
        }
    )


@dataclass(frozen=True)
class Given:
    """What the user says that cannot be known yet; None: not given."""

    vocab_size: int | None
    samples: int | None
    """Training samples."""
    base_config: str | None
    """A folder with the base's config.json."""
    tokens_per_s: float | None
    """Of all ranks together."""
    job_s: float | None
    """How long one job may train before it saves and queues again; None: as long as it takes."""


def count_rows(config: RunConfig, given: Given, built: ShardManifest | None) -> tuple[int | None, str]:
    """Rows of the training split, if they are known, and where from.

    Raises:
        ConfigError: samples were counted that will be packed into an unknown number of rows.
    """
    folder = recipe.shard_folder(config)
    if given.samples is None:
        rows = None if built is None else built.splits["train"].rows
        return rows, f"not sharded yet ({folder}): no row count" if rows is None else f"{rows:,} rows in {folder}"
    if config.data.packing != "none":
        raise ConfigError(
            [
                f"--samples {given.samples}: with data.packing={config.data.packing} a row holds several samples; the "
                "number of rows is known once 'llmtrain shard' has run (data.packing=none: one sample a row)"
            ]
        )
    return given.samples, f"{given.samples:,} training samples, one a row (as you say)"


def show(config: RunConfig, origins: Origins, machine: Machine, given: Given, console: Console) -> bool:
    """Print the plan; returns whether the configured run fits.

    Raises:
        ConfigError: something has to be said first, or cannot be so.
    """
    begins_with = _describe_start(config, origins)
    folder = recipe.shard_folder(config)
    built = recipe.open_shards(config, "size").manifest if shards.exists(folder) else None
    rows, data = count_rows(config, given, built)
    sizes = find_sizes(config, given.vocab_size, given.base_config, built)
    enough_rows = ANY_ROWS if rows is None else rows
    plan = plan_batches(config, origins, machine.ranks, enough_rows)

    def say(name: str, text: str) -> None:
        console.print(f"{name:<12} {text}", highlight=False, soft_wrap=True, markup=False)

    say("model", sizes.title)
    if begins_with is not None:
        say("weights", begins_with)
    say("data", data)
    ranks = count(machine.ranks, "rank")
    say("batch", f"{plan.global_batch_size} rows = {ranks} x {plan.micro_batch_size} x {plan.accumulation}")
    if rows is None and config.train.epochs is not None:
        say("steps", f"{config.train.epochs:g} epochs; the number is known once 'llmtrain shard' has run")
        say("disk", f"{display.size(sizes.checkpoint_bytes(config))} a checkpoint")
    else:
        tokens = plan.total_steps * plan.global_batch_size * config.model.context
        epochs = "" if rows is None else f", {plan.total_steps * plan.global_batch_size / rows:.2f} epochs"
        padded = "" if config.data.packing == "contiguous" else " with padding"
        say("steps", f"{plan.total_steps:,}, {tokens:,} tokens{padded}{epochs}")
        if (problem := warmup_problem(config.optim, plan.total_steps)) is not None:
            say("warm-up", problem)
        _say_course(config, plan, sizes, rows, say)
        _say_time(config, plan, machine, given, built, say)
    outlooks = [outlook(config, sizes, plan, machine, kind) for kind in _strategies(config)]
    console.print(_table(outlooks, machine))
    chosen = next(o for o in outlooks if o.kind == config.strategy.kind)
    _say_precision(config, sizes, plan, machine, say)
    if machine.memory_bytes is None:
        say("fits?", "give --gpu-memory, or gpu_memory_gb in the cluster's profile, to know")
        return True
    taken = f"takes {chosen.total / GB:.2f} of {machine.memory_bytes / GB:.1f} GB"
    if fits(chosen, machine):
        say("fits", f"{display.STRATEGIES[chosen.kind]} {taken}")
        return True
    say("too large", f"{display.STRATEGIES[chosen.kind]} {taken}")
    ways = remedies(config, origins, sizes, plan, machine, enough_rows)
    for way in ways:
        say("  it fits with", way)
    if not ways:
        say(
            "  ", "no setting here makes it fit: use a smaller model, a shorter model.context, or more GPUs with ZeRO-2"
        )
    return False


def _describe_start(config: RunConfig, origins: Origins) -> str | None:
    """Of given weights. Raises ConfigError where a run could not begin with them."""
    if config.model.kind == "qlora" or config.model.start_from is None:
        return None
    folder = Path(config.model.start_from)
    if not folder.is_dir():  # planned on another machine
        return f"those of {folder}, which is not here to be looked at"
    model_files.check_start(config, origins)
    return f"those of {folder}"


def _say_precision(
    config: RunConfig, sizes: Sizes, plan: BatchPlan, machine: Machine, say: Callable[[str, str], None]
) -> None:
    """Where bf16 was taken for granted, and fp32 might not fit."""
    if machine.device != "cuda" or machine.bf16 is not None or config.train.precision != "auto":
        return
    if not uses_bf16(config, machine):
        return
    slower = outlook(with_precision(config, "fp32"), sizes, plan, machine, config.strategy.kind)
    if machine.memory_bytes is None or not fits(slower, machine):
        say("precision", "counted in bf16; GPUs before Ampere take fp32: for those add train.precision=fp32")


def _say_course(
    config: RunConfig, plan: BatchPlan, sizes: Sizes, rows: int | None, say: Callable[[str, str], None]
) -> None:
    """What comes of the run over its time: checkpoints, uploads."""
    size = sizes.checkpoint_bytes(config)
    saves = forecast.count_saves(config, plan, rows)
    most = forecast.most_on_disk(config, plan, saves)
    say("saves", f"{saves:,}, of {display.size(size)} each")
    say(
        "disk",
        f"{display.size(most * size)} at most, if scoring and uploads keep up: {most} checkpoints, one being written",
    )
    upload = forecast.upload_volume(config, sizes, saves)
    if upload is None:
        say("upload", "none: hub.repo is not set")
    else:
        state = "with" if config.hub.optimizer_state else "without"
        each, everything = display.size(upload.each_bytes), display.size(upload.all_bytes)
        say("upload", f"{each} a checkpoint, {state} optimizer state; {everything} in all, to {config.hub.repo}")


def _say_time(
    config: RunConfig,
    plan: BatchPlan,
    machine: Machine,
    given: Given,
    built: ShardManifest | None,
    say: Callable[[str, str], None],
) -> None:
    """How long it takes, and in how many jobs. Tokens are counted as training shows them, without padding."""
    tokens_per_row = float(config.model.context) if built is None else built.tokens_per_row
    pace = forecast.find_pace(config, plan, given.tokens_per_s, tokens_per_row, machine.ranks, machine.device)
    if isinstance(pace, str):
        say("time", pace)
        return
    seconds = plan.total_steps * plan.global_batch_size * tokens_per_row / pace.tokens_per_s
    number = 0 if given.job_s is None else forecast.num_jobs(seconds, given.job_s)
    jobs = "" if not number else ", in one job" if number == 1 else f", in {number} jobs"
    how = pace.source
    if built is None and config.data.packing != "contiguous":
        how += "; rows are counted as full, without padding, until 'llmtrain shard' has run"
    say("time", f"{display.duration(seconds)} at {pace.tokens_per_s:,.0f} tokens/s ({how}){jobs}")


def _table(outlooks: list[Outlook], machine: Machine) -> Table:
    table = Table(
        title=f"Memory of one rank at its peak, GB ({machine.description})", title_justify="left", show_footer=True
    )
    names = list(dict.fromkeys(part.name for o in outlooks for part in o.parts))
    table.add_column("", footer="total")
    for o in outlooks:
        good = fits(o, machine)
        footer = f"[green]{o.total / GB:.2f}[/green]" if good else f"[red]{o.total / GB:.2f}, too large[/red]"
        table.add_column(display.STRATEGIES[o.kind], footer=footer, justify="right")
    table.add_column("", style="dim", overflow="fold")
    for name in names:
        parts = [next((p for p in o.parts if p.name == name), MemoryPart(name, 0)) for o in outlooks]
        others = [
            f"{display.STRATEGIES[o.kind]}: {p.note}"
            for o, p in zip(outlooks, parts, strict=True)
            if p.note != parts[0].note
        ]
        notes = [parts[0].note, *others]
        table.add_row(name, *(f"{part.size_bytes / GB:.2f}" for part in parts), "; ".join(notes))
    return table
