"""One step in one call of compiled code: the forward pass of quant/kernels/forward.cpp behind the Runner's interface.

For packed networks on the CPU whose every module is known (fused_network.py); the others run in runner.py. Activations
are rounded to int8 in every product, as in all products with packed weights here. A row's result depends on its own
sequence only, in bits too, so answers are the same whoever shares the step.

Shapes: T tokens of the step, S slices (one row of logits each), H hidden, V vocabulary, G columns of a group.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pingjia.engine import fused_abi as abi
from pingjia.engine.fused_adapters import FusedLora, fuse
from pingjia.engine.fused_kv import FusedPool
from pingjia.engine.fused_network import Block, CannotFuseError, Description, describe, linear_of
from pingjia.engine.lora import AdaptedLinear, AdapterRows, LoraWeights
from pingjia.engine.sequence import Slice
from pingjia.engine.token_rows import AdaptedHead, AdaptedTable, bare
from pingjia.models.family import Family, arange_positions
from pingjia.quant import kernels, prepare_for_inference
from pingjia.quant.formats import PackedLinear
from pingjia.quant.native import Tiles
from pingjia.quant.rows import quantize_rows

_log = logging.getLogger(__name__)
_HEAD_GROUP = 64  # columns per scale of a head that is rounded to INT8 here


def description_for(model: PreTrainedModel, num_positions: int, fused: str) -> Description | None:
    """What the compiled pass runs, or None (said once, with the reason) when steps go through torch."""
    try:
        if fused == "off":
            raise CannotFuseError("engine.fused is off")
        if model.device.type != "cpu":
            raise CannotFuseError(f"the network is on {model.device}")
        if not kernels.available():
            raise CannotFuseError(kernels.why_not())
        return describe(model, num_positions)
    except CannotFuseError as reason:
        _log.info("steps are computed by torch, not by the compiled pass: %s", reason)
        return None


class FusedRunner:
    """Runs steps of a described network. Takes the network over: its packed layers are reordered for the kernels.

    quantize_head: keep a head that is stored in floats as INT8 (one scale per 64 columns) for the products.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        description: Description,
        pool: FusedPool,
        adapter_rows: AdapterRows,
        *,
        quantize_head: bool = True,
    ) -> None:
        prepare_for_inference(model)
        self._model, self._family, self._pool, self._adapter_rows = model, family, pool, adapter_rows
        self._description = description
        self._library = abi.library()
        self._numbers: dict[str, int] = {}
        self._adapters: dict[str, dict[str, FusedLora]] = {}
        self._memory = abi.Memory()
        self._network = _network(model, description, pool, self._memory)
        _set_head(self._network, model, quantize_head, self._memory)
        self._handle: int | None = None
        self.adapters_changed()
        self._last: tuple[torch.Tensor, list[bool], list[int]] | None = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.pj_forward_free(self._handle)

    def adapters_changed(self) -> None:
        """Take up the adapters that are attached to the network now. Not during a step."""
        attached = _attached(self._model)
        known = self._adapters
        self._adapters = {key: known.get(key) or fuse(weights) for key, weights in attached.items()}
        self._numbers = {key: number for number, key in enumerate(self._adapters)}
        self._layer_memory = abi.Memory()
        layers = _Layers(self._model, self._pool, list(self._adapters.values()), self._layer_memory)
        self._network.layers = layers.array(self._description.blocks)
        self._network.num_layers = len(self._description.blocks)
        if self._handle:
            self._library.pj_forward_free(self._handle)
        self._handle = self._library.pj_forward_new(ctypes.addressof(self._network))

    @torch.inference_mode()
    def run(self, slices: list[Slice]) -> torch.Tensor:
        """Compute the slices; return the logits after the last token of each, in the order given; see Runner.run."""
        with self._adapter_rows.set(slices, slices, self._pool.device) if self._has_tables() else nullcontext():
            x_TH = self._model.get_input_embeddings()(_token_ids(slices)).float().contiguous()
            step = _StepArrays(slices, x_TH, self._network.vocab, self._numbers, self._positions(slices))
            if not self._library.pj_forward_run(self._handle, ctypes.addressof(step.struct)):
                raise IndexError("a position lies beyond the tables of the rotation")
            logits_SV = torch.from_numpy(step.logits)
            if self._has_token_rows(slices):
                self._add_token_rows(logits_SV, step)
        self._last = (logits_SV, step.finite.astype(bool).tolist(), step.best.tolist())
        return logits_SV

    def judge(self, logits_SV: torch.Tensor) -> tuple[list[bool], list[int]]:
        """Of every row that `run` returned: whether all its logits are finite, and where the largest is."""
        if self._last is not None and self._last[0] is logits_SV:
            return self._last[1:]
        return logits_SV.sum(-1).isfinite().tolist(), logits_SV.argmax(-1).tolist()

    def _positions(self, slices: list[Slice]) -> np.ndarray | None:
        """int32 [2, T]; None where positions simply count the tokens."""
        config, positions = self._model.config, self._family.positions
        if positions is arange_positions:
            return None
        parts = [positions(config, p.sequence.tokens, p.start, p.stop).reshape(-1, p.num_tokens) for p in slices]
        return np.ascontiguousarray(torch.cat(parts, dim=1).numpy(), dtype=np.int32)

    def _has_tables(self) -> bool:
        """Whether any adapter brings rows of the embedding or the head along; only they ask whose row is whose."""
        tables = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        return any(isinstance(table, AdaptedTable) for table in tables)

    def _has_token_rows(self, slices: list[Slice]) -> bool:
        head = self._model.get_output_embeddings()
        return isinstance(head, AdaptedHead) and any(p.sequence.adapter in head.rows for p in slices)

    def _add_token_rows(self, logits_SV: torch.Tensor, step: _StepArrays) -> None:
        head: AdaptedHead = self._model.get_output_embeddings()
        head.overwrite(torch.from_numpy(step.hidden), logits_SV)
        step.best[:] = logits_SV.argmax(-1).numpy()
        step.finite[:] = logits_SV.sum(-1).isfinite().numpy()


