"""How long a step may take before the engine counts as frozen: what steps like it took, many times over. Pure.

A decoding step takes about the same every time; prompts add time by their length. Both are measured apart, because a
token of a prompt costs a small part of what a decoding step does.
"""

from __future__ import annotations

from pingjia.worker.settings import WorkerSettings

_SMOOTHING = 0.1
_MANY = 16  # tokens of one sequence that make a step one that reads prompts; guessed ones are fewer
_SLACK = 20.0  # a step may take so many times what it should: a busy machine is not a frozen one


class StepClock:
    """Told of every step when it is over; says before one how long it may take."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._decode_s: float | None = None
        self._prompt_token_s: float | None = None

    def limit_s(self, num_prompt: int) -> float:
        """Seconds a step may take that has at most so many prompt tokens to read."""
        if self._decode_s is None or (num_prompt and self._prompt_token_s is None):
            return max(self._settings.frozen_after_s, self._settings.unmeasured_s)
        expected_s = self._decode_s + num_prompt * (self._prompt_token_s or 0.0)
        return max(self._settings.frozen_after_s, _SLACK * expected_s)

    def add(self, largest: int, total: int, seconds: float) -> None:
        """A step is over that computed `total` tokens, `largest` of them for one sequence."""
        if total == 0:
            return
        if largest >= _MANY:
            self._prompt_token_s = _mean(self._prompt_token_s, seconds / total)
        else:
            self._decode_s = _mean(self._decode_s, seconds)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)
