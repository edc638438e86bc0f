"""`python -m llmtrain.finish RUN`: the end of a run: wait for the checkpoint service, sum up, write the report.

Rank 0 becomes this process when training has ended: its GPU and its memory are free for the service by then.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmtrain import early_stop, log, origin, summary
from llmtrain.config import load_config
from llmtrain.errors import disk_errors, exit_with_code
from llmtrain.ledger import drain_command
from llmtrain.rundir import RunDir
from llmtrain.service.beside import Companion


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m llmtrain.finish", description=__doc__)
    parser.add_argument("run", type=Path)
    run = RunDir(parser.parse_args(arguments).run)
    hold_ctrl_c()
    with exit_with_code():
        log.set_up()
        log.also_to_file(run.log)
        finish(run)


def finish(run: RunDir) -> None:
    """Say how the run ended, once the service is done with its checkpoints."""
    config, _ = load_config(run.config)
    with disk_errors("run folder", run.path):
        origin.note_finished(run)
    if (asked := early_stop.read(run)) is not None:
        log.info(f"ended      early: {asked.message}; started with a larger service.patience it goes on")
    if config.service.start == "auto":
        try:
            with _ctrl_c_heard():
                Companion(run, config).wait()
        except KeyboardInterrupt:
            log.info(f"service    goes on by itself; to wait for it: {drain_command(run.path)}")
    with disk_errors("summary", run.path):
        result = summary.write(run, with_curve=config.log.report)
    if result is None:
        return
    if config.log.report:
        summary.write_report(run)
    with contextlib.suppress(OSError):  # nobody reads it any more: it is in the run folder too
        print("\n" + summary.describe(run, result))  # noqa: T201  the run's result
    log.flush()


def become_finish(run: RunDir) -> None:
    """Replace this process, rank 0's, by one that needs no GPU."""
    hold_ctrl_c()
    log.flush()
    os.execv(sys.executable, [sys.executable, "-m", "llmtrain.finish", str(run.path)])


def hold_ctrl_c() -> None:
    """From now on, also in what this process becomes. The run is finished: there is nothing to stop but the wait for
    the service, and a traceback in the seconds around it would read as if something had been lost.

    Blocked, so that one which comes now is heard in that wait; ignored, since it may reach a thread of a library, for
    which this does not block it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _ctrl_c_heard() -> Iterator[None]:
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # one that came before is heard at once
        yield
    finally:
        hold_ctrl_c()


if __name__ == "__main__":
    main()
