"""What a run spends, in the ledger."""

from __future__ import annotations

from pingjia.ledger import Fact, Ledger
from pingjia.meter import Meter
from pingjia.tune.loop import Run


class Account:
    """Writes to the ledger what was spent since the last entry, at every checkpoint: a killed run is billed too."""

    def __init__(self, run: Run, meter: Meter, ledger: Ledger | None, run_name: str) -> None:
        self._run, self._meter, self._ledger, self._name = run, meter, ledger, run_name
        self._billed_s = 0.0
        self._billed_step: int | None = None

    def note(self, stored_bytes: int = 0) -> None:
        if self._ledger is None:
            return
        seconds, logs = self._meter.seconds, self._run.logs
        first = self._billed_step if self._billed_step is not None else self._run.start
        new = [log for log in logs if log.step > first]
        self._ledger.append(
            Fact(
                kind="train",
                run=self._name,
                seconds=round(seconds - self._billed_s, 3),
                trained_tokens=sum(log.num_tokens for log in new),
                learnt_tokens=sum(log.num_learnt for log in new),
                peak_bytes=self._run.peak_bytes,
                stored_bytes=stored_bytes,
                note={"output_dir": str(self._run.output_dir), "step": logs[-1].step if logs else 0},
            )
        )
        self._billed_s, self._billed_step = seconds, logs[-1].step if logs else first
