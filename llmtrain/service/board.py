"""TensorBoard's `validation` sub-run: a view of the ledger, written by one process in increasing steps."""

import math

from llmtrain import ledger
from llmtrain.ledger import Score, Status
from llmtrain.rundir import RunDir
from llmtrain.tensorboard import TensorBoard


class Board:
    """Follows the ledger; when a step arrives out of order, the whole view is rewritten."""

    def __init__(self, run: RunDir):
        self._run = run
        self._writer: TensorBoard | None = None
        self._shown: list[tuple[int, str]] = []
        self._problem: str | None = None

    def show(self, scores: dict[int, Score], status: Status) -> None:
        """Bring the view up to date."""
        wanted = [(step, scores[step].checkpoint) for step in sorted(scores)]
        if wanted != self._shown:
            if wanted[: len(self._shown)] != self._shown or self._writer is None:
                self._start_anew()
            assert self._writer is not None
            new = wanted[len(self._shown) :]
            for step, checkpoint in new:
                self._write(scores[step], self._now(status) if step == new[-1][0] else {})
                self._shown.append((step, checkpoint))
            self._writer.flush()
        if status.problem != self._problem and self._writer is not None:
            self._problem = status.problem
            last = self._shown[-1][0] if self._shown else 0
            text = "none" if status.problem is None else "    " + status.problem.replace("\n", "\n    ")
            self._writer.text(last, "service/problem", text)
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _now(self, status: Status) -> dict[str, float]:
        return {
            "service/waiting_to_score": len(status.to_score),
            "service/waiting_to_upload": len(status.to_upload),
            "service/uploaded": len(ledger.uploads(self._run)),
        }

    def _write(self, score: Score, now: dict[str, float]) -> None:
        """`now`: what the service has to do, for the newest score alone; of older ones it is not known any more."""
        assert self._writer is not None
        values = {
            "heldout/loss": score.loss,
            "heldout/perplexity": score.perplexity,
            "service/seconds_to_score": score.seconds,
            **now,
        }
        if not math.isnan(score.bits_per_byte):
            values["heldout/bits_per_byte"] = score.bits_per_byte
        self._writer.scalars(score.step, values, wall_time=score.time)

    def _start_anew(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for old in self._run.validation_board.glob("events.*"):
            old.unlink()
        self._run.validation_board.mkdir(parents=True, exist_ok=True)
        self._writer, self._shown = TensorBoard(self._run.validation_board, first_step=0), []
