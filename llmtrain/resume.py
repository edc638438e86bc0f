"""What may be resumed, and in which precision: asked before a job is queued, and again when training starts."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from llmtrain import retention
from llmtrain.config.explain import COMMAND_LINE, Origins, show
from llmtrain.config.load import load_config, with_precision
from llmtrain.config.schema import RunConfig
from llmtrain.config.section import MAY_CHANGE
from llmtrain.errors import CheckpointError, ConfigError, RunFolderError
from llmtrain.rundir import RunDir


def check(run: RunDir, config: RunConfig, origins: Origins) -> RunConfig | None:
    """What the run was configured as, where `config` goes on with checkpoints of it; None where it begins. Changes
    nothing.

    Raises:
        RunFolderError: the run folder holds checkpoints of another configuration, or one that cannot be read.
        CheckpointError: there is nothing to resume from although there has to be.
    """
    if config.run.resume == "never":
        return None
    if (why := retention.why_none_left(run)) is not None:
        raise CheckpointError(why)
    if not run.checkpoint_steps():
        if config.run.resume == "must":
            raise CheckpointError(
                f"{origins.describe(config, 'run.resume')}: {run.checkpoints} holds no checkpoint to resume from"
            )
        return None
    try:
        before, _ = load_config(run.config)
    except ConfigError as error:
        raise RunFolderError(
            f"{run.config}: not readable by this version, so nothing can be resumed: {error}"
        ) from None
    now = with_precision(config, settled_precision(config, before, is_bf16_fast=False))
    if differences := fixed_differences(before, now):
        lines = [
            f"  - {key}: the run has {old}, now {new} ({origins.of(tuple(key.split('.')))})"
            for key, old, new in differences
        ]
        raise RunFolderError(
            f"{run.path} holds checkpoints of another configuration:\n" + "\n".join(lines) + "\nResume with the old "
            f"values, or give this run a name of its own (run.name=..., {COMMAND_LINE}), or start anew with "
            "run.resume=never (the old folder is moved aside)"
        )
    return before


def settled_precision(config: RunConfig, before: RunConfig | None, is_bf16_fast: bool) -> str:
    """fp32 or bf16: what `train.precision` comes to where it is auto.

    A run that resumes stays in what it began in: a requeued job may get a node with another processor.

    Args:
        before: what the run that resumes was configured as; None: it begins.
        is_bf16_fast: of the hardware; matters where a run begins.
    """
    if config.train.precision != "auto":
        return config.train.precision
    if before is not None:
        return before.train.precision
    base_needs_fp32 = config.model.kind == "qlora" and config.model.compute_dtype == "fp32"
    return "bf16" if is_bf16_fast and not base_needs_fp32 else "fp32"


def fixed_differences(old: RunConfig, new: RunConfig) -> list[tuple[str, str, str]]:
    """(key, old value, new value) of every difference that a resumed run must not have."""

    def walk(a: Any, b: Any, path: str) -> Iterator[tuple[str, str, str]]:
        if isinstance(a, BaseModel) and type(a) is type(b):
            for name, info in type(a).model_fields.items():
                extra = info.json_schema_extra
                if not (isinstance(extra, dict) and extra.items() >= MAY_CHANGE.items()):
                    yield from walk(getattr(a, name), getattr(b, name), f"{path}.{name}" if path else name)
        elif a != b:
            yield path, show(a), show(b)

    return list(walk(old, new, ""))
