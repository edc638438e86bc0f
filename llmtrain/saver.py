"""Saving beside training: the loop waits for a copy to host memory, a thread on each rank does the rest.

    every rank   copy its share into buffers kept from the last save
    its thread   write the share, sync, hash, tell rank 0
    rank 0's     write the model too, wait for all shares, publish, tell the others

The ranks' threads talk through the launcher's store, not through collectives: those belong to the
training thread. An error on any rank ends the save on all of them; nothing half-written stays.
"""

import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmtrain import checkpoint, log, rundir
from llmtrain.config.schema import CheckpointSection
from llmtrain.errors import ConfigError, UserError, disk_errors
from llmtrain.fragments import Fragment
from llmtrain.manifest import FileInfo, Manifest
from llmtrain.rundir import RunDir
from llmtrain.strategies.interface import Strategy
from llmtrain.world import World

_NICENESS = 10


def _error_of_another_rank(message: str, exit_code: int) -> Exception:
    """What rank 0 raises for a rank that could not write: the same kind of error, or a crash."""
    for kind in UserError.__subclasses__():
        if kind.exit_code == exit_code and kind is not ConfigError:
            return kind(message)
    return RuntimeError(message)


class Saver:
    """One for the whole run, on every rank."""

    def __init__(
        self,
        run: RunDir,
        world: World,
        strategy: Strategy,
        write_model: checkpoint.ModelWriter,
        rule: CheckpointSection,
        on_published: Callable[[], None],
    ):
        """`on_published` is called after each save, on rank 0's thread: other checkpoints may now be deleted."""
        self._run, self._world, self._strategy = run, world, strategy
        self._write_model, self._rule, self._on_published = write_model, rule, on_published
        self._host = HostCopy(pinned=world.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, described: Manifest, beside: bool = True) -> float:
        """Every rank calls it: begin the save of the state as it is now. Returns how long the caller waited, in s.

        Waits for the last save to end, then for the copy (a host sync), or for the disk where
        `checkpoint.background` is off, or no training follows (not `beside`).

        Raises:
            DiskFull: the last save failed; on other ranks than 0, SystemExit with its code.
        """
        began = time.perf_counter()
        self.wait()
        beside = beside and self._rule.background
        weights = self._strategy.weights() if self._world.is_main else {}
        share = self._strategy.save_state()
        if beside:
            weights, share = self._host.copy(weights, share)
        else:
            weights = {name: tensor.cpu() for name, tensor in weights.items()}
            share = [Fragment(f.key, f.start, f.values.cpu()) for f in share]
        waited = f"{time.perf_counter() - began:.2f} s" if beside else "for it"
        arguments = (described, weights, share, waited, beside)
        self._thread = threading.Thread(target=self._guarded, args=arguments, name="save", daemon=True)
        self._thread.start()
        if not beside:
            self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Until nothing is being saved. Not a collective, but a save ends on all ranks or on none.

        Raises:
            DiskFull: the save failed; on other ranks than 0, SystemExit with its code.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def has_failed(self) -> bool:
        """Whether `wait` would raise; the loop lets all ranks agree on it."""
        return self._error is not None

    def _guarded(
        self, described: Manifest, weights: dict[str, Tensor], share: list[Fragment], waited: str, beside: bool
    ) -> None:
        if sys.platform == "linux" and beside:
            # Of this thread alone: where training computes on the same cores it goes first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            self._save(described, weights, share, waited)
        except BaseException as error:  # noqa: BLE001  `wait` raises it in the training thread
            self._error = error

    def _save(self, described: Manifest, weights: dict[str, Tensor], share: list[Fragment], waited: str) -> None:
        began, world, step = time.perf_counter(), self._world, described.train_state.step
        folder = checkpoint.aside(self._run, step)
        if not world.is_main:
            world.post(f"share-{step}-{world.rank}", self._report(folder, share))
            outcome = world.wait_for(f"saved-{step}")
            if "exit_code" in outcome:
                raise SystemExit(outcome["exit_code"])
            return
        try:
            self._write_all(folder, described, weights, share)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if world.size > 1:
                world.post(f"saved-{step}", {"exit_code": error.exit_code if isinstance(error, UserError) else 1})
            raise
        if world.size > 1:
            world.post(f"saved-{step}", {})
        score = "" if described.heldout_loss is None else f", held-out loss {described.heldout_loss:.4f}"
        wrote_s = time.perf_counter() - began
        rundir.append_jsonl(self._run.saves, [{"step": step, "wrote_s": round(wrote_s, 3)}])
        log.info(f"saved      step {step:,}{score} (written in {wrote_s:.1f} s, training waited {waited})")

    def _write_all(self, folder: Path, described: Manifest, weights: dict[str, Tensor], share: list[Fragment]) -> None:
        """On rank 0: its own part, then everybody's together."""
        world, step = self._world, described.train_state.step
        failed: Exception | None = None
        own: dict[str, FileInfo] = {}
        try:
            with disk_errors(f"checkpoint of step {step}", self._run.checkpoints):
                checkpoint.check_room(self._run, _size_bytes(weights, []) + _size_bytes({}, share) * world.size)
                own = checkpoint.write_model(folder, weights, self._write_model)
                own |= checkpoint.write_share(folder, share, 0, world.size)
        finally:  # wait for the others in any case: they write into the same folder
            reports = [world.wait_for(f"share-{step}-{rank}") for rank in range(1, world.size)]
        for report in reports:
            if "exit_code" in report:
                failed = failed or _error_of_another_rank(report["error"], report["exit_code"])
            else:
                own |= {name: FileInfo.model_validate(info) for name, info in report["files"].items()}
        if failed is not None:
            raise failed
        with disk_errors(f"checkpoint of step {step}", self._run.checkpoints):
            checkpoint.publish(self._run, folder, described.model_copy(update={"files": dict(sorted(own.items()))}))
        self._on_published()

    def _report(self, folder: Path, share: list[Fragment]) -> dict[str, object]:
        """On the other ranks: write, and say what came of it."""
        world = self._world
        try:
            with disk_errors(f"checkpoint, rank {world.rank}", self._run.checkpoints):
                written = checkpoint.write_share(folder, share, world.rank, world.size)
        except UserError as error:
            return {"error": str(error), "exit_code": error.exit_code}
        except Exception as error:  # noqa: BLE001  rank 0 raises it
            log.warning(f"rank {world.rank} could not write its share:\n{traceback.format_exc()}")
            return {"error": f"rank {world.rank}: {type(error).__name__}: {error}", "exit_code": 1}
        return {"files": {name: info.model_dump() for name, info in written.items()}}


class HostCopy:
    """Copies tensors into host memory that is kept: the first touch of fresh memory takes ten times as long."""

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._buffers: dict[str, Tensor] = {}

    def copy(self, weights: dict[str, Tensor], share: list[Fragment]) -> tuple[dict[str, Tensor], list[Fragment]]:
        """Valid until the next call. Host sync."""
        copied = {name: self._take(f"weights/{name}", tensor) for name, tensor in weights.items()}
        copied_share = [Fragment(f.key, f.start, self._take(f.name, f.values)) for f in share]
        if self._pinned:
            torch.cuda.synchronize()
        return copied, copied_share

    def _take(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        return buffer.copy_(tensor, non_blocking=self._pinned)


def _size_bytes(weights: dict[str, Tensor], share: list[Fragment]) -> int:
    return sum(tensor.nbytes for tensor in (*weights.values(), *(fragment.values for fragment in share)))
