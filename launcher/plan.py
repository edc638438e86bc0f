"""`llmtrain plan`: what a run would take, before anything is started."""

import itertools
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from llmtrain import memory, recipe, shards
from llmtrain.base_facts import BaseFacts
from llmtrain.batches import BatchPlan, plan_batches
from llmtrain.config.data_sections import FolderTokenizer, TrainedTokenizer
from llmtrain.config.load import Origins, resolved_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError, UserError
from llmtrain.memory import Device, Part, Sizes
from llmtrain.memory_lora import LoraSizes
from llmtrain.shards import ShardManifest

KINDS = {"ddp": "DDP", "zero2": "ZeRO-2"}
_GB = 1e9
_SPARE = 0.95
"""Of a GPU's memory; allocators lose some of the rest to fragmentation."""


class UnknownBase(UserError):
    """What a base is made of cannot be had; leaves with the exit code of the process that asked."""

    def __init__(self, message: str, code: int):
        self.exit_code = code
        super().__init__(message)


@dataclass(frozen=True)
class Machine:
    device: Device
    ranks: int
    memory_bytes: float
    """That one rank may take."""
    told: str


def find_machine(gpus: int, gpu_memory_gb: float | None, device: str) -> Machine:
    """The GPUs that were described, or that are here; without any, this machine's CPU."""
    if device == "cpu" or (device == "auto" and gpu_memory_gb is None and _gpu_memory() is None):
        total = float(psutil.virtual_memory().total)
        return Machine("cpu", gpus, total / gpus, f"{total / _GB:.0f} GB of host memory, {_ranks(gpus)}")
    size = gpu_memory_gb * _GB if gpu_memory_gb is not None else _gpu_memory()
    if size is None:
        raise ConfigError(["there is no GPU on this machine to ask: give --gpu-memory in GB, or --device cpu"])
    return Machine("cuda", gpus, size, f"{gpus} GPU{'s' * (gpus > 1)} with {size / _GB:.0f} GB")


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _gpu_memory() -> float | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        return float(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).total)
    except pynvml.NVMLError:
        return None


def uses_bf16(config: RunConfig, device: Device) -> bool:
    """As training decides it."""
    if config.train.precision != "auto":
        return config.train.precision == "bf16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if device == "cpu" and cpuinfo.exists() else ""
    return device == "cuda" or "avx512_bf16" in flags or "amx_bf16" in flags


def vocab_size(config: RunConfig, told: int | None, built: ShardManifest | None) -> int:
    """As told; else from the shards if they are built, else from the tokenizer's settings.

    Raises:
        ConfigError: it would take a download to know.
    """
    if told is not None:
        return told
    if built is not None:
        return built.tokenizer.vocab_size
    tokenizer = config.data.tokenizer
    if isinstance(tokenizer, TrainedTokenizer):
        return tokenizer.vocab_size
    if isinstance(tokenizer, FolderTokenizer):
        from tokenizers import Tokenizer

        path = Path(tokenizer.path) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError([f"data.tokenizer.path={tokenizer.path}: there is no tokenizer.json in it"])
        return Tokenizer.from_file(str(path)).get_vocab_size()
    raise ConfigError(
        [
            f"the vocabulary of {tokenizer.name} is not known yet: "
            "run 'llmtrain shard CONFIG' first, or give --vocab-size"
        ]
    )


@dataclass(frozen=True)
class Outlook:
    """What `plan` says about one way to run."""

    kind: str
    parts: list[Part]

    @property
    def total(self) -> float:
        return sum(part.size_bytes for part in self.parts)


def find_sizes(config: RunConfig, vocabulary: int | None, base: str | None, built: ShardManifest | None) -> Sizes:
    """How large the configured model is. For a base, a process of the core's asks transformers (no weights are read).

    Raises:
        ConfigError: it would take a download to know.
        UnknownBase: the base cannot be asked.
    """
    model = config.model
    if model.kind == "gpt":
        return memory.GPTSizes(model, vocab_size(config, vocabulary, built))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "config.yaml"
        file.write_text(resolved_yaml(config), encoding="utf-8")
        told = [] if base is None else [f"model.base={base}"]
        command = [sys.executable, "-m", "llmtrain.inspect_base", str(file), *told]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        hint = "" if base else "; where it cannot be reached, give --base-config FOLDER with its config.json"
        said = done.stderr.strip().removeprefix("error: ")
        raise UnknownBase(f"{said}\nwhat {model.base} is made of is not known{hint}", done.returncode)
    return LoraSizes(model, BaseFacts.from_json(done.stdout.splitlines()[-1]))


def outlook(config: RunConfig, sizes: Sizes, plan: BatchPlan, machine: Machine, kind: str) -> Outlook:
    bf16 = uses_bf16(config, machine.device)
    parts = sizes.estimate(config, plan, machine.ranks, kind, bf16, machine.device)
    if machine.device == "cpu":  # GPUs' copies for saving are in host memory
        copy = sizes.host_copy(config, machine.ranks)
        parts.append(Part("save buffers", copy, "checkpoint.background: host copy of what is written"))
    return Outlook(kind, parts)


