"""A row of logits -> the next token. Knows nothing of text; stop rules are in answer.py, grammars in grammar.py.

In the order of vLLM: bias and the ban of early ends, penalties, the grammar's mask; then greedy, or temperature and
the filters. Log-probabilities are the model's own, before all that.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from pingjia.engine.grammar import DeadEnd, Matcher
from pingjia.types import Sampling, TokenLogprob

_LIKELY = 256  # a nucleus is mostly smaller than this; sorting a whole vocabulary costs 30 times as much


@dataclass(frozen=True, slots=True)
class Pick:
    """The token chosen for one row, and what the model thought of it if that was asked for.

    ends: a grammar says that the answer is complete with it.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    ends: bool = False


class Sampler:
    """The choices of one request: its own random numbers, the tokens it has seen, how far it is in its grammar.

    Which other requests share the batch changes nothing here, and preemption keeps the object, so a seeded answer can
    be had again. stop_ids: what must not be sampled before `min_tokens`.
    """

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], seed: int,
        *, stop_ids: Iterable[int] = (), matcher: Matcher | None = None,
    ) -> None:  # fmt: skip
        self.sampling = sampling
        self._random = random.Random(seed)  # noqa: S311  not a secret
        self._prompt_ids = prompt_ids
        self._matcher = matcher
        self._num_chosen = 0
        self._banned = sorted({*stop_ids, *sampling.stop_token_ids}) if sampling.min_tokens else []
        self._has_penalty = sampling.repetition_penalty != 1 or bool(
            sampling.frequency_penalty or sampling.presence_penalty
        )
        self._tables_V: tuple[torch.Tensor, ...] = ()

    @property
    def is_argmax(self) -> bool:
        """Greedy, and nothing changes the logits: whoever has them may take the largest."""
        return self.sampling.temperature == 0 and not (
            self._has_penalty or self.sampling.logit_bias or self._matcher or self._bans_stops
        )

    @property
    def _bans_stops(self) -> bool:
        return bool(self._banned) and self._num_chosen < self.sampling.min_tokens

    def choose(self, logits_V: torch.Tensor) -> int:
        """Sample from one row of float32 logits on the CPU, which is left unchanged. Raises DeadEnd."""
        logits_V = self._biased(logits_V)
        if self._has_penalty:
            logits_V = self._penalise(logits_V)
        if self._matcher is not None:
            logits_V = torch.where(self._matcher.allowed_V(), logits_V, -torch.inf)
        if self.sampling.temperature == 0:
            return int(logits_V.argmax())
        return self._draw(logits_V / self.sampling.temperature)

    def record(self, token_id: int) -> bool:
        """Count a token that has become part of the answer; return whether its grammar says that it is complete."""
        self._num_chosen += 1
        if self._has_penalty:
            counts_V, seen_V = self._tables_V
            counts_V[token_id] += 1
            seen_V[token_id] = True
        return self._matcher is not None and self._matcher.accept(token_id)

    def _biased(self, logits_V: torch.Tensor) -> torch.Tensor:
        """What the caller adds to single tokens, and no end before its time."""
        if not (self.sampling.logit_bias or self._bans_stops):
            return logits_V
        logits_V = logits_V.clone()
        for token, value in dict(self.sampling.logit_bias).items():
            logits_V[token] += value
        if self._bans_stops:
            logits_V[self._banned] = -torch.inf
        return logits_V

    def _penalise(self, logits_V: torch.Tensor) -> torch.Tensor:
        """Repetition over prompt and answer (arXiv:1909.05858); frequency and presence over the answer (OpenAI)."""
        if not self._tables_V:
            self._tables_V = self._new_tables(logits_V.shape[-1])
        counts_V, seen_V = self._tables_V
        factor = self.sampling.repetition_penalty
        repeated_V = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
        logits_V = torch.where(seen_V, repeated_V, logits_V)
        return logits_V - self.sampling.frequency_penalty * counts_V - self.sampling.presence_penalty * (counts_V > 0)

    def _new_tables(self, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How often each token is in the answer, and whether it is in prompt or answer."""
        seen_V = torch.zeros(vocab_size, dtype=torch.bool)
        seen_V[list(self._prompt_ids)] = True
        return torch.zeros(vocab_size), seen_V

    def _draw(self, logits_V: torch.Tensor) -> int:
        probs, ids = candidates(logits_V, self.sampling)
        cumulative = probs.double().cumsum(0)
        point = self._random.random() * float(cumulative[-1])
        index = int(torch.searchsorted(cumulative, point, right=True))
        index = min(index, len(probs) - 1)  # rounding can put the point on the very end
        return index if ids is None else int(ids[index])


def candidates(logits_V: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities of the tokens left by top_k, then top_p, then min_p, and their ids (None: the whole vocabulary).

    Each filter works on what the one before left, renormalised, as in transformers. They need not sum to 1.
    """
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return logits_V.softmax(-1), None
    probs, ids = _sorted_probs(logits_V, sampling)
    keep = probs >= sampling.min_p * probs[0]
    if sampling.top_p < 1:
        keep &= probs.cumsum(0) - probs < sampling.top_p
        keep[0] = True
    return probs[keep], ids[keep]


def _sorted_probs(logits_V: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The best tokens, descending: the top_k, or as many as top_p and min_p can need."""
    vocab_size = logits_V.shape[-1]
    if sampling.top_k:
        best = logits_V.topk(min(sampling.top_k, vocab_size))
        return best.values.softmax(-1), best.indices
    probs_V = logits_V.softmax(-1)
    best = probs_V.topk(min(_LIKELY, vocab_size))
    by_p = float(best.values.sum()) >= sampling.top_p and sampling.top_p < 1
    by_min_p = float(best.values[-1]) < sampling.min_p * float(best.values[0])
    if not (by_p or by_min_p):
        values, indices = probs_V.sort(descending=True, stable=True)
        return values, indices
    return best.values, best.indices


def pick(
    logits_RV: torch.Tensor, samplers: Sequence[Sampler], best_R: Sequence[int] | None = None
) -> list[Pick | DeadEnd]:
    """Choose one token per row. Rows must be finite; the samplers have recorded the tokens when this returns.

    best_R: where the largest logit of each row is, if that is known already. A row whose grammar allows nothing gives
    the DeadEnd, and the others their picks.
    """
    if best_R is None:
        best_R = logits_RV.argmax(-1).tolist()
    return [_pick_row(logits_RV[row], best_R[row], sampler) for row, sampler in enumerate(samplers)]


def _pick_row(logits_V: torch.Tensor, best: int, sampler: Sampler) -> Pick | DeadEnd:
    token_id, logprob = best, None
    try:
        if not sampler.is_argmax or sampler.sampling.logprobs is not None:
            logits_V = logits_V.float().cpu()
            token_id = best if sampler.is_argmax else sampler.choose(logits_V)
            logprob = _logprob(logits_V, token_id, sampler.sampling.logprobs)
        return Pick(token_id, logprob, sampler.record(token_id))
    except DeadEnd as e:
        return e


def _logprob(logits_V: torch.Tensor, token_id: int, num_top: int | None) -> TokenLogprob | None:
    if num_top is None:
        return None
    logprobs_V = logits_V.log_softmax(-1)
    best = logprobs_V.topk(min(num_top, logprobs_V.shape[-1]))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs_V[token_id]), top)
