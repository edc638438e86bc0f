"""The configuration: one strict, typed YAML file (schema.py) and how it is read (load.py)."""

from llmtrain.config.load import load_config, load_to_start, resolved_yaml
from llmtrain.config.schema import RunConfig

__all__ = ["RunConfig", "load_config", "load_to_start", "resolved_yaml"]
