"""`python -m llmtrain.command MODULE [ARGUMENT ...]`: a module of the core as the launcher becomes it.

The module imports torch, which takes seconds, before it can say how it leaves: Ctrl-C meanwhile is no bug either.
"""

import runpy
import sys

from llmtrain.errors import exit_with_code


def main() -> None:
    with exit_with_code():
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
