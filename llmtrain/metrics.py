"""The figures of each step: kept on the device, read in one go, written to the ledger and TensorBoard."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain import jsonl, log
from llmtrain.batches import BatchPlan
from llmtrain.errors import NotFinite
from llmtrain.hardware import HardwareMeter, peak_flops
from llmtrain.manifest import TrainState
from llmtrain.progress import Progress, Reading
from llmtrain.rundir import RunDir
from llmtrain.tensorboard import TensorBoard
from llmtrain.world import World

_TAGS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "targets": "train/targets_seen",
}
_WRITE_EVERY_S = 0.5
"""Files are written at most so often: to open and close one takes longer than a small step on a shared file system."""


@dataclass(frozen=True)
class _Step:
    state: TrainState
    targets: int
    digest: int
    lr: float
    loss_sum: Tensor  # on the device; this rank's part
    grad_norm: Tensor  # on the device; the same on every rank


@dataclass(frozen=True)
class _Flushed:
    """Steps that were read together, and the time of day at which that was."""

    records: list[dict[str, Any]]
    at: float
    since_began_s: float
    """Since this process began training, with all that went on between steps."""
    step_s: float
    tokens_per_s: float
    waited_s: float


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
        bf16: bool,
    ):
        self._run, self._world, self._tensorboard, self._progress = run, world, tensorboard, progress
        self._plan, self._rows_per_epoch, self._tokens_per_row = plan, rows_per_epoch, tokens_per_row
        self._flops_per_token = flops_per_token
        self._hardware = HardwareMeter(world.device)
        peak = peak_flops(world.device) if bf16 else None  # of bf16: what computes in fp32 cannot come near it
        self._peak_flops = None if peak is None else peak * world.size
        self.has_observed = False
        """Whether this process has done a step."""
        self._pending: list[_Step] = []
        self._unwritten: list[_Flushed] = []
        self._last_write = time.monotonic()
        self._heldout: tuple[int, float] | None = None
        self._waited_s = 0.0
        self._steps_before = 0
        """Steps of the run that other processes did."""
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what lies between the last `flush` and now (evaluating, saving) out of tokens/s; before the first step,
        which is when training begins, out of all."""
        self._since = time.perf_counter()
        if not self.has_observed:
            self._began = self._since

    def observe(
        self, state: TrainState, targets: int, digest: int, lr: float, loss_sum: Tensor, grad_norm: Tensor
    ) -> None:
        """Remember a step. Reads nothing from the device."""
        if not self.has_observed:
            self.has_observed, self._steps_before = True, state.step - 1
        self._pending.append(_Step(state, targets, digest, lr, loss_sum, grad_norm))

    def flush(self, data_wait_s: float, at_once: bool) -> None:
        """Collective (control group), and a host sync: read the steps since the last flush.

        They are written now and then; `at_once`, because something is about to build on them, or at the end.

        Raises:
            NotFinite: on every rank, if a loss or a gradient norm is not a finite number.
        """
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        on_device = torch.stack([s.loss_sum.float() for s in steps] + [s.grad_norm.float() for s in steps])
        # Few operations: at each the loader's thread may take the interpreter.
        values: list[float] = on_device.tolist()  # host sync
        loss_sums, norms = self._world.sum_floats(values[: len(steps)]), values[len(steps) :]
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
            tokens_per_s = len(steps) * self._plan.global_batch_size * self._tokens_per_row / seconds
            self._unwritten.append(
                _Flushed(records, time.time(), now - self._began, seconds / len(steps), tokens_per_s, waited_s)
            )
            if at_once or time.monotonic() - self._last_write >= _WRITE_EVERY_S:
                self.write()
        for record in records:
            if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
                self.write()
                raise NotFinite(
                    f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}; stopped. "
                    "A lower optim.lr, a longer optim.schedule.warmup_steps or optim.clip_norm=1.0 usually helps"
                )

    def write(self) -> None:
        """What was read since the last time: to the ledger, to TensorBoard, to the terminal."""
        self._last_write = time.monotonic()
        if not self._unwritten:
            return
        flushed, self._unwritten = self._unwritten, []
        jsonl.append(self._run.metrics, [record for part in flushed for record in part.records])
        newest, last = flushed[-1], flushed[-1].records[-1]
        if self._tensorboard is not None:
            for part in flushed:
                self._show(self._tensorboard, part, with_hardware=part is newest)
            self._tensorboard.flush()
        # Evaluations and saves are still to come too, so they count here, as in `llmtrain status`.
        pace_s = newest.since_began_s / (last["step"] - self._steps_before)
        left = (self._plan.total_steps - last["step"]) * pace_s
        self._progress.show(
            Reading(last["step"], self._plan.total_steps, last["loss"], self._heldout, newest.tokens_per_s, left)
        )

    def _show(self, board: TensorBoard, part: _Flushed, with_hardware: bool) -> None:
        for record in part.records:
            values = {tag: record[key] for key, tag in _TAGS.items()}
            if record is part.records[-1]:
                values |= self._speeds(part)
                if with_hardware:
                    values |= self._hardware.read()
            board.scalars(record["step"], values, part.at)

    def _speeds(self, part: _Flushed) -> dict[str, float]:
        values = {
            "speed/tokens_per_s": part.tokens_per_s,
            "speed/step_ms": 1e3 * part.step_s,
            "speed/data_wait_ms": 1e3 * part.waited_s / len(part.records),
        }
        if self._peak_flops is not None:
            values["speed/mfu"] = part.tokens_per_s * self._flops_per_token / self._peak_flops
        return values

    def heldout(self, state: TrainState, record: dict[str, Any]) -> None:
        """Write an evaluation: the ledger first, then its view."""
        self._heldout = state.step, record["loss"]
        if not self._world.is_main:
            return
        self._progress.show_heldout(*self._heldout)
        if not state.step:
            log.info(f"held-out   loss {record['loss']:.4f} before the first step")
        epoch = state.samples / self._rows_per_epoch
        entry = {"step": state.step, "epoch": epoch, "targets": state.targets, **record}
        jsonl.append(self._run.heldout, [entry])
        if self._tensorboard is not None:
            self._tensorboard.scalars(state.step, {f"heldout/{name}": value for name, value in record.items()})
            self._tensorboard.flush()

    def save_waited(self, state: TrainState, seconds: float) -> None:
        """Note how long training stood still for a checkpoint."""
        if self._tensorboard is not None:
            self._tensorboard.scalars(state.step, {"speed/save_wait_s": seconds})

    def sample(self, state: TrainState, prompt: str, text: str) -> None:
        """Write a generated text. It came out of a model, so it is shown as quoted code."""
        jsonl.append(self._run.samples, [{"step": state.step, "prompt": prompt, "text": text}])
        if self._tensorboard is not None:
            quoted = "\n".join("    " + line for line in (prompt + text).splitlines())
            self._tensorboard.text(state.step, "samples", quoted)

    def close(self) -> None:
        """Leave the last progress line standing and everything written."""
        self.write()
        self._progress.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
