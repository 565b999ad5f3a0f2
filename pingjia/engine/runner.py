"""One step on the device: token ids in, one row of logits per slice out. Only this file calls the network."""

from __future__ import annotations

from itertools import accumulate

import torch
from transformers import PreTrainedModel

from pingjia.engine.kv import KVPool, LayerShape, PagedBatch, ShapeProbe
from pingjia.engine.lora import AdapterRows
from pingjia.engine.sequence import Slice
from pingjia.models.family import Family


class Runner:
    """Feeds a network that runs on packed rows (models/attention.py)."""

    def __init__(self, model: PreTrainedModel, family: Family, pool: KVPool, adapter_rows: AdapterRows) -> None:
        self._model = model
        self._family = family
        self._pool = pool
        self._adapter_rows = adapter_rows

    @torch.inference_mode()
    def run(self, slices: list[Slice]) -> torch.Tensor:
        """Compute the slices; return the logits after the last token of each, in the order given, as [S, V].

        A slice with drafts gives a row for each of them and one for the token before the first.
        """
        device = self._pool.device
        batch = PagedBatch(self._pool, slices)
        ends = dict(zip(batch.rows, accumulate(piece.num_tokens for piece in batch.rows), strict=True))
        rows = [row for piece in slices for row in range(ends[piece] - piece.num_outputs, ends[piece])]
        with self._adapter_rows.set(batch.rows, slices, device):
            output = self._model(
                input_ids=_input_ids(batch.rows).to(device),
                position_ids=self._positions(batch.rows).to(device),
                packed=batch,
                logits_to_keep=torch.tensor(rows, device=device),
                use_cache=False,
            )
        return output.logits[0]

    def judge(self, logits_SV: torch.Tensor) -> tuple[list[bool], list[int]]:
        """Of every row that `run` returned: whether all its logits are finite, and where the largest is."""
        sound: list[bool] = logits_SV.sum(-1, dtype=torch.float32).isfinite().tolist()
        best: list[int] = logits_SV.argmax(-1).tolist()
        return sound, best

    def adapters_changed(self) -> None:
        """Nothing: the modules that hold the adapters are asked in every step."""

    def _positions(self, rows: list[Slice]) -> torch.Tensor:
        """int64 [1, T], or [1, 2, T] for two-dimensional positions."""
        config, positions = self._model.config, self._family.positions
        return torch.cat([positions(config, p.sequence.tokens, p.start, p.stop) for p in rows], dim=-1)[None]


def _input_ids(rows: list[Slice]) -> torch.Tensor:
    return torch.tensor([[token for p in rows for token in p.sequence.tokens[p.start : p.stop]]])


@torch.inference_mode()
def probe(model: PreTrainedModel, family: Family, ids: list[int]) -> tuple[dict[int, LayerShape], int]:
    """What each layer keeps per token, and the width of the logits, found by running the tokens `ids` once."""
    shapes = ShapeProbe()
    output = model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=family.positions(model.config, ids, 0, len(ids)).to(model.device)[None],
        packed=shapes,
        logits_to_keep=1,
        use_cache=False,
    )
    return shapes.layers, output.logits.shape[-1]
