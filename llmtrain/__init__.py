"""The core: everything that happens inside one training run."""

__version__ = "0.1.0"
