"""Stop means save: signals only set a flag, which the loop looks at between steps."""

import signal
import time
from collections.abc import Callable
from types import FrameType

_LOOK_S = 1.0
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What a launcher or SLURM sends, as against a person's Ctrl-C."""
SIGNALS = (*STOPS, signal.SIGINT)


class StopFlag:
    """Set by SIGTERM, Ctrl-C, SIGUSR1 and SIGUSR2. A second Ctrl-C leaves at once."""

    def __init__(self, asks: Callable[[], bool] | None = None) -> None:
        """`asks`: whether the run's end is asked for (rank 0 looks, the others are told)."""
        self.signal_name: str | None = None
        self.ended_early = False
        """All ranks agreed to end for that reason."""
        self._asks, self._next_look = asks, 0.0

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def asked_to_end(self) -> bool:
        """Whether the run's end is asked for; looks every few seconds: the answer may lie on a slow file system."""
        if self._asks is None or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_S
        return self._asks()

    def listen(self) -> None:
        """Install the handlers (main thread only)."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            signal.default_int_handler(number, frame)  # raises KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
