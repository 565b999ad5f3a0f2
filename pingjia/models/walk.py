"""Texts moving through a network one block at a time, so that only one block's weights need memory at once.

What a block is called with (positions, rotary tables, which tokens see each other) the network itself says: its
`forward` is run until it reaches the first block. So every supported family walks, ChatGLM-6B's two-way prompts and
two-dimensional positions too. Only this file and `engine/runner.py` call networks on packed rows outside of training.

Shapes: T tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from pingjia.models.attention import PackedSequences, use_packed_attention
from pingjia.models.registry import family_of
from pingjia.models.skeleton import block_paths

CHUNK_TOKENS = 1024


@dataclass(slots=True)
class Chunk:
    """Some whole sequences laid end to end, and how far they have come."""

    sequences: list[list[int]]
    x_1TH: torch.Tensor
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] | None = None


class Walk:
    """Hidden states of `sequences`. The model's embedding must be filled by then; it is switched to packed rows."""

    def __init__(self, model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> None:
        use_packed_attention(model)
        self._model, self._family = model, family_of(model)
        self.chunks = [self._start(chunk) for chunk in chunked(sequences)]

    @torch.inference_mode()
    def through(self, block: nn.Module) -> None:
        """Move every chunk through a block that is filled."""
        for chunk in self.chunks:
            chunk.x_1TH = self._run(block, chunk)

    @torch.inference_mode()
    def observe(self, block: nn.Module) -> None:
        """Run the block and stay where we are; for whoever watches its linears."""
        for chunk in self.chunks:
            self._run(block, chunk)

    @torch.inference_mode()
    def logits(self, chunk: Chunk, rows: torch.Tensor) -> torch.Tensor:
        """[len(rows), V] float32 of those tokens of a chunk, by the last norm and the head, from where it stands."""
        with _standing_at(self._model, chunk.x_1TH):
            return cast(torch.Tensor, self._model(**self._inputs(chunk), logits_to_keep=rows).logits[0].float())

    @torch.inference_mode()
    def before_head(self) -> Iterator[torch.Tensor]:
        """What the head is fed for each chunk; the head itself need not be filled."""
        head = self._model.get_output_embeddings()
        for chunk in self.chunks:
            with _standing_at(self._model, chunk.x_1TH):
                yield _reach(self._model, self._inputs(chunk), head).x_1TH

    def _start(self, sequences: list[list[int]]) -> Chunk:
        ids = torch.tensor([[token for ids in sequences for token in ids]])
        with torch.inference_mode():
            chunk = Chunk(sequences, self._model.get_input_embeddings()(ids).float())
            reached = _reach(self._model, self._inputs(chunk), _blocks(self._model)[0])
        chunk.x_1TH, chunk.arguments, chunk.options = reached.x_1TH, reached.arguments, reached.options
        return chunk

    def _inputs(self, chunk: Chunk) -> dict[str, Any]:
        config, family = self._model.config, self._family
        positions = [family.positions(config, ids, 0, len(ids)) for ids in chunk.sequences]
        prefixes = [family.prefix_len(config, ids) for ids in chunk.sequences]
        return {
            "inputs_embeds": chunk.x_1TH,
            "position_ids": torch.cat(positions, dim=-1)[None],
            "packed": PackedSequences.of([len(ids) for ids in chunk.sequences], prefixes),
            "use_cache": False,
        }

    @staticmethod
    def _run(block: nn.Module, chunk: Chunk) -> torch.Tensor:
        out = block(chunk.x_1TH, *chunk.arguments, **(chunk.options or {}))
        return cast(torch.Tensor, out[0] if isinstance(out, tuple) else out)


def chunked(sequences: Sequence[Sequence[int]], size: int = CHUNK_TOKENS) -> Iterator[list[list[int]]]:
    """Whole sequences in lots of about `size` tokens; a longer one alone."""
    lot: list[list[int]] = []
    for ids in sequences:
        if lot and sum(map(len, lot)) + len(ids) > size:
            yield lot
            lot = []
        lot.append(list(ids))
    if lot:
        yield lot


# ---- stopping before the first block, starting behind the last


class _Reached(Exception):
    """Not an error: carries what a module is called with out of the network."""

    def __init__(self, x_1TH: torch.Tensor, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.x_1TH, self.arguments, self.options = x_1TH, arguments, options


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    return [model.get_submodule(path) for path in block_paths(model)]


def _reach(model: PreTrainedModel, inputs: dict[str, Any], module: nn.Module) -> _Reached:
    """What `module` is called with."""

    def stop(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        options = dict(options)
        first, *others = arguments if arguments else (options.pop("hidden_states"),)
        raise _Reached(first, tuple(others), options)

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs)
    except _Reached as reached:
        return reached
    finally:
        handle.remove()
    raise AssertionError("the network never reached the module")


@contextmanager
def _standing_at(model: PreTrainedModel, x_1TH: torch.Tensor) -> Iterator[None]:
    """Every block hands on what it gets, the last one `x_1TH`."""
    with ExitStack() as stack:
        for block in _blocks(model):
            stack.callback(setattr, block, "forward", block.forward)
            block.forward = lambda *_, **__: x_1TH
        yield
