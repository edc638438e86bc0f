"""Stop means save: signals only set a flag, which the loop looks at between steps."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    """Set by SIGTERM, Ctrl-C, SIGUSR1 and SIGUSR2. A second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def listen(self) -> None:
        """Install the handlers (main thread only)."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            signal.default_int_handler(number, frame)  # raises KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
