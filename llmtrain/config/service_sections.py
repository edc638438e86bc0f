"""Settings of the checkpoint service and of the Hub."""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.section import HUB_REPO, SCORING_PLACE, Section


class ServiceSection(Section):
    """The process in parallel with training that scores, uploads and deletes checkpoints (docs/service.md)."""

    start: Literal["auto", "manual", "never"] = "auto"
    """auto: rank 0 starts it. manual: it is started apart from training (python -m llmtrain.service --run RUN). never:
    there is none; training deletes by the rule of `checkpoint` itself, going by its own held-out loss."""
    score: Annotated[str, Field(pattern=SCORING_PLACE)] = "auto"
    """Where checkpoints are scored from disk: cpu, cuda:1, mps. training: nowhere, the loss that the training ranks
    computed at the save is taken. auto: a GPU that training does not use; else the CPU; else (a base model trained on
    GPUs) training."""
    threads: Annotated[int | None, Field(ge=1)] = None
    """CPU threads for scoring; by default half of the cores where training computes on them too, else all."""
    nice: Annotated[int, Field(ge=0, le=19)] = 10
    """How much priority the service gives training on the same machine: 0 shares the cores evenly, with 10 it gets
    about a tenth of one that training wants. The more checkpoints wait, the less it yields."""
    batch_size: Annotated[int | None, Field(ge=1)] = None
    """Rows per forward pass when scoring; by default as in training's evaluation. Does not change the result (int8: by
    what it rounds)."""
    patience: Annotated[int | None, Field(ge=1)] = None
    """End training when so many saves in a row have not lowered the held-out loss; null: never. Saves that a stop
    forced (a preemption, the end of a job's time) are not counted, though one of them may lower the loss."""
    wait_s: Annotated[float, Field(ge=0)] = 3600.0
    """At the end of training, wait at most so long for the service to finish what is queued; it continues by itself
    where it can (a batch job ends with the training process). As long a save that finds no room on the disk waits for
    checkpoints that will be deleted when they are scored and uploaded."""


class HubSection(Section):
    """Upload to the Hugging Face Hub. The token is the Hub's own: HF_TOKEN, or 'hf auth login'; never written here."""

    repo: Annotated[str, Field(pattern=HUB_REPO, max_length=96)] | None = None
    """Repository, "user/name", each of letters, digits, ".", "_" and "-", a letter or a digit first; at most 96 in all.
    null: nothing is uploaded."""
    private: bool = True
    """Make the repository private. An existing public one is refused."""
    optimizer_state: bool = False
    """Upload state/ too, so that `llmtrain restore` can bring the run back from the Hub; several times the size. Turned
    on later: from the newest checkpoint on, which is uploaded again with it; earlier ones stay without."""
    prune: bool = False
    """Remove the tags of checkpoints that the rule of `checkpoint` keeps neither there nor on this disk. Frees no
    storage: the Hub keeps the files in the branch's history."""
    publish_every_s: Annotated[float, Field(ge=0)] = 600.0
    """Scores, model card and the best weights on `main` are renewed at most so often, in one commit."""
    stall_s: Annotated[float, Field(gt=0)] = 300.0
    """An upload that makes no progress for so long is ended and tried again."""
    pause_s: Annotated[float, Field(gt=0)] = 2.0
    """First pause after a failed attempt; each further one is twice as long, up to 10 minutes, or as long as the
    Hub says, up to an hour."""
