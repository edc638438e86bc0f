"""Stop means save: signals only set a flag, which the loop looks at between steps."""

import signal
import time
from collections.abc import Callable
from types import FrameType

_LOOK_S = 1.0
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What a launcher or SLURM sends, as against a person's Ctrl-C."""


def stops() -> tuple[signal.Signals, ...]:
    """Those that are to be heard here: a terminal that is closed (SIGHUP) too, unless nohup has that ignored."""
    return STOPS if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*STOPS, signal.SIGHUP)


class StopFlag:
    """Set by SIGTERM, Ctrl-C, SIGUSR1, SIGUSR2 and the end of the terminal. A second Ctrl-C leaves at once."""

    def __init__(self, wants_early_stop: Callable[[], bool] | None = None) -> None:
        """`wants_early_stop`: whether the service asks the run to end (rank 0 looks, the others are told)."""
        self.signal_name: str | None = None
        self.early_stop = False
        """All ranks agreed to end for that reason."""
        self._wants_early_stop, self._next_look = wants_early_stop, 0.0

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def wants_early_stop(self) -> bool:
        """Looks at most once a second: the answer may lie on a slow file system."""
        if self._wants_early_stop is None or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_S
        return self._wants_early_stop()

    def listen(self) -> None:
        """Install the handlers (main thread only)."""
        for number in (*stops(), signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            signal.default_int_handler(number, frame)  # raises KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
