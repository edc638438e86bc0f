"""The six operations that the loop drives, whatever shares the work between ranks."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from llmtrain.data import Batch


class Trainable(Protocol):
    """What a model offers: a summed loss, and its own file format. Implemented by `models/`."""

    def __call__(
        self, input_ids: Tensor, targets: Tensor, doc_ids: Tensor | None, positions: Tensor | None
    ) -> Tensor: ...
    def save(self, folder: Path, weights: dict[str, Tensor], eos_id: int) -> None: ...
    def load(self, folder: Path) -> None: ...
    def num_parameters(self) -> int: ...
    def flops_per_token(self) -> float: ...


class Strategy(Protocol):
    """One rank's handle on model, gradients and optimizer."""

    def accumulate(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """Add the gradient of `scale` x (loss summed over the batch and over all ranks).

        Collective if `last`: then gradients are summed over the ranks.
        Returns this rank's summed loss, detached, on the device.
        """
        ...

    def update(self, lr: float) -> Tensor:
        """Clip, take the optimizer step, clear the gradients. Returns the gradient norm on the device."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """Summed loss of a batch without gradients and without dropout, on the device."""
        ...

    def save_state(self) -> dict[str, Tensor]:
        """The optimizer's state on the CPU, keyed `exp_avg/PARAMETER` and so on."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `save_state` gave."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, fp32, on the CPU."""
        ...
