"""The structs of quant/kernels/forward.h as ctypes sees them, and the calls that take them. Nothing is decided here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_double, c_int32, c_int64, c_void_p
from typing import Any

import torch

from pingjia.errors import ModelError
from pingjia.quant import kernels

ROPE_HALVES, ROPE_PAIRS, ROPE_TWO_HALVES = 0, 1, 2
SWIGLU, GELU_TANH = 0, 1
KV_KINDS = {torch.float32: 0, torch.float16: 1, torch.int8: 2}
TABLE_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class CMatrix(ctypes.Structure):
    _fields_ = (
        ("bits", c_int32), ("n", c_int64), ("m", c_int64), ("group", c_int64), ("tiles", c_void_p),
        ("scales", c_void_p), ("scale_bits", c_int32), ("bias", c_void_p),
    )  # fmt: skip


class CNorm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_double))


class CLora(ctypes.Structure):
    _fields_ = (("adapter", c_int64), ("rank", c_int64), ("a", c_void_p), ("b", c_void_p), ("factor", c_double))


class CLinear(ctypes.Structure):
    _fields_ = (("matrix", c_void_p), ("loras", c_void_p), ("num_loras", c_int64))


class CGroup(ctypes.Structure):
    _fields_ = (("linears", c_void_p), ("count", c_int64))


class CLayer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", CNorm), ("mlp_norm", CNorm), ("qkv", CGroup), ("out", CGroup), ("up", CGroup),
        ("down", CGroup), ("q_norm", c_void_p), ("k_norm", c_void_p), ("k_pages", c_void_p), ("v_pages", c_void_p),
        ("k_scales", c_void_p), ("v_scales", c_void_p),
    )  # fmt: skip


class CNetwork(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("hidden", "num_heads", "num_kv_heads", "head_dim", "inner", "vocab",
          "num_layers", "qkv_width", "q_offset", "q_stride", "k_offset", "k_stride", "v_offset", "v_stride", "rope",
          "num_frequencies", "num_positions")),
        ("cos", c_void_p), ("sin", c_void_p), ("activation", c_int64), ("residual", c_double), ("scaling", c_double),
        ("qk_eps", c_double), ("page_size", c_int64), ("kv_kind", c_int64), ("last_norm", CNorm), ("head", c_void_p),
        ("head_table", c_void_p), ("head_table_kind", c_int64), ("head_bias", c_void_p), ("layers", c_void_p),
    )  # fmt: skip


class CStep(ctypes.Structure):
    _fields_ = (
        ("num_rows", c_int64), ("num_pieces", c_int64), ("num_outputs", c_int64), ("x", c_void_p),
        ("positions", c_void_p), ("pieces", c_void_p), ("pages", c_void_p), ("outputs", c_void_p),
        ("hidden_out", c_void_p), ("logits", c_void_p), ("best", c_void_p), ("finite", c_void_p),
    )  # fmt: skip


def library() -> ctypes.CDLL:
    """The kernels with the calls of the forward pass. Raises ModelError when they are not there or of another build."""
    found = kernels.library()
    found.pj_forward_layout.restype, found.pj_forward_layout.argtypes = c_int64, []
    if found.pj_forward_layout() != ctypes.sizeof(CLayer) * 1000 + ctypes.sizeof(CNetwork):
        raise ModelError("the kernels were built from other sources; run `pip install --editable .` again")
    found.pj_forward_new.restype, found.pj_forward_new.argtypes = c_void_p, [c_void_p]
    found.pj_forward_free.restype, found.pj_forward_free.argtypes = None, [c_void_p]
    found.pj_forward_run.restype, found.pj_forward_run.argtypes = ctypes.c_int, [c_void_p, c_void_p]
    return found


class Memory:
    """Keeps alive what pointers in structs point to."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def pointer(self, tensor: torch.Tensor | None) -> int | None:
        """Where a contiguous CPU tensor begins; None stays None."""
        if tensor is None:
            return None
        assert tensor.is_contiguous(), "the kernels read rows without gaps"
        self._kept.append(tensor)
        return tensor.data_ptr()

    def address(self, struct: ctypes.Structure | ctypes.Array[Any]) -> int:
        """Where a struct or an array of them begins."""
        self._kept.append(struct)
        return ctypes.addressof(struct)

    def array(self, structs: list[Any]) -> int | None:
        """Where a C array with copies of the structs begins; None for no structs."""
        return self.address((type(structs[0]) * len(structs))(*structs)) if structs else None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._kept)
