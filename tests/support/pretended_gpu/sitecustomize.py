"""Python imports this by itself, in each process that has this folder on PYTHONPATH: torch then finds pretended GPUs.

As many as CUDA_VISIBLE_DEVICES names; none where it is empty, as it is for the processes that are to see none.
"""

import importlib.machinery
import importlib.util
import os
import sys

if os.environ.get("CUDA_VISIBLE_DEVICES"):

    class _Finder:
        """Does more while `torch` and `bitsandbytes` are imported."""

        def find_spec(self, name, path=None, target=None):
            if name not in ("torch", "bitsandbytes"):
                return None
            sys.meta_path.remove(self)
            try:
                spec = importlib.util.find_spec(name)
            finally:
                sys.meta_path.insert(0, self)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
            return spec

    class _Loader:
        def __init__(self, loader):
            self._loader = loader

        def __getattr__(self, name):
            return getattr(self._loader, name)

        def create_module(self, spec):
            return self._loader.create_module(spec)

        def exec_module(self, module):
            import pretended

            module.__loader__ = self._loader
            with pretended.importing(module.__name__):
                self._loader.exec_module(module)

    sys.meta_path.insert(0, _Finder())
