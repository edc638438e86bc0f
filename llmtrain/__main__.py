"""`python -m llmtrain [CONFIG] [section.key=value ...]`, alone or under torchrun."""

import argparse
import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from llmtrain import allocator, heartbeat, launched, log
from llmtrain.errors import (
    EXIT_CODES,
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    UserError,
    exit_with_code,
    leave_code,
    own_code,
)
from llmtrain.stop import STOPS, stops

_LOOK_S = 0.5
_RANK_0_SPEAKS_S = 10.0
_LEAVES_LAST_S = 2.0

_HELP = """\
Train a language model. Without a configuration: a small GPT on Python's own sources.

  python -m llmtrain                                        the default run
  python -m llmtrain configs/stdlib.yaml                    a configuration file
  python -m llmtrain optim.lr=3e-4 train.steps=500          settings on the command line
  torchrun --nproc_per_node 8 -m llmtrain CONFIG            the same run on 8 GPUs

The same command again resumes from the newest intact checkpoint (run.resume=never starts from scratch).
Ctrl-C saves and stops; a second one stops at once. All settings: docs/settings.md.
'llmtrain run CONFIG --gpus 8' starts it again by itself after a crash or a hang.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llmtrain", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="CONFIG | section.key=value")
    words: list[str] = parser.parse_args(arguments).settings
    for number in STOPS:
        if signal.getsignal(number) == signal.SIG_IGN:  # as a supervisor leaves them to torchrun
            signal.signal(number, signal.SIG_DFL)  # until the loop listens
    own_code()
    rank = launched.rank()
    write_to_own_file(rank)
    die_with_agent()
    heartbeat.start(rank)
    with exit_with_code():
        try:
            from llmtrain.config.load import split_settings

            gc.disable()  # imports create many objects and no garbage: collecting would take a fifth of the start-up
            with rank_0_speaks_first(rank):
                file, overrides = split_settings(words)
                from llmtrain.assemble import run  # imports torch: not before --help and argument errors

                code = run(file, overrides)
        except KeyboardInterrupt:  # before the handlers were there, or for the second time
            sys.exit(EXIT_INTERRUPTED)
        for number in (*stops(), signal.SIGINT):  # a second one must not kill what has saved and is leaving
            signal.signal(number, signal.SIG_IGN)
        leave_code(code)
        leave_after_other_nodes(rank)
        sys.exit(code_for_keeper(code))


def code_for_keeper(code: int) -> int:
    """0 in place of EXIT_REQUEUE below torchrun, which would report a failure; `llmtrain run` reads a file instead."""
    is_read_from_file = EXIT_CODES in os.environ and launched.is_below_torchrun()
    return 0 if code == EXIT_REQUEUE and is_read_from_file else code


@contextlib.contextmanager
def rank_0_speaks_first(rank: int) -> Iterator[None]:
    """Most errors meet every rank. Rank 0 says them; the others stay until torchrun, seeing rank 0 leave, ends them.

    One that left earlier would have torchrun end rank 0 before it has said a word. One that nobody ends has
    met the error alone, or stands on another node, and says it itself.
    """
    try:
        yield
    except (UserError, SystemExit) as error:
        if rank and (isinstance(error, UserError) or error.code):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_RANK_0_SPEAKS_S)
        raise


def leave_after_other_nodes(rank: int) -> None:
    """On several nodes: rank 0 exits a little later than the others.

    Its torchrun holds the store in which the nodes' torchruns wait for each other at the end. If that store goes while
    another one is asking it, that one logs a traceback although the run ended well. (A run that has finished needs no
    delay: rank 0 still writes the summary.)
    """
    if rank == 0 and launched.num_ranks() > launched.local_num_ranks():
        time.sleep(_LEAVES_LAST_S)


def write_to_own_file(rank: int) -> None:
    """Where several ranks would write to one terminal: every rank but the first gets a file."""
    if (folder := os.environ.get(log.RANK_LOGS)) is None or rank == 0:
        return
    log.flush()
    file = os.open(Path(folder) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)


def die_with_agent() -> None:
    """Under torchrun: end when its agent was killed, which leaves its workers training without a keeper."""
    if not launched.is_below_torchrun():
        return
    agent = os.getppid()

    def watch() -> None:
        while os.getppid() == agent:
            time.sleep(_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, name="agent", daemon=True).start()


def leave(code: object) -> NoReturn:
    """End the process as `SystemExit(code)` does, but leave the interpreter standing.

    gloo's threads may be about to free a tensor of the last collective, for which they ask for the
    interpreter; where it is being torn down meanwhile, that ends in an abort (seen with four ranks on
    two busy cores) and a whole run counts as crashed.
    """
    if isinstance(code, str):
        with contextlib.suppress(OSError):
            print(code, file=sys.stderr)  # noqa: T201
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  as multiprocessing ends its own children
    log.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    allocator.restart_with_settings()
    try:
        main()
    except SystemExit as leaving:
        leave(leaving.code)
    except BaseException:  # noqa: BLE001  a bug: it is said at once, and the process groups are left as they are
        with contextlib.suppress(OSError):
            traceback.print_exc()
        leave(1)
