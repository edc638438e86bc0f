"""`python -m llmtrain.service.validate RUN --steps N ...`: load checkpoints from disk and score a split.

A process of its own: the service does not hold a model in memory, and a model that cannot be loaded ends nothing
but this. Each score is a line of JSON on standard output; the losses by stretch are in the run folder by then.
"""

import argparse
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain import devices, files, intervals, jsonl, ledger, manifest, origin, ranking, recipe, shards
from llmtrain.config import RunConfig, load_config
from llmtrain.data import IGNORE, Batch, make_batch
from llmtrain.errors import CheckpointError, ConfigError, disk_errors, exit_with_code
from llmtrain.evaluate import SplitLoss
from llmtrain.hardware import is_bf16_fast
from llmtrain.intervals import Losses
from llmtrain.models import build_model
from llmtrain.rundir import RunDir
from llmtrain.service.reserve import SCORE_BYTES
from llmtrain.shards import Rows, ShardSet
from llmtrain.strategies.forward import autocast

_FEW_ROWS = 256
"""With fewer rows than this, each is cut into several stretches."""
_SHORTEST = 16
_MANY_STRETCHES = 1 << 16
"""Limit in runs recorded before MAX_UNITS applied to recording too; they keep it: their losses stay comparable."""
_SCORES_AGAIN = "it scores anew"

TokenLosses = Callable[[Batch], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m llmtrain.service.validate", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", required=True)
    parser.add_argument("--split", choices=["heldout", "test"], default="heldout")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--asked-by", default="--device", help="the option or setting that names the device")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    with exit_with_code():
        run = RunDir(options.run.resolve())
        device = devices.take(options.device, f"{options.asked_by}={options.device}")
        origin.enter(run)
        if options.threads:
            torch.set_num_threads(options.threads)
        config, _ = load_config(run.config)
        is_test = options.split == "test"  # asked for by a person, once; the service records the others
        if is_test:
            see_that_scores_can_be_kept(run)
        for score in validate(run, config, options.steps, options.split, device):
            if is_test:
                with disk_errors("scores", run.service, then=_SCORES_AGAIN):
                    ledger.append(run.scores, score)
            sys.stdout.write(json.dumps(score.model_dump(mode="json")) + "\n")
            sys.stdout.flush()


def see_that_scores_can_be_kept(run: RunDir) -> None:
    """Before hours of scoring.

    Raises:
        DiskFull, RunFolderError: they could not be written down.
    """
    losses = run.losses(0, "", "test").parent
    with disk_errors("scores", run.service, then=_SCORES_AGAIN):
        for folder in (losses.parent, losses):
            folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=losses) as probe:
            probe.write(bytes(SCORE_BYTES))
        if run.scores.exists():
            run.scores.open("ab").close()


def computes_in_bf16(config: RunConfig, device: torch.device) -> bool:
    """A GPT in fp32 where bf16 is slow; a base with LoRA in what its parts were made for, whatever it costs."""
    return config.train.precision == "bf16" and (config.model.kind == "qlora" or is_bf16_fast(device))


def recorded_precision(run: RunDir) -> str | None:
    """Of the run's first score; the others follow it on whatever device.

    A loss in bf16 and one in fp32 differ by rounding, and ranking, `keep_best` and `main` compare all of a run.
    """
    scores = (ledger.Score.model_validate(record) for record in jsonl.read(run.scores))
    return next((found for score in scores if (found := ranking.precision(score)) in ("fp32", "bf16")), None)


