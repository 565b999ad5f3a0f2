"""Four claims that were made for LoRA, each beside what was measured here, and why the two differ.

Less than nothing is possible: where LoRA took longer here, its saving is negative and said so. Arithmetic and words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pingjia.cost.compare import Row, Serving

SAME_SPEED = 0.05  # two latencies that differ by less are called the same


@dataclass(frozen=True, slots=True)
class Claim:
    """`measured`: None where one of the two sides was not run."""

    claim: str
    measured: str | None
    why: str


def claims(rows: Sequence[Row], servings: Mapping[str, Serving]) -> list[Claim]:
    """All four, in the order of the plan."""
    by_name = {row.arm: row for row in rows}
    full, lora = by_name.get("full"), by_name.get("lora")
    return [_time(full, lora), _storage(full, lora), _latency(servings), _speed(full, lora)]


def _time(full: Row | None, lora: Row | None) -> Claim:
    ratio = _ratio(full, lora)
    return Claim(
        "92.5 % less training time",
        None
        if ratio is None
        else f"{abs(1 - ratio):.1%} {'less' if ratio <= 1 else 'more'}, to the same held-out loss",
        "LoRA saves the gradients of the base's weights (a third of the products of an update at most) and the "
        "optimizer's work on them, not the forward pass and not the gradients of the activations; 92.5 % would need "
        "fewer updates too, or a full run that no longer fits into memory and swaps",
    )


def _storage(full: Row | None, lora: Row | None) -> Claim:
    known = full is not None and lora is not None
    return Claim(
        "93.3 % less storage",
        f"{1 - lora.stored_bytes / full.stored_bytes:.2%} less for each further model" if known else None,  # type: ignore[union-attr]
        "an adapter's share is (rank x (in + out)) / (in x out) of each adapted linear, so it falls with the width of "
        "the network; the base has to be kept once besides, and the first model therefore saves nothing",
    )


def _speed(full: Row | None, lora: Row | None) -> Claim:
    ratio = _ratio(full, lora)
    return Claim(
        "3 to 5 times faster training",
        None if not ratio else f"{1 / ratio:.2f} times as fast, to the same held-out loss",
        "this and 92.5 % less (13.3 times) cannot both be true of one run; what is gained depends on the rates, on the "
        "loss that is asked for, and on whether full fine-tuning is short of memory",
    )


def _latency(servings: Mapping[str, Serving]) -> Claim:
    return Claim(
        "43.8 % less latency",
        _where_latency_goes(servings),
        "a merged adapter leaves a network of the base's shape, which computes as long as the base; beside the base an "
        "adapter costs a little more. What is saved comes from packed weights, kept answers, or batching (more answers "
        "per second, none of them sooner)",
    )


def _where_latency_goes(servings: Mapping[str, Serving]) -> str | None:
    """Whole answers, each against the one before LoRA: the network that was trained itself, or the base.

    A merged adapter has that network's shape, so what the two differ by is no effect but what this machine's clock is
    worth: nothing smaller is called a saving.
    """
    before = servings.get("full") or servings.get("base")
    if before is None:
        return None
    words = {
        "lora": "from LoRA beside the base",
        "int8": "from INT8",
        "int4": "from INT4",
        "cached": "from a kept answer",
    }
    noise, parts = SAME_SPEED, []
    if "lora_merged" in servings:
        apart = abs(1 - servings["lora_merged"].answer_s / before.answer_s)
        noise = max(noise, apart)
        parts.append(f"from LoRA, merged none (the same products; they measured {apart:.1%} apart, which is noise)")
    parts += [f"{text} {_change(before, servings[name], noise)}" for name, text in words.items() if name in servings]
    batch = servings.get("batch_of_8")
    if batch is not None:
        parts.append(f"from a batch of 8 {batch.tokens_per_s / before.tokens_per_s:.1f} times the tokens per second")
    return "; ".join(parts) or None


def _change(before: Serving, after: Serving, noise: float) -> str:
    saved = 1 - after.answer_s / before.answer_s
    if abs(saved) <= noise:
        return f"none ({saved:+.1%}, within noise)"
    return f"{saved:.1%} less" if saved > 0 else f"{-saved:.1%} more"


def _ratio(full: Row | None, lora: Row | None) -> float | None:
    """Seconds of LoRA over those of full fine-tuning, to the same loss."""
    if full is None or lora is None or full.reached is None or lora.reached is None or not full.reached.seconds:
        return None
    return lora.reached.seconds / full.reached.seconds