def _token_ids(slices: list[Slice]) -> torch.Tensor:
    return torch.tensor([[token for p in slices for token in p.sequence.tokens[p.start : p.stop]]])


class _StepArrays:
    """The arrays of one step, alive as long as this object, and the struct that points to them."""

    def __init__(
        self,
        slices: list[Slice],
        x_TH: torch.Tensor,
        vocab: int,
        numbers: dict[str, int],
        positions: np.ndarray | None,
    ) -> None:
        lengths = np.fromiter((p.num_tokens for p in slices), np.int64, len(slices))
        ends = lengths.cumsum()
        num_pages = np.fromiter((len(p.sequence.pages) for p in slices), np.int64, len(slices))
        first_pages = num_pages.cumsum() - num_pages
        self.pieces = np.array(
            [(0, 0, p.start, p.sequence.prefix_len, 0, numbers.get(p.sequence.adapter or "", -1)) for p in slices],
            np.int64,
        )
        self.pieces[:, 0], self.pieces[:, 1], self.pieces[:, 4] = ends - lengths, lengths, first_pages
        self.pages = np.array([page for p in slices for page in p.sequence.pages], np.int32)
        rows = [np.arange(end - p.num_outputs, end) for p, end in zip(slices, ends, strict=True)]
        self.outputs = np.concatenate(rows).astype(np.int32)
        num_outputs = len(self.outputs)
        self.hidden = np.empty((num_outputs, x_TH.shape[-1]), np.float32)
        self.logits = np.empty((num_outputs, vocab), np.float32)
        self.best, self.finite = np.empty(num_outputs, np.int32), np.empty(num_outputs, np.int32)
        self.x_TH, self.positions = x_TH, positions
        self.struct = abi.CStep(
            x_TH.shape[-2], len(slices), num_outputs, x_TH.data_ptr(), _at(positions), _at(self.pieces),
            _at(self.pages), _at(self.outputs), _at(self.hidden), _at(self.logits), _at(self.best), _at(self.finite),
        )  # fmt: skip


def _at(array: np.ndarray | None) -> int | None:
    # `array.ctypes.data` makes two objects on the way.
    return None if array is None else array.__array_interface__["data"][0]


# ---- the network as structs


def _network(model: PreTrainedModel, description: Description, pool: FusedPool, memory: abi.Memory) -> abi.CNetwork:
    """Everything but the layers and the head."""
    heads, rotation, block = description.heads, description.rotation, description.blocks[0]
    network = abi.CNetwork(
        num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim,
        hidden=linear_of(model, block.qkv[0]).in_features, inner=linear_of(model, block.down).in_features,
        qkv_width=sum(linear_of(model, path).out_features for path in block.qkv),
        rope=rotation.kind, num_frequencies=rotation.cos_PF.shape[1], num_positions=rotation.cos_PF.shape[0],
        cos=memory.pointer(rotation.cos_PF), sin=memory.pointer(rotation.sin_PF),
        activation=description.activation, residual=description.residual or 0.0, scaling=heads.scaling,
        qk_eps=_eps(block.q_norm) if block.q_norm is not None else 0.0,
        page_size=pool.page_size, kv_kind=abi.KV_KINDS[pool.dtype], last_norm=_norm(description.last_norm, memory),
    )  # fmt: skip
    _place_heads(network, description)
    return network


def _place_heads(network: abi.CNetwork, description: Description) -> None:
    heads = description.heads
    size, queries, keys = heads.head_dim, heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    network.q_stride = network.k_stride = network.v_stride = 3 * size if heads.interleaved else size
    network.q_offset = 0
    network.k_offset, network.v_offset = (size, 2 * size) if heads.interleaved else (queries, queries + keys)


