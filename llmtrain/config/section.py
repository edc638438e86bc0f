"""What every section of the configuration is: strict, documented by its docstrings; and what texts may look like."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from llmtrain import files

MAY_CHANGE: dict[str, Any] = {"may_change_on_resume": True}
"""Marks a field (or a whole section) that may differ between a checkpoint and the run resuming from it."""

Folder = Annotated[str, AfterValidator(files.expand_home)]
"""Of a path, or of what may be a path or a name, ~ is replaced as it is read. Files of sources and templates keep
theirs until they are opened: the recipe of shards that are there holds it."""

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
HUB_REPO = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"
SCORING_PLACE = r"^(auto|cpu|mps|cuda(:\d+)?|training)$"
WORD = r"^\S+$"
MEMORY = r"^\d+[KMGTkmgt]?$"

IN_WORDS = {
    RUN_NAME: "may hold letters (A to Z, a to z), digits, '.', '_' and '-', and begins with a letter or a digit, "
    "e.g. my-run_2",
    HUB_REPO: "must be user/name, both of letters, digits, '.', '_' and '-', beginning with a letter or a digit, "
    "e.g. jane/my-run_2",
    SCORING_PLACE: "use auto, cpu, mps, cuda, cuda:N (N is the GPU's number, e.g. cuda:1) or training",
    WORD: "must be one word, without blanks",
    MEMORY: "must be a whole number of megabytes, or one with K, M, G or T behind it, e.g. 32G",
}
"""What people are told of a pattern."""


class Section(BaseModel):
    """Strict: unknown keys and wrong types are errors; `3` is a valid float, `"3"` is not."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
