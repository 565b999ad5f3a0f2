"""How a packed model differs from its original, on text: both walk through their blocks side by side.

Read from the files of both, one block of each in memory at a time. Not here: what is too much (`export/quantize.py`).

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pingjia.errors import ModelError
from pingjia.models.packed import PackedSource
from pingjia.models.registry import family_of
from pingjia.models.skeleton import (
    block_paths,
    empty_network,
    fill,
    free,
    is_tied,
    table_names,
    tensor_names,
    tie_tables,
)
from pingjia.models.source import Source
from pingjia.models.walk import Chunk, Walk

_ROWS = 128  # of logits at once: 130,528 of them in float32 are 67 MB


@dataclass(slots=True)
class Tally:
    """Sums over the tokens that were predicted."""

    num_tokens: int = 0
    nll_original: float = 0.0
    nll_packed: float = 0.0
    kl: float = 0.0
    num_same_top: int = 0

    def add(self, original_TV: torch.Tensor, packed_TV: torch.Tensor, target_T: torch.Tensor) -> None:
        """Logits of both and the tokens that follow."""
        first, second = original_TV.log_softmax(-1), packed_TV.log_softmax(-1)
        self.num_tokens += len(target_T)
        self.nll_original -= float(first.gather(1, target_T[:, None]).sum())
        self.nll_packed -= float(second.gather(1, target_T[:, None]).sum())
        self.kl += float((first.exp() * (first - second)).sum())
        self.num_same_top += int((first.argmax(-1) == second.argmax(-1)).sum())

    @property
    def perplexity_original(self) -> float:
        return math.exp(self.nll_original / self.num_tokens)

    @property
    def perplexity_packed(self) -> float:
        return math.exp(self.nll_packed / self.num_tokens)

    @property
    def perplexity_loss(self) -> float:
        """0.01: the packed model's perplexity is 1 % above the original's."""
        return self.perplexity_packed / self.perplexity_original - 1

    @property
    def mean_kl(self) -> float:
        """Nats per token, original against packed."""
        return self.kl / self.num_tokens

    @property
    def top1_agreement(self) -> float:
        """Share of tokens where both find the same one likeliest."""
        return self.num_same_top / self.num_tokens


@dataclass(slots=True)
class Comparison:
    """`total`, the same by label of the text, and (block, relative error of its hidden states) in order."""

    total: Tally = field(default_factory=Tally)
    by_label: dict[str, Tally] = field(default_factory=dict)
    blocks: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids of one text, and what it counts under (a language, say)."""

    ids: tuple[int, ...]
    label: str = ""


@torch.inference_mode()
def compare(
    original: Source, packed: PackedSource, texts: Sequence[Text], on_step: Callable[[int, int, str], None]
) -> Comparison:
    """Perplexity of both, KL divergence and agreement over every token that is predicted.

    Tokens of a prompt that is read both ways are not predicted. Raises ModelError when no token is.
    """
    sides = _Side(original, empty_network(original.config), texts), _Side(packed, packed.network(), texts)
    result = Comparison()
    paths = block_paths(sides[0].model)
    for i, path in enumerate(paths):
        on_step(i, len(paths) + 1, path)
        for side in sides:
            side.through(path)
        result.blocks.append((path, _distance(sides[0].walk, sides[1].walk)))
    on_step(len(paths), len(paths) + 1, "head")
    _score(sides[0], sides[1], texts, result)
    on_step(len(paths) + 1, len(paths) + 1, "")
    return result


class _Side:
    """One of the two, and its walk."""

    def __init__(self, source: Source, model: torch.nn.Module, texts: Sequence[Text]) -> None:
        self.source, self.model = source, model
        self.embedding, self.head = table_names(model)
        self._fill(tensor_names(model, self.embedding))
        self.walk = Walk(model, [text.ids for text in texts])
        if not is_tied(model):
            free(model, self.embedding)

    def through(self, path: str) -> None:
        self._fill(tensor_names(self.model, path))
        self.walk.through(self.model.get_submodule(path))
        free(self.model, path)

    def finish(self) -> None:
        """Fill the last norm and the head."""
        inside = tuple(f"{path}." for path in block_paths(self.model))
        tables = (f"{self.embedding}.", f"{self.head}.")
        self._fill(n for n in tensor_names(self.model) if not n.startswith(inside + tables))
        if is_tied(self.model):
            tie_tables(self.model)
        else:
            self._fill(tensor_names(self.model, self.head))

    def _fill(self, names: Iterator[str] | list[str]) -> None:
        tables = [f"{self.embedding}.weight", f"{self.head}.weight"]
        fill(self.model, self.source.read(names), keep=tables)


def _distance(first: Walk, second: Walk) -> float:
    """Root of the summed squares of the difference, over that of the first."""
    pairs = list(zip(first.chunks, second.chunks, strict=True))
    lost = sum(float((a.x_1TH - b.x_1TH).square().sum()) for a, b in pairs)
    return math.sqrt(lost / sum(float(a.x_1TH.square().sum()) for a, _ in pairs))


def _score(original: _Side, packed: _Side, texts: Sequence[Text], result: Comparison) -> None:
    original.finish()
    packed.finish()
    labels = iter(text.label for text in texts)
    for first, second in zip(original.walk.chunks, packed.walk.chunks, strict=True):
        for label, rows, target in _predicted(original, first, labels):
            logits = original.walk.logits(first, rows), packed.walk.logits(second, rows)
            for tally in (result.total, result.by_label.setdefault(label, Tally())):
                tally.add(*logits, target)
    if not result.total.num_tokens:
        raise ModelError(
            "the held-out text holds no token that this model predicts: it reads a prompt both ways and predicts "
            "answers only; give rows with answers (JSONL)"
        )


def _predicted(side: _Side, chunk: Chunk, labels: Iterator[str]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(label, rows of the chunk, the tokens that follow them), at most `_ROWS` at a time."""
    config, family = side.model.config, family_of(side.model)
    offset = 0
    for ids in chunk.sequences:
        label, first = next(labels), family.prefix_len(config, ids) + 1  # what nothing is before is not predicted
        for start in range(first, len(ids), _ROWS):
            stop = min(start + _ROWS, len(ids))
            yield label, torch.arange(offset + start - 1, offset + stop - 1), torch.tensor(ids[start:stop])
        offset += len(ids)
