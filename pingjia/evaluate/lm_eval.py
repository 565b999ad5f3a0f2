"""Anything of ours as a model of the `lm-eval` harness, where that is installed: `as_harness_model(engine)`.

Harness prompts are raw text, with no chat template. Not needed by anything else here.
"""

from __future__ import annotations

from typing import Any, Protocol

from pingjia.types import Generator, Sampling, Scorer


class Model(Generator, Scorer, Protocol):
    """An engine, in other words."""


def as_harness_model(model: Model, *, max_model_len: int = 2048, max_gen_toks: int = 256) -> Any:
    """An `lm_eval.api.model.LM` for `lm_eval.simple_evaluate(model=...)`. Raises ModuleNotFoundError without lm-eval.

    max_model_len: longer texts of rolling likelihoods are read in pieces, each after as much as fits before it.
    max_gen_toks: of an answer, where the task does not say.
    """
    from lm_eval.api.model import LM

    class HarnessModel(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            found = model.likelihoods([r.args[0] for r in requests], [r.args[1] for r in requests], with_end=False)
            return [(one.logprob, one.is_greedy) for one in found]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            samplings = [_sampling(request.args[1], max_gen_toks) for request in requests]
            return [answer.text for answer in model.generate([request.args[0] for request in requests], samplings)]

        def _rolling(self, text: str) -> float:
            contexts, pieces = zip(*_pieces(text, max_model_len), strict=True) if text else ((), ())
            return sum(one.logprob for one in model.likelihoods(contexts, pieces, with_end=False))

    return HarnessModel()


def _pieces(text: str, longest: int) -> list[tuple[str, str]]:
    """(what comes before, what is scored): all of the text once, each piece with as much before it as fits.

    Counted in characters, of which a token has at least one but for rare ones. Cut where a word ends, if one does.
    """
    found: list[tuple[str, str]] = []
    start, size = 0, max(1, longest - 2)  # the first piece may fill all; later ones a half, the rest is context
    while start < len(text):
        stop = start + size if start + size < len(text) else len(text)
        if stop < len(text):
            space = text.rfind(" ", start + size // 2, stop)
            stop = space if space > start else stop
        found.append((text[max(0, stop - longest + 2) : start], text[start:stop]))
        start, size = stop, max(1, longest // 2)
    return found


def _sampling(options: dict[str, Any], max_gen_toks: int) -> Sampling:
    until = options.get("until") or []
    return Sampling(
        max_tokens=int(options.get("max_gen_toks") or max_gen_toks),
        temperature=float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0,
        top_p=float(options.get("top_p") or 1.0),
        stop=tuple([until] if isinstance(until, str) else until),
    )