def validate(
    run: RunDir, config: RunConfig, steps: list[int], split: ledger.Split, device: torch.device
) -> Iterator[ledger.Score]:
    """Score these checkpoints, one after the other.

    Raises:
        ConfigError: there is no such split.
        CheckpointError: one cannot be loaded, or was trained on other data than the shards that are there.
    """
    data = shards.open_folder(recipe.shard_folder(config), "size")
    if split not in data.manifest.splits or not data.manifest.splits[split].rows:
        raise ConfigError([f"data.split.{split}=0: there is no {split} split to score; set it and train anew"])
    rows = data.split(split)
    recorded = recorded_precision(run)
    bf16 = computes_in_bf16(config, device) if recorded is None else recorded == "bf16"
    most = most_stretches(run, split)
    model = build_model(config, data.manifest.tokenizer.vocab_size, device, is_loaded_next=True)
    batch_size = config.service.batch_size or config.evaluate.batch_size or config.train.micro_batch_size or 8

    def token_losses(batch: Batch) -> Tensor:
        moved = batch.to(device)
        with autocast(device, bf16):
            return model.token_losses(moved.input_ids, moved.targets, moved.documents, moved.positions)

    for step in steps:
        began = time.perf_counter()
        folder = run.checkpoint(step)
        described = manifest.read(folder)
        if described.fingerprint != data.fingerprint:
            raise CheckpointError(f"{folder} was trained on other data than the shards in {data.path}")
        model.load(folder / "model")
        model.to(device).eval()
        losses = intervals.merged(by_stretch(token_losses, rows, batch_size, config), most)
        checkpoint = manifest.identity(described)
        write_losses(run.losses(step, checkpoint, split), losses)
        result = SplitLoss(losses[0].sum() / max(1.0, losses[1].sum()), int(losses[1].sum()))
        if not math.isfinite(result.loss):
            raise CheckpointError(f"{folder}: its {split} loss is {result.loss}")
        yield ledger.Score(
            step=step,
            checkpoint=checkpoint,
            split=split,
            loss=result.loss,
            perplexity=result.perplexity,
            bits_per_byte=result.bits_per_byte(rows.info),
            targets=result.targets,
            epoch=described.epoch,
            origin="disk",
            how=f"{device} {'bf16' if bf16 else 'fp32'}",
            seconds=time.perf_counter() - began,
        )


def by_stretch(token_losses: TokenLosses, split: ShardSet, batch_size: int, config: RunConfig) -> Losses:
    """(2, S) float64: loss sum and supervised tokens of each stretch of the split, in order.

    A stretch is a document where rows hold whole ones (a sample, when fine-tuning), else a row, or a part of one
    where there are few rows.
    """
    isolate = config.data.isolates_documents
    parts = 1 if config.data.packing != "contiguous" else math.ceil(_FEW_ROWS / split.num_rows)
    width = max(_SHORTEST, math.ceil(split.context / parts))
    found: list[Losses] = []
    for first in range(0, split.num_rows, batch_size):
        rows = split.rows(np.arange(first, min(first + batch_size, split.num_rows)))
        batch = make_batch(rows, isolate)
        losses_BT = token_losses(batch).double().cpu().numpy()  # host sync
        supervised_BT = (batch.targets != IGNORE).numpy().astype(np.float64)
        for number, losses_T in enumerate(losses_BT):
            bounds = stretch_starts(rows, number, losses_T.shape[0], width, isolate)
            found.append(np.stack([np.add.reduceat(v, bounds) for v in (losses_T, supervised_BT[number])]))
    joined = np.concatenate(found, axis=1)
    return joined[:, joined[1] > 0]


def most_stretches(run: RunDir, split: ledger.Split) -> int:
    """As many as a comparison tells apart; where more are recorded of this run, what they were cut by.

    Only checkpoints with the same stretches are compared.
    """
    recorded = next(run.losses(0, "", split).parent.glob(f"*-{split}.npy"), None)
    if recorded is None or np.load(recorded, mmap_mode="r").shape[1] <= intervals.MAX_UNITS:
        return intervals.MAX_UNITS
    return _MANY_STRETCHES


def stretch_starts(rows: Rows, number: int, length: int, width: int, by_document: bool) -> NDArray[np.int64]:
    """Positions (of targets) at which the stretches of one row begin."""
    if not by_document:
        return np.arange(0, length, width)
    starts = np.concatenate([[0], np.cumsum(rows.doc_lens[number])[:-1]])
    return np.unique(np.clip(starts, 0, length - 1))


def write_losses(path: Path, losses: Losses) -> None:
    content = io.BytesIO()
    np.save(content, losses, allow_pickle=False)
    with disk_errors("score", path.parent, then=_SCORES_AGAIN):  # the exit code tells the service that there is no room
        for folder in (path.parent.parent, path.parent):  # not the run's own, where that has gone meanwhile
            folder.mkdir(exist_ok=True)
        files.write_atomic(path, content.getvalue())


if __name__ == "__main__":
    main()
