"""The published layout of ChatGLM's INT8 and INT4 weights: symmetric, one scale per output row.

INT8: int8 [n, m]. INT4: int8 [n, m/2], the high nibble an even column, the low nibble the odd one after it, two's
complement. scale [n]: max|row| / (2^(bits-1) - 1), so values lie in -127..127 or -7..7. Arithmetic on tensors only;
the modules are in `formats.py`.

Shapes: N output rows, M input columns, P stored columns (M, or M/2 for INT4).
"""

from __future__ import annotations

import torch

BITS = (4, 8)
_BLOCK_ELEMENTS = 2**18  # 1 MB in float32: stays in the cache of a small machine


def row_blocks(num_rows: int, num_columns: int) -> list[slice]:
    """Slices over rows, each about 1 MB once it is float32."""
    step = max(1, _BLOCK_ELEMENTS // max(1, num_columns))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def quantize_rows(weight_NM: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a float matrix to nearest; return (packed int8 [N, P], scale float32 [N]).

    Works in float32, block by block, so that the extra memory stays small. A row of zeros gets scale 0.
    """
    num_rows, num_columns = weight_NM.shape
    packed = torch.empty(num_rows, stored_columns(num_columns, bits), dtype=torch.int8, device=weight_NM.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=weight_NM.device)
    for rows in row_blocks(num_rows, num_columns):
        values, scale[rows] = _quantize_block(weight_NM[rows].float(), bits)
        packed[rows] = pack_int4(values) if bits == 4 else values
    return packed, scale


def _quantize_block(block: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    largest = 2 ** (bits - 1) - 1
    scale = block.abs().amax(dim=1) / largest
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (block / divisor[:, None]).round_().clamp_(-largest, largest).to(torch.int8), scale


def stored_columns(num_columns: int, bits: int) -> int:
    """Bytes of a stored row of `num_columns` weights."""
    assert bits in BITS, bits
    assert bits == 8 or num_columns % 2 == 0, f"INT4 packs columns in pairs; {num_columns} is odd"
    return num_columns * bits // 8


def pack_int4(values_NM: torch.Tensor) -> torch.Tensor:
    """int8 [N, M] of -8..7 -> int8 [N, M/2]."""
    return (values_NM[:, 0::2] << 4) | (values_NM[:, 1::2] & 0xF)


def unpack_int4(packed_NP: torch.Tensor) -> torch.Tensor:
    """int8 [N, M/2] -> int8 [N, M], columns in their own order."""
    return torch.stack((packed_NP >> 4, (packed_NP << 4) >> 4), dim=-1).flatten(-2)


def dequantize_rows(
    packed_NP: torch.Tensor, scale_N: torch.Tensor, bits: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Packed rows -> float [N, M] of `dtype`; computed in float32 block by block."""
    num_rows, stored = packed_NP.shape
    weight = torch.empty(num_rows, stored * 8 // bits, dtype=dtype, device=packed_NP.device)
    for rows in row_blocks(num_rows, weight.shape[1]):
        values = unpack_int4(packed_NP[rows]) if bits == 4 else packed_NP[rows]
        weight[rows] = values.float() * scale_N[rows].float()[:, None]
    return weight
