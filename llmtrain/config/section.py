"""What every section of the configuration is: strict, documented by its docstrings."""

from typing import Any

from pydantic import BaseModel, ConfigDict

MAY_CHANGE: dict[str, Any] = {"may_change_on_resume": True}
"""Marks a field (or a whole section) that may differ between a checkpoint and the run resuming from it."""


class Section(BaseModel):
    """Strict: unknown keys and wrong types are errors; `3` is a valid float, `"3"` is not."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
