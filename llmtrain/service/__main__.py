"""`python -m llmtrain.service --run RUN`: score, upload, rank and keep a run's checkpoints."""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from llmtrain import locks, log, origin, summary
from llmtrain.config import load_config
from llmtrain.errors import RunFolderError, disk_errors, exit_with_code
from llmtrain.rundir import RunDir
from llmtrain.service.worker import Service, ServiceOptions

_HELP = """\
Take care of a run's checkpoints: verify each, score it from disk on the held-out split, upload it (hub.repo),
keep the ranking, delete what the rule of `checkpoint` does not keep. Training starts it by itself; start it
by hand to finish a queue, or to let another machine do the work (service.start=manual).

  python -m llmtrain.service --run runs/NAME            goes on while training does, and until nothing waits
  python -m llmtrain.service --run runs/NAME --drain    ends when nothing waits

It can be ended at any moment, also by SIGKILL: the next one goes on where it stopped.
"""
_LOOK_S = 1.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llmtrain.service", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--drain", action="store_true", help="end when nothing waits, even while training goes on")
    parser.add_argument("--only", choices=["prune"], help="do this one thing and end")
    parser.add_argument("--repo", help="upload to this repository (hub.repo)")
    parser.add_argument("--background", action="store_true", help="write to RUN/service/log.txt alone")
    options = parser.parse_args(arguments)
    with exit_with_code():
        run = RunDir(options.run.resolve())
        if not run.config.exists():
            raise RunFolderError(f"{options.run}: no run folder (there is no config.yaml in it)")
        with disk_errors("checkpoint service", run.service, then="it goes on with what waits"):
            run.service.mkdir(exist_ok=True)
            log.set_up()
            log.also_to_file(run.service_log, alone=options.background)
            overrides = () if options.repo is None else (f"hub.repo={options.repo}",)
            sys.exit(work(run, ServiceOptions(options.drain, options.only, overrides)))


def work(run: RunDir, options: ServiceOptions) -> int:
    """Serve behind the lock. Where another service is at work, let it; to drain or prune, wait for it."""
    lock = take_turn(run, wait=options.drain or options.only is not None)
    if lock is None:
        log.info(f"another service ({locks.holder(run.service_lock_file)}) is at work on {run.path}; nothing to do")
        return 0
    with lock:
        origin.enter(run)
        service = Service(run, lock, options)

        def stop(_number: int, _frame: FrameType | None) -> None:
            service.stop_requested = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        log.info(f"service    at work on {run.path}")
        code = service.serve()
        if code:
            log.info("service    stopped; started again it goes on")
        elif service.given_up:
            log.warning(f"service    ended; {len(service.given_up)} not scored: it failed too often")
        else:
            log.info("service    done: nothing waits")
        if not code:
            renew_summary(run)
        return code


def renew_summary(run: RunDir) -> None:
    """Of a run that has ended: what was scored since may have changed what it came to."""
    if run.is_training() or not origin.read(run).finished:
        return
    config, _ = load_config(run.config)
    try:
        if summary.renew(run, with_curve=config.log.report) and config.log.report:
            summary.write_report(run)
    except OSError as error:
        log.warning(f"summary    {run.summary} could not be renewed ({type(error).__name__}: {error})")


def take_turn(run: RunDir, wait: bool) -> IO[str] | None:
    """The run's service lock; None where another service holds it and we are not to wait."""
    said = False
    while (lock := run.lock_service()) is None:
        if not wait:
            return None
        if not said:
            log.info(f"waiting    for {locks.holder(run.service_lock_file)}, which is at work here")
            said = True
        time.sleep(_LOOK_S)
    return lock


if __name__ == "__main__":
    main()