def remedies(
    config: RunConfig, origins: Origins, sizes: Sizes, plan: BatchPlan, machine: Machine, rows: int
) -> list[str]:
    """The smallest changes with which the run would fit, as settings for the command line."""
    micros = [m for m in range(plan.micro_batch_size, 0, -1) if plan.global_batch_size // machine.ranks % m == 0]
    found: dict[tuple[str, str, bool], str] = {}  # the largest micro-batch of each kind of change
    choices = itertools.product(("none", "cpu"), micros, (False, True), KINDS)
    for offload, micro, recompute, kind in sorted(choices, key=lambda c: (c[0] == "cpu", c[2], -c[1])):
        if config.optim.kind != "adamw" and kind == "zero2":
            continue
        if (offload == "cpu" and (kind == "ddp" or machine.device == "cpu")) or (kind, offload, recompute) in found:
            continue
        changed = _changed(config, kind, micro, recompute, offload)
        replanned = plan_batches(changed, origins, machine.ranks, rows)
        if outlook(changed, sizes, replanned, machine, kind).total <= _SPARE * machine.memory_bytes:
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


def _changed(config: RunConfig, kind: str, micro: int, recompute: bool, offload: str) -> RunConfig:
    strategy: Any = {"kind": kind, "offload_optimizer": offload}
    return config.model_copy(
        update={
            "strategy": config.strategy.model_copy(update=strategy),
            "train": config.train.model_copy(update={"micro_batch_size": micro, "activation_checkpointing": recompute}),
        }
    )


@dataclass(frozen=True)
class Told:
    """What the user says that cannot be known yet."""

    vocab_size: int | None = None
    samples: int | None = None
    """Training samples."""
    base_config: str | None = None
    """A folder with the base's config.json."""


def count_rows(config: RunConfig, told: Told, built: ShardManifest | None) -> tuple[int | None, str]:
    """Rows of the training split, if they are known, and where from.

    Raises:
        ConfigError: samples were counted that will be packed into an unknown number of rows.
    """
    folder = recipe.shard_folder(config)
    if told.samples is None:
        rows = None if built is None else built.splits["train"].rows
        return rows, f"not sharded yet ({folder}): no row count" if rows is None else f"{rows:,} rows in {folder}"
    if config.data.packing != "none":
        raise ConfigError(
            [
                f"--samples {told.samples}: with data.packing={config.data.packing} a row holds several samples; the "
                "number of rows is known once 'llmtrain shard' has run (data.packing=none: one sample a row)"
            ]
        )
    return told.samples, f"{told.samples:,} training samples, one a row (as you say)"


def show(config: RunConfig, origins: Origins, machine: Machine, told: Told, console: Console) -> bool:
    """Print the plan; returns whether the configured run fits."""
    folder = recipe.shard_folder(config)
    built = shards.open_folder(folder, "size").manifest if shards.exists(folder) else None
    rows, data = count_rows(config, told, built)
    sizes = find_sizes(config, told.vocab_size, told.base_config, built)
    plan = plan_batches(config, origins, machine.ranks, rows if rows is not None else 2**62)

    def say(name: str, text: str) -> None:
        console.print(f"{name:<12} {text}", highlight=False, soft_wrap=True)

    say("model", sizes.title)
    say("data", data)
    say(
        "batch",
        f"{plan.global_batch_size} rows = {_ranks(machine.ranks)} x {plan.micro_batch_size} x {plan.accumulation}",
    )
    if rows is None and config.train.epochs is not None:
        say("steps", f"{config.train.epochs:g} epochs; the number is known once 'llmtrain shard' has run")
    else:
        tokens = plan.total_steps * plan.global_batch_size * config.model.context
        epochs = "" if rows is None else f", {plan.total_steps * plan.global_batch_size / rows:.2f} epochs"
        say("steps", f"{plan.total_steps:,}, {tokens:,} tokens{epochs}")
    kept, size = config.checkpoint.keep_last + config.checkpoint.keep_best, sizes.checkpoint_bytes(config) / _GB
    forever = "" if config.checkpoint.keep_every is None else f", and every {config.checkpoint.keep_every}th for good"
    say(
        "disk",
        f"{size:.2f} GB a checkpoint, {size * (kept + 1):.1f} GB with {kept} kept and one being written{forever}",
    )

    outlooks = [outlook(config, sizes, plan, machine, kind) for kind in KINDS]
    console.print(_table(outlooks, machine))
    chosen = next(o for o in outlooks if o.kind == config.strategy.kind)
    taken = f"takes {chosen.total / _GB:.2f} of {machine.memory_bytes / _GB:.1f} GB"
    if chosen.total <= _SPARE * machine.memory_bytes:
        say("fits", f"{KINDS[chosen.kind]} {taken}")
        return True
    say("too large", f"{KINDS[chosen.kind]} {taken}")
    ways = remedies(config, origins, sizes, plan, machine, rows if rows is not None else 2**62)
    for way in ways:
        say("  it fits with", way)
    if not ways:
        say(
            "  ", "no setting here makes it fit: use a smaller model, a shorter model.context, or more GPUs with ZeRO-2"
        )
    return False


def _table(outlooks: list[Outlook], machine: Machine) -> Table:
    table = Table(title=f"Memory of one rank at its peak, GB ({machine.told})", title_justify="left", show_footer=True)
    names = list(dict.fromkeys(part.name for o in outlooks for part in o.parts))
    table.add_column("", footer="total")
    for o in outlooks:
        full = o.total > _SPARE * machine.memory_bytes
        footer = f"[red]{o.total / _GB:.2f}, too large[/red]" if full else f"[green]{o.total / _GB:.2f}[/green]"
        table.add_column(KINDS[o.kind], footer=footer, justify="right")
    table.add_column("", style="dim", overflow="fold")
    for name in names:
        parts = [next((p for p in o.parts if p.name == name), Part(name, 0)) for o in outlooks]
        notes = [parts[0].note] if parts[0].note == parts[1].note else [parts[0].note, f"ZeRO-2: {parts[1].note}"]
        table.add_row(name, *(f"{part.size_bytes / _GB:.2f}" for part in parts), "; ".join(notes))
    return table
