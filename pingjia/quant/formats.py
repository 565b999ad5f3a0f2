"""Linear layers whose weight stays packed: the whole registry, and one class per format.

They are `nn.Linear` subclasses so that adapters (PEFT), device maps and saving treat them as linears. Tensor names and
layout are those of the published checkpoints: `weight` int8, `weight_scale`, `bias`. Frozen: only the input gets a
gradient. Not here: the arithmetic of the layout (`rows.py`), of the product in plain torch (`product.py`) and in
compiled kernels (`native.py`, once `tiled.prepare_for_inference` has reordered the weight).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from pingjia.quant.product import int4_product, int8_product
from pingjia.quant.rows import dequantize_rows, quantize_rows, stored_columns
from pingjia.quant.tiled import Tiled


class PackedLinear(Tiled, nn.Linear, ABC):
    """What the formats share. `weight` int8 [out, stored columns], `weight_scale` float [out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a float weight
        self.in_features, self.out_features = in_features, out_features
        stored = torch.zeros(out_features, stored_columns(in_features, self.bits), dtype=torch.int8, device=device)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        """Round a float linear to nearest. Its bias is shared, not copied."""
        packed = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        stored, scale = quantize_rows(linear.weight.detach(), cls.bits)
        packed.weight = nn.Parameter(stored, requires_grad=False)
        packed.weight_scale = scale
        packed.bias = linear.bias
        return packed

    @property
    def num_weights(self) -> int:
        """Weights the matrix stands for, not the bytes it takes."""
        return self.in_features * self.out_features

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as floats [out, in]."""
        return self._widened(dtype) if self.tiles is None else self.tiles.dequantize(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tiles is not None:
            return self.tiles.product(x, self.bias)
        product = self._product(x)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    @abstractmethod
    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """x @ weight^T in plain torch."""

    def _widened(self, dtype: torch.dtype) -> torch.Tensor:
        """The plain weight as floats."""
        return dequantize_rows(self.weight, self.weight_scale, self.bits, dtype)

    def reset_parameters(self) -> None:
        """Nothing: packed weights come from a checkpoint or from `of`."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class Int8Linear(PackedLinear):
    """8 bits per weight, one scale per output row."""

    bits = 8

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return int8_product(x, self.weight, self.weight_scale)


class Int4Linear(PackedLinear):
    """4 bits per weight, one scale per output row."""

    bits = 4

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return int4_product(x, self.weight, self.weight_scale)


class PackedEmbedding(Tiled, nn.Embedding):
    """An embedding table that stays packed; only the rows that are looked up become floats (`out_dtype`). Frozen.

    `weight` int8 [rows, stored columns] and `weight_scale` float [rows], as the published "-qe" checkpoints store them.
    """

    out_dtype: torch.dtype = torch.float32

    def __init__(self, weight_NP: torch.Tensor, scale_N: torch.Tensor, bits: int) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's: it would allocate a float table
        self.bits = bits
        self.num_embeddings, self.embedding_dim = weight_NP.shape[0], weight_NP.shape[1] * 8 // bits
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.weight = nn.Parameter(weight_NP, requires_grad=False)
        self.register_buffer("weight_scale", scale_N)

    @property
    def num_weights(self) -> int:
        """Weights the table stands for, not the bytes it takes."""
        return self.num_embeddings * self.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.tiles is not None:
            return self.tiles.rows(ids).to(self.out_dtype)
        return self._widened(ids.reshape(-1)).view(*ids.shape, self.embedding_dim)

    def _widened(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [K] of the plain table as floats [K, columns]."""
        return dequantize_rows(self.weight[rows], self.weight_scale[rows], self.bits, self.out_dtype)


FORMATS: dict[str, type[PackedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


def linear_class(bits: int | None) -> type[nn.Linear]:
    """The class of a network's linears at this width; 0 or None: plain floats."""
    return FORMATS[f"int{bits}"] if bits else nn.Linear
