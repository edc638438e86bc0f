"""Processes that share the work of a build: they ignore Ctrl-C, and do not outlive the one that started them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from llmtrain.errors import UserError

_T = TypeVar("_T")

RunAll = Callable[[Callable[[Any], _T], list[Any]], Iterable[_T]]


@contextlib.contextmanager
def processes(workers: int) -> Iterator[RunAll[Any]]:
    """A function that runs jobs, in this process if there is one worker, and yields results as they come."""
    if workers == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")  # fork is not safe beside the threads of tokenizers and pyarrow
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_leave_with_parent)

    def run_all(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        with _ctrl_c_blocked():  # submitting starts the workers
            futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a sharding process was killed, probably for want of memory; what is finished is kept: run the same "
                "command again with fewer --workers"
            ) from None

    try:
        yield run_all
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which is the main process's to handle; it gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_with_parent() -> None:
    """In a worker: if the main process is killed, do not stay behind."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
