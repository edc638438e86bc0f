"""Gradients summed over the ranks in flat buckets, sent while the backward pass still runs (Li et al. 2020).

torch's DistributedDataParallel is the same idea. This does without three things that it needs: importing torch's
compiler at every start (1.3 s and 80 MB of each rank); a backward pass on a dummy row, after which it re-sorts its
buckets (else a resumed run's first step would differ in the last bit from an uninterrupted run's); and divisions by the
number of ranks, which the loss has to undo. Here a gradient's place is a function of the parameters' order alone, and a
sum is a sum.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class _Bucket:
    flat: Tensor
    parameters: list[nn.Parameter]
    missing: int = 0
    """Parameters whose gradient this backward pass has not given yet."""


class GradientBuckets:
    """The gradients of some parameters; from the first backward pass to the update they lie in flat buffers."""

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_mb: float):
        """Buckets of about that size. The last parameters come first, as their gradients do."""
        self._buckets: list[_Bucket] = []
        self._place: dict[nn.Parameter, tuple[_Bucket, Tensor]] = {}  # its bucket, and its gradient's part of that
        self._reduces, self._sent = False, 0
        self._sums: list[Any] = []
        together: list[nn.Parameter] = []
        for parameter in reversed(list(parameters)):
            full = sum(p.numel() * p.element_size() for p in together) >= bucket_mb * 1e6
            if together and (full or parameter.dtype != together[0].dtype):
                self._add(together)
                together = []
            together.append(parameter)
        if together:
            self._add(together)

    def _add(self, parameters: list[nn.Parameter]) -> None:
        sizes = [p.numel() for p in parameters]
        bucket = _Bucket(parameters[0].new_empty(sum(sizes)), parameters)
        self._buckets.append(bucket)
        for parameter, part in zip(parameters, bucket.flat.split(sizes), strict=True):
            self._place[parameter] = (bucket, part.view_as(parameter))
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def expect(self, last: bool) -> None:
        """Before a backward pass; `last`: the ranks' gradients are summed during it, and `finish` follows."""
        self._reduces, self._sent = last, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def _arrived(self, parameter: Tensor) -> None:
        """In the backward pass, when `parameter.grad` holds what this pass gives it. Collective if it reduces."""
        assert isinstance(parameter, nn.Parameter)
        bucket, place = self._place[parameter]
        if parameter.grad is not place:  # the first micro-step since the update; later ones add to what lies here
            assert parameter.grad is not None
            place.copy_(parameter.grad)
            parameter.grad = place
        bucket.missing -= 1
        if self._reduces and not bucket.missing:
            self._send()

    def _send(self) -> None:
        """Collective (default group): start summing the buckets that are complete, in order, as on every rank."""
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            self._sums.append(dist.all_reduce(self._buckets[self._sent].flat, async_op=True))
            self._sent += 1

    def finish(self) -> None:
        """Collective (default group), after the last backward pass: `grad` is the sum over the ranks.

        A GPU waits for the sums, its host does not. Parameters that got no gradient here get the others' sum.
        """
        for bucket in self._buckets:
            if bucket.missing:
                for parameter in bucket.parameters:
                    if parameter.grad is None:
                        parameter.grad = self._place[parameter][1].zero_()
                bucket.missing = 0
        self._send()
        for working in self._sums:
            working.wait()
        self._sums.clear()
