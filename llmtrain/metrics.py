"""The figures of each step: kept on the device, read in one go, written to the ledger and TensorBoard."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain import log, rundir
from llmtrain.batches import BatchPlan
from llmtrain.errors import NotFinite
from llmtrain.hardware import HardwareMeter, peak_flops
from llmtrain.manifest import TrainState
from llmtrain.progress import Progress, Reading
from llmtrain.rundir import RunDir
from llmtrain.tensorboard import TensorBoard
from llmtrain.world import World


@dataclass(frozen=True)
class _Step:
    state: TrainState
    targets: int
    digest: int
    lr: float
    loss_sum: Tensor  # on the device; this rank's part
    grad_norm: Tensor  # on the device; the same on every rank


class Meter:
    """Collects the steps since the last `flush`. All ranks have one; rank 0's writes."""

    def __init__(
        self,
        run: RunDir,
        world: World,
        tensorboard: TensorBoard | None,
        progress: Progress,
        plan: BatchPlan,
        rows_per_epoch: int,
        tokens_per_row: float,
        flops_per_token: float,
    ):
        self._run, self._world, self._tensorboard, self._progress = run, world, tensorboard, progress
        self._plan, self._rows_per_epoch, self._tokens_per_row = plan, rows_per_epoch, tokens_per_row
        self._flops_per_token = flops_per_token
        self._hardware = HardwareMeter(world.device)
        peak = peak_flops(world.device)
        self._peak_flops = None if peak is None else peak * world.size
        self._pending: list[_Step] = []
        self._heldout: float | None = None
        self._waited_s = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what lies between the last `flush` and now (evaluating, saving) out of tokens/s."""
        self._since = time.perf_counter()

    def observe(
        self, state: TrainState, targets: int, digest: int, lr: float, loss_sum: Tensor, grad_norm: Tensor
    ) -> None:
        """Remember a step. Reads nothing from the device."""
        self._pending.append(_Step(state, targets, digest, lr, loss_sum, grad_norm))

    def flush(self, data_wait_s: float) -> None:
        """Collective (control group), and the loop's one host sync: read and write the steps since the last flush.

        Raises:
            NotFinite: on every rank, if a loss or a gradient norm is not a finite number.
        """
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        on_device = torch.stack([s.loss_sum.float() for s in steps] + [s.grad_norm.float() for s in steps])
        sums = on_device.cpu().double()  # host sync
        loss_sums = self._world.sum_doubles(sums[: len(steps)].clone()).tolist()
        norms = sums[len(steps) :].tolist()
        now = time.perf_counter()
        seconds, self._since = now - self._since, now  # the writing below counts as part of the next step
        waited_s, self._waited_s = data_wait_s - self._waited_s, data_wait_s
        records: list[dict[str, Any]] = [
            {
                "step": s.state.step,
                "epoch": s.state.samples / self._rows_per_epoch,
                "loss": loss_sum / max(1, s.targets),
                "grad_norm": norm,
                "lr": s.lr,
                "targets": s.state.targets,
                "samples": s.state.samples,
                "digest": f"{s.digest:016x}",
            }
            for s, loss_sum, norm in zip(steps, loss_sums, norms, strict=True)
        ]
        if self._world.is_main:
            self._write(records, seconds, waited_s)
        for record in records:
            if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
                raise NotFinite(
                    f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}; stopped. "
                    "The checkpoints saved so far are finite. A lower optim.lr, a longer "
                    "optim.schedule.warmup_steps or optim.clip_norm=1.0 usually helps"
                )

    def _write(self, records: list[dict[str, Any]], seconds: float, waited_s: float) -> None:
        last = records[-1]
        tokens_per_s = len(records) * self._plan.global_batch_size * self._tokens_per_row / seconds
        rundir.append_jsonl(self._run.metrics, records)
        if self._tensorboard is not None:
            for record in records:
                names = {
                    "loss": "train/loss",
                    "lr": "train/lr",
                    "grad_norm": "train/grad_norm",
                    "epoch": "train/epoch",
                }
                scalars = {tag: record[key] for key, tag in names.items()}
                self._tensorboard.scalars(record["step"], {**scalars, "train/targets_seen": record["targets"]})
            speed = {
                "speed/tokens_per_s": tokens_per_s,
                "speed/step_ms": 1e3 * seconds / len(records),
                "speed/data_wait_ms": 1e3 * waited_s / len(records),
            }
            if self._peak_flops is not None:
                speed["speed/mfu"] = tokens_per_s * self._flops_per_token / self._peak_flops
            self._tensorboard.scalars(last["step"], {**speed, **self._hardware.read()})
        left = (self._plan.total_steps - last["step"]) * seconds / len(records)
        self._progress.show(
            Reading(last["step"], self._plan.total_steps, last["loss"], self._heldout, tokens_per_s, left)
        )

    def heldout(self, state: TrainState, record: dict[str, Any]) -> None:
        """Write an evaluation: the ledger first, then its view."""
        self._heldout = record["loss"]
        if not self._world.is_main:
            return
        self._progress.show_heldout(record["loss"])
        if not state.step:
            log.info(f"held-out   loss {record['loss']:.4f} before the first step")
        epoch = state.samples / self._rows_per_epoch
        entry = {"step": state.step, "epoch": epoch, "targets": state.targets, **record}
        rundir.append_jsonl(self._run.heldout, [entry])
        if self._tensorboard is not None:
            self._tensorboard.scalars(state.step, {f"heldout/{name}": value for name, value in record.items()})

    def save_waited(self, state: TrainState, seconds: float) -> None:
        """Note how long training stood still for a checkpoint."""
        if self._tensorboard is not None:
            self._tensorboard.scalars(state.step, {"speed/save_wait_s": seconds})

    def sample(self, state: TrainState, prompt: str, text: str) -> None:
        """Write a generated text. It came out of a model, so it is shown as quoted code."""
        rundir.append_jsonl(self._run.samples, [{"step": state.step, "prompt": prompt, "text": text}])
        if self._tensorboard is not None:
            quoted = "\n".join("    " + line for line in (prompt + text).splitlines())
            self._tensorboard.text(state.step, "samples", quoted)

    def close(self) -> None:
        """Leave the last progress line standing and everything written."""
        self._progress.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
