"""Guesses at the next tokens of an answer, for the network to judge several at once. Pure: no torch.

Prompt look-up (as transformers' `prompt_lookup_num_tokens` and vLLM's n-gram speculation): whatever followed the last
three tokens when they stood together before may follow them again. Answers that quote, correct or rename say much
that stands in the prompt. A wrong guess costs time and nothing else: only the network's own choice becomes text.
"""

from __future__ import annotations

from collections.abc import Sequence

_SIZE = 3  # tokens that must match; two match by chance too often
MOST = 12  # guesses of one step
# Share of accepted guesses below which another row costs more than it brings. With the steps below, guesses that are
# always wrong cost 1.2 % of the time when another row costs 7 % of a step, and copying answers take 57 % of theirs.
_LEAST_HOPE = 0.15


class Drafter:
    """The guesses for one greedy answer, fewer the more often they were wrong."""

    def __init__(self) -> None:
        self._next_place: dict[tuple[int, ...], int] = {}  # three tokens -> where they were followed last
        self._num_read = 0
        self._hope = 0.3

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` guesses at what follows `tokens`, which only ever grow; often none."""
        self._read(tokens)
        place = self._next_place.get(tuple(tokens[-_SIZE:]))
        if place is None or most < 1:
            return []
        if self._hope < _LEAST_HOPE:
            self._hope += 0.005  # forgotten in time: an answer may begin to quote late
            return []
        period = len(tokens) - place  # beyond the end an answer that repeats itself goes on repeating
        return [tokens[place + i % period] for i in range(min(most, max(2, round(self._hope * MOST))))]

    def learn(self, num_guesses: int, num_right: int) -> None:
        """Take note of how many guesses the network agreed with."""
        self._hope += 0.4 * (num_right / num_guesses - self._hope)

    def _read(self, tokens: Sequence[int]) -> None:
        """Remember every three tokens but the last ones, which nothing has followed yet."""
        for end in range(max(self._num_read, _SIZE), len(tokens)):
            self._next_place[tuple(tokens[end - _SIZE : end])] = end
        self._num_read = len(tokens)


def agreed(guesses: Sequence[int], chosen: Sequence[int], ends: frozenset[int]) -> list[int]:
    """The tokens to say: the network's choices up to its first that was not guessed, or that ends the answer.

    `chosen[i]` is the network's choice after the guesses before i; it is one longer than `guesses`.
    """
    said = [chosen[0]]
    for guess, following in zip(guesses, chosen[1:], strict=True):
        if said[-1] != guess or guess in ends:
            break
        said.append(following)
    return said