def _eps(norm: nn.Module) -> float:
    """Every class has its own name for it."""
    return float(next(getattr(norm, name) for name in ("variance_epsilon", "eps") if name in vars(norm)))


def _norm(norm: nn.Module, memory: abi.Memory) -> abi.CNorm:
    bias = getattr(norm, "bias", None)
    return abi.CNorm(memory.pointer(_floats(norm.weight)), memory.pointer(_floats(bias)), _eps(norm))


def _floats(tensor: object) -> torch.Tensor | None:
    return tensor.detach().float().contiguous() if isinstance(tensor, torch.Tensor) else None


def _matrix(tiles: Tiles, bias: object, memory: abi.Memory) -> int:
    """Address of the struct of a packed matrix."""
    bias_N = _floats(bias)
    found = tiles.c_matrix(bias_N)
    memory.pointer(tiles.tiles), memory.pointer(tiles.scales), memory.pointer(bias_N)
    values = {name: getattr(found, name) for name, _ in abi.CMatrix._fields_}
    return memory.address(abi.CMatrix(**values))


def _set_head(network: abi.CNetwork, model: PreTrainedModel, quantize: bool, memory: abi.Memory) -> None:
    head = bare(model.get_output_embeddings())
    assert isinstance(head, nn.Linear)
    network.vocab = head.out_features
    if isinstance(head, PackedLinear):
        assert head.tiles is not None
        network.head = _matrix(head.tiles, head.bias, memory)
    elif quantize:
        network.head = _matrix(_head_tiles(head.weight.detach()), head.bias, memory)
    else:
        weight = head.weight.detach().contiguous()
        network.head_table, network.head_table_kind = memory.pointer(weight), abi.TABLE_KINDS[weight.dtype]
        network.head_bias = memory.pointer(_floats(head.bias))


def _head_tiles(weight_VH: torch.Tensor) -> Tiles:
    """A float head as INT8 with a scale per row and 64 columns (per row, where 64 does not divide them)."""
    rows, columns = weight_VH.shape
    group = _HEAD_GROUP if columns % _HEAD_GROUP == 0 else columns
    stored, scale = quantize_rows(weight_VH.reshape(-1, group), 8)
    return Tiles.of(stored.view(rows, columns), scale.view(rows, -1).half(), 8)


def _attached(model: PreTrainedModel) -> dict[str, dict[str, LoraWeights]]:
    """Adapter key -> module path -> its matrices."""
    found: dict[str, dict[str, LoraWeights]] = {}
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            for key, lora in module.weights.items():
                found.setdefault(key, {})[path] = lora
    return found


class _Layers:
    """Makes the array of layers, with the adapters that are attached now."""

    def __init__(
        self, model: PreTrainedModel, pool: FusedPool, adapters: list[dict[str, FusedLora]], memory: abi.Memory
    ) -> None:
        self._model, self._pool, self._adapters, self._memory = model, pool, adapters, memory

    def array(self, blocks: Iterable[Block]) -> int | None:
        """Where the C array begins."""
        return self._memory.array([self._layer(index, block) for index, block in enumerate(blocks)])

    def _layer(self, index: int, block: Block) -> abi.CLayer:
        pool, pointer = self._pool, self._memory.pointer
        return abi.CLayer(
            attention_norm=_norm(block.attention_norm, self._memory), mlp_norm=_norm(block.mlp_norm, self._memory),
            qkv=self._group(block.qkv), out=self._group([block.out]), up=self._group(block.up),
            down=self._group([block.down]), q_norm=self._head_norm(block.q_norm), k_norm=self._head_norm(block.k_norm),
            k_pages=pointer(pool.k[index]), v_pages=pointer(pool.v[index]),
            k_scales=pointer(pool.k_scale.get(index)), v_scales=pointer(pool.v_scale.get(index)),
        )  # fmt: skip

    def _head_norm(self, norm: nn.Module | None) -> int | None:
        return None if norm is None else self._memory.pointer(_floats(norm.weight))

    def _group(self, paths: Iterable[str]) -> abi.CGroup:
        linears = [self._linear(path) for path in paths]
        return abi.CGroup(self._memory.array(linears), len(linears))

    def _linear(self, path: str) -> abi.CLinear:
        linear = linear_of(self._model, path)
        assert linear.tiles is not None
        loras = self._loras(path)
        return abi.CLinear(_matrix(linear.tiles, linear.bias, self._memory), self._memory.array(loras), len(loras))

    def _loras(self, path: str) -> list[abi.CLora]:
        return [self._lora(number, loras[path]) for number, loras in enumerate(self._adapters) if path in loras]

    def _lora(self, number: int, lora: FusedLora) -> abi.CLora:
        return abi.CLora(number, lora.rank, self._memory.pointer(lora.a), self._memory.pointer(lora.b), lora.factor)
