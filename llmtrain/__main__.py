"""`python -m llmtrain [CONFIG] [section.key=value ...]`, alone or under torchrun."""

import argparse
import sys
from collections.abc import Sequence

from llmtrain import allocator
from llmtrain.errors import exit_with_code

_HELP = """\
Train a language model. Without a configuration: a small GPT on Python's own sources.

  python -m llmtrain                                        the default run
  python -m llmtrain configs/verdict.yaml                   a configuration file
  python -m llmtrain optim.lr=3e-4 train.steps=500          settings on the command line
  torchrun --nproc_per_node 8 -m llmtrain CONFIG            the same run on 8 GPUs

Started again, a run goes on from its newest whole checkpoint (run.resume=never starts anew).
Ctrl-C saves and stops; a second one stops at once. All settings: 'llmtrain schema'.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llmtrain", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="CONFIG | section.key=value")
    words: list[str] = parser.parse_args(arguments).settings
    with exit_with_code():
        from llmtrain.config.load import split_settings

        file, overrides = split_settings(words)
        from llmtrain.assemble import run  # imports torch: not before --help and argument errors

        sys.exit(run(file, overrides))


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
