"""Saving in parallel with training: a thread on each rank copies and writes while the next step computes gradients.

    every rank   begin a copy of its share into buffers kept from the last save; until it is there, no update
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

from llmtrain import checkpoint, files, jsonl, log
from llmtrain.config.schema import CheckpointSection
from llmtrain.errors import UserError, disk_errors, of_another_rank
from llmtrain.fragments import Fragment
from llmtrain.manifest import FileInfo, Manifest
from llmtrain.retention import Held, nothing_held
from llmtrain.rundir import RunDir
from llmtrain.strategies.interface import Strategy
from llmtrain.world import World

_NICENESS = 10


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
        held: Callable[[], Held] = nothing_held,
    ):
        """On rank 0's thread `on_published` is called after each save: other checkpoints may now be deleted; and `held`
        where there is no room for one."""
        self._held = held
        self._beyond_tensors = 0
        """Bytes of the last checkpoint beside its tensors: tokenizer, headers, manifest."""
        self._run, self._world, self._strategy = run, world, strategy
        self._write_model, self._rule, self._on_published = write_model, rule, on_published
        self._host = HostCopy(world.device)
        self._waited_s = 0.0
        """How long training has stood still for the save that was begun last."""
        self._told = True
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, described: Manifest, beside: bool = True) -> None:
        """Every rank calls it: begin the save of the state as it is now; `until_copied` belongs before it changes.

        Waits for the last save to end, and for the disk where `checkpoint.background` is off, or no training follows
        (not `beside`).

        Raises:
            DiskFull: the last save failed; on other ranks than 0, SystemExit with its code.
        """
        began = time.perf_counter()
        self.wait()
        beside = beside and self._rule.background
        weights = self._strategy.weights() if self._world.is_main else {}
        share = self._strategy.save_state()
        if beside:
            weights, share = self._host.begin(weights, share)
        else:  # host syncs: no step follows that they could delay
            weights = {name: tensor.cpu() for name, tensor in weights.items()}
            share = [Fragment(f.key, f.start, f.values.cpu()) for f in share]
        arguments = (described, weights, share, beside)
        self._waited_s, self._told = time.perf_counter() - began, False
        self._thread = threading.Thread(target=self._guarded, args=arguments, name="save", daemon=True)
        self._thread.start()
        if not beside:
            self.wait()
            self._waited_s = time.perf_counter() - began

    def until_copied(self) -> float | None:
        """Before the state changes: wait until what is being saved has been copied.

        Host sync on CPUs; a GPU's stream waits, its host does not. Returns how long training has waited for the last
        save in all, in s; None if that was returned before.
        """
        if self._told:
            return None
        began = time.perf_counter()
        self._host.wait()
        self._waited_s, self._told = self._waited_s + time.perf_counter() - began, True
        return self._waited_s

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

    def _guarded(self, described: Manifest, weights: dict[str, Tensor], share: list[Fragment], beside: bool) -> None:
        try:
            if self._world.device.type == "cuda":
                torch.cuda.set_device(self._world.device)  # a new thread's is the first GPU
            if beside:
                self._host.finish()
                if sys.platform == "linux":
                    # Of this thread alone: where training computes on the same cores it goes first.
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
            self._save(described, weights, share, beside)
        except BaseException as error:  # noqa: BLE001  `wait` raises it in the training thread
            self._error = error

    def _save(self, described: Manifest, weights: dict[str, Tensor], share: list[Fragment], beside: bool) -> None:
        began, world, step = time.perf_counter(), self._world, described.train_state.step
        folder = checkpoint.aside(self._run, step)
        if not world.is_main:
            has_room = world.wait_for(f"room-{step}")["found"]
            world.post(f"share-{step}-{world.rank}", self._report(folder, share) if has_room else {"files": {}})
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
        waited = f"{self._waited_s:.2f} s" if beside else "for it"
        jsonl.append(self._run.saves, [{"step": step, "wrote_s": round(wrote_s, 3)}])
        log.info(f"saved      step {step:,}{score} (written in {wrote_s:.1f} s, training waited {waited})")

    def _write_all(self, folder: Path, described: Manifest, weights: dict[str, Tensor], share: list[Fragment]) -> None:
        """On rank 0: its own part, then everybody's together."""
        world, step = self._world, described.train_state.step
        failed: Exception | None = None
        own: dict[str, FileInfo] = {}
        needed = _size_bytes(weights, []) + _size_bytes({}, share) * world.size
        try:
            with disk_errors(f"checkpoint of step {step}", self._run.checkpoints):
                self._await_room(step, needed + self._beyond_tensors)
                own = checkpoint.write_model(folder, weights, self._write_model)
                own |= checkpoint.write_share(folder, share, 0, world.size)
        finally:  # wait for the others in any case: they write into the same folder
            reports = [world.wait_for(f"share-{step}-{rank}") for rank in range(1, world.size)]
        for report in reports:
            if "exit_code" in report:
                failed = failed or of_another_rank(report["error"], report["exit_code"])
            else:
                own |= {name: FileInfo.model_validate(info) for name, info in report["files"].items()}
        if failed is not None:
            raise failed
        with disk_errors(f"checkpoint of step {step}", self._run.checkpoints):
            self._sync_records()
            checkpoint.publish(self._run, folder, described.model_copy(update={"files": dict(sorted(own.items()))}))
        self._beyond_tensors = max(0, sum(info.size_bytes for info in own.values()) - needed)
        self._on_published()

    def _await_room(self, step: int, needed: int) -> None:
        """On rank 0: then the others may write too. Training goes on meanwhile, up to the next save."""
        found = False
        try:
            checkpoint.await_room(self._run, needed, self._held)
            found = True
        finally:
            if self._world.size > 1:
                self._world.post(f"room-{step}", {"found": found})

    def _sync_records(self) -> None:
        """A power loss must not take the lines up to a checkpoint and leave the checkpoint."""
        for path in (self._run.metrics, self._run.heldout, self._run.samples):
            if path.exists():
                files.sync(path)
        files.sync(self._run.path)

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
    """Copies tensors into host memory that is kept: the first touch of fresh memory takes ten times as long.

    From a GPU by a stream of its own, into pinned memory; on a CPU by the thread that calls `finish`.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._buffers: dict[str, Tensor] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._done = threading.Event()
        self._done.set()

    def begin(self, weights: dict[str, Tensor], share: list[Fragment]) -> tuple[dict[str, Tensor], list[Fragment]]:
        """Where the copies will be; they are there after `finish`, and valid until the next call."""
        copies = {name: self._take(f"weights/{name}", tensor) for name, tensor in weights.items()}
        share_copies = [Fragment(f.key, f.start, self._take(f.name, f.values)) for f in share]
        self._done.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._copy()
                self._copied = torch.cuda.Event()
                self._copied.record(self._stream)
        return copies, share_copies

    def finish(self) -> None:
        """Wait until all is copied, or do it. In the saving thread."""
        try:
            if self._copied is not None:
                self._copied.synchronize()
            else:
                self._copy()
        finally:
            self._done.set()

    def wait(self) -> None:
        """Before the originals change."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        else:
            self._done.wait()

    def _copy(self) -> None:
        pairs, self._pairs = self._pairs, []
        for buffer, tensor in pairs:
            buffer.copy_(tensor, non_blocking=self._stream is not None)

    def _take(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None:
            pinned = self._stream is not None
            buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        self._pairs.append((buffer, tensor))
        return buffer


def _size_bytes(weights: dict[str, Tensor], share: list[Fragment]) -> int:
    return sum(tensor.nbytes for tensor in (*weights.values(), *(fragment.values for fragment in share)))
