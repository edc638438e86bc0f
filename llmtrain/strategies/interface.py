"""The six operations that the loop drives, whatever shares the work between ranks."""

from typing import Protocol

from torch import Tensor

from llmtrain.data import Batch
from llmtrain.fragments import Fragment, FragmentReader


class Strategy(Protocol):
    """One rank's handle on model, gradients and optimizer."""

    def accumulate(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """Add the gradient of `scale` x (loss summed over the batch and over all ranks).

        Collective: if `last` under DDP, always under ZeRO-2. Gradients are summed over the ranks.
        Returns this rank's summed loss, detached, on the device.
        """
        ...

    def update(self, lr: float) -> Tensor:
        """Clip, take the optimizer step, clear the gradients. Returns the gradient norm on the device.

        Collective under ZeRO-2, and with Muon.
        """
        ...

    def loss(self, batch: Batch) -> Tensor:
        """Summed loss of a batch without gradients and without dropout, on the device."""
        ...

    def save_state(self) -> list[Fragment]:
        """This rank's share of the optimizer's state: views on it, valid until the next `update`.

        The shares of all ranks together are the whole state, each element once.
        """
        ...

    def load_state(self, saved: FragmentReader) -> None:
        """Take over the part of a saved state that this rank needs, whichever strategy wrote it."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """All trainable parameters by name, on the device: views, valid until the next `update`."""
        ...
