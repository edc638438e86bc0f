"""`python -m llmtrain.finish RUN`: the end of a run: wait for the checkpoint service, sum up, write the report.

Rank 0 becomes this process when training has ended: its GPU and its memory are free for the service by then.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrain import choose, log, summary
from llmtrain.config import load_config
from llmtrain.errors import disk_errors, exit_with_code
from llmtrain.rundir import RunDir
from llmtrain.service.beside import Companion, drain_command


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m llmtrain.finish", description=__doc__)
    parser.add_argument("run", type=Path)
    run = RunDir(parser.parse_args(arguments).run)
    with exit_with_code():
        log.set_up()
        log.also_to_file(run.log)
        finish(run)


def finish(run: RunDir) -> None:
    """Say how the run ended, once the service is done with its checkpoints."""
    config, _ = load_config(run.config)
    if (asked := choose.stop_request(run)) is not None:
        log.info(f"ended      early: {asked.message}; started with a larger service.patience it goes on")
    if config.service.start == "auto":
        try:
            Companion(run, config).wait()
        except KeyboardInterrupt:
            log.info(f"service    goes on by itself; to wait for it: {drain_command(run.path)}")
    with disk_errors("summary", run.path):
        result = summary.write(run, with_curve=config.log.report)
    if result is None:
        return
    if config.log.report:
        # A process border instead of an import: the core does not depend on the launcher.
        subprocess.run([sys.executable, "-m", "launcher", "report", str(run.path), "--quiet"], check=False)
    print("\n" + summary.describe(run, result), flush=True)  # noqa: T201  the run's result


if __name__ == "__main__":
    main()
