"""Adapted linears and gated units in fewer passes over memory: the same numbers as PEFT's and transformers' modules.

PEFT computes W x, B A x, the second times a factor, and their sum: three passes over a result as wide as the layer,
and as many backward. Here B A x is added by the product that computes it, and its gradient likewise. Dropout keeps a
byte per element instead of a float and a copy of the input. A gated unit keeps its two inputs, and computes the rest of
it again. A norm has its gradient in closed form.

Modules stay PEFT's; only their forward pass is another, and only where nothing but a plain LoRA in the float format of
its input is asked for: other adapters (DoRA) and autocast go PEFT's own way. Not here: the loss (`cross_entropy.py`),
attention (`models/attention.py`).

Shapes: T tokens, M inputs, N outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from pingjia.tune.buffers import BUFFERS

Tensor = torch.Tensor


def fuse(model: nn.Module) -> None:
    """Let adapted linears, gated units and norms of a network take the shorter way wherever they can."""
    for module in model.modules():
        shorter = _shorter_way(module)
        if shorter is not None and "forward" not in module.__dict__:  # else it takes another way already
            module.forward = partial(shorter, module, module.forward)


def _shorter_way(module: nn.Module) -> Callable[..., Tensor] | None:
    if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
        return _adapted_linear
    if _is_gated_unit(module):
        return _gated_unit
    return _norm if type(module).__name__ in _RMS_NORMS else None


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """While open, every module is called, hooks included, as if nothing had been fused."""
    fused = [(m, m.__dict__.pop("forward")) for m in model.modules() if is_fused(m)]
    try:
        yield
    finally:
        for module, forward in fused:
            module.forward = forward


def is_fused(module: nn.Module) -> bool:
    """Whether a module takes a shorter way where it can."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func in (_adapted_linear, _gated_unit, _norm)


def is_fused_unit(module: nn.Module) -> bool:
    """Whether it is a gated unit that does."""
    return is_fused(module) and _is_gated_unit(module)


def _like(x: Tensor) -> Tensor:
    """An uninitialised tensor of this shape and format."""
    return BUFFERS.empty(x.reshape(-1, x.shape[-1]), x.shape[-1]).view(x.shape)


# ---- an adapted linear


def _adapted_linear(module: Any, otherwise: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapter = None if args or kwargs else _plain_adapter(module, x)
    if adapter is None:
        return otherwise(x, *args, **kwargs)
    base, rest = module.base_layer, _matrices(module, adapter)
    if _is_plain(base, x):
        product: Tensor = AdaptedProduct.apply(x, None, base.weight, base.bias, *rest)
        return product
    total: Tensor = AdaptedSum.apply(base(x), x, *rest)
    return total


def _plain_adapter(module: Any, x: Tensor) -> str | None:
    """Name of the one adapter that is at work, if it is a plain LoRA in the format of x; else None."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.disable_adapters or module.merged or module.lora_variant:
        return None
    (name,) = names
    same = x.dtype == module.lora_A[name].weight.dtype and module.lora_B[name].bias is None
    return name if same and not torch.is_autocast_enabled(x.device.type) else None


def _is_plain(base: Any, x: Tensor) -> bool:
    """Whether a base is a linear of floats like x that do not learn."""
    return type(base) is nn.Linear and base.weight.dtype == x.dtype and not base.weight.requires_grad


def _matrices(module: Any, name: str) -> tuple[Tensor, Tensor, float, float]:
    """(A, B, factor, share of inputs that is dropped)."""
    dropout = module.lora_dropout[name]
    dropped = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], dropped


class AdaptedProduct(torch.autograd.Function):
    """W h + bias + factor * B A dropout(h), where h is x, or silu(gate) * x. W and bias do not learn."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        weight_NM: Tensor,
        bias_N: Tensor | None,
        a_RM: Tensor,
        b_NR: Tensor,
        factor: float,
        dropped: float,
    ) -> Tensor:
        x_TM = x.reshape(-1, x.shape[-1])
        gate_TM = None if gate is None else gate.reshape(x_TM.shape)
        h_TM = _gated(x_TM, gate_TM)
        keep_TM = _kept(h_TM, dropped)
        ctx.factor = factor / (1 - dropped)
        inner_TR = (h_TM if keep_TM is None else h_TM * keep_TM) @ a_RM.T
        out_TN = _linear(h_TM, weight_NM, bias_N)
        out_TN.addmm_(inner_TR, b_NR.T, alpha=ctx.factor)
        ctx.save_for_backward(x_TM, gate_TM, keep_TM, inner_TR, weight_NM, a_RM, b_NR)
        ctx.shape = x.shape
        return out_TN.view(*x.shape[:-1], out_TN.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TM, gate_TM, keep_TM, inner_TR, weight_NM, a_RM, b_NR = ctx.saved_tensors
        grad_TN = grad.reshape(-1, grad.shape[-1])
        grad_inner_TR = (grad_TN @ b_NR).mul_(ctx.factor)
        grad_b_NR = (grad_TN.T @ inner_TR).mul_(ctx.factor) if ctx.needs_input_grad[5] else None
        silu_TM = None if gate_TM is None else _silu(gate_TM)
        grad_a_RM = None
        if ctx.needs_input_grad[4]:
            h_TM = x_TM if silu_TM is None else torch.mul(silu_TM, x_TM, out=_like(x_TM))
            grad_a_RM = grad_inner_TR.T @ (h_TM if keep_TM is None else h_TM * keep_TM)
            del h_TM
        grad_x = grad_gate = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_h_TM = _grad_of_input(grad_TN, weight_NM, grad_inner_TR, a_RM, keep_TM)
            if silu_TM is None:
                grad_x = grad_h_TM.view(ctx.shape)
            else:
                grad_x = silu_TM.mul_(grad_h_TM).view(ctx.shape)
                grad_gate = _silu_backward_(grad_h_TM.mul_(x_TM), gate_TM).view(ctx.shape)
        return grad_x, grad_gate, None, None, grad_a_RM, grad_b_NR, None, None


def _linear(h_TM: Tensor, weight_NM: Tensor, bias_N: Tensor | None) -> Tensor:
    out_TN = BUFFERS.empty(h_TM, weight_NM.shape[0])
    if bias_N is None:
        return torch.mm(h_TM, weight_NM.T, out=out_TN)
    return torch.addmm(bias_N, h_TM, weight_NM.T, out=out_TN)


def _grad_of_input(
    grad_TN: Tensor, weight_NM: Tensor, grad_inner_TR: Tensor, a_RM: Tensor, keep_TM: Tensor | None
) -> Tensor:
    grad_h_TM = torch.mm(grad_TN, weight_NM, out=BUFFERS.empty(grad_TN, weight_NM.shape[1]))
    if keep_TM is None:
        return grad_h_TM.addmm_(grad_inner_TR, a_RM)
    return grad_h_TM.add_((grad_inner_TR @ a_RM).mul_(keep_TM))


class AdaptedSum(torch.autograd.Function):
    """y + factor * B A dropout(x), where y is what a base of another format gave."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a_RM: Tensor, b_NR: Tensor, factor: float, dropped: float) -> Tensor:
        x_TM = x.reshape(-1, x.shape[-1])
        keep_TM = _kept(x_TM, dropped)
        ctx.factor = factor / (1 - dropped)
        inner_TR = (x_TM if keep_TM is None else x_TM * keep_TM) @ a_RM.T
        ctx.save_for_backward(x_TM, keep_TM, inner_TR, a_RM, b_NR)
        ctx.shape = x.shape
        return torch.addmm(y.reshape(-1, y.shape[-1]), inner_TR, b_NR.T, alpha=ctx.factor).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TM, keep_TM, inner_TR, a_RM, b_NR = ctx.saved_tensors
        grad_TN = grad.reshape(-1, grad.shape[-1])
        grad_inner_TR = (grad_TN @ b_NR).mul_(ctx.factor)
        grad_b_NR = (grad_TN.T @ inner_TR).mul_(ctx.factor)
        grad_a_RM = grad_inner_TR.T @ (x_TM if keep_TM is None else x_TM * keep_TM)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = grad_inner_TR @ a_RM
            grad_x = (grad_x if keep_TM is None else grad_x.mul_(keep_TM)).view(ctx.shape)
        return grad, grad_x, grad_a_RM, grad_b_NR, None, None


def _kept(h_TM: Tensor, dropped: float) -> Tensor | None:
    """True where dropout keeps an element; None without dropout."""
    return torch.empty_like(h_TM, dtype=torch.bool).bernoulli_(1 - dropped) if dropped else None


# ---- a gated unit


def _is_gated_unit(module: nn.Module) -> bool:
    """The feed-forward part that Llama, Qwen, Mistral and others share: down(silu(gate(x)) * up(x))."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    is_silu = isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
    return is_silu and all(isinstance(part, nn.Linear | LoraLayer) for part in parts)


def _gated_unit(module: Any, otherwise: Callable[..., Tensor], x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        return otherwise(x)
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    adapter = _plain_adapter(down, up) if isinstance(down, LoraLayer) else None
    if adapter is None or not _is_plain(down.base_layer, up):
        hidden: Tensor = down(GatedUnit.apply(up, gate))
        return hidden
    base = down.base_layer
    product: Tensor = AdaptedProduct.apply(up, gate, base.weight, base.bias, *_matrices(down, adapter))
    return product


class GatedUnit(torch.autograd.Function):
    """silu(gate) * x, which keeps the two and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return _gated(x, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        return _silu(gate).mul_(grad), _silu_backward_(grad * x, gate)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else _silu(gate).mul_(x)


def _silu(x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.silu.out(x, out=_like(x))
    return result


def _silu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of silu(x), written over `grad`."""
    result: Tensor = torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
    return result


# ---- a norm


_RMS_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
"""Those of transformers that are weight * x / root mean square of x, with the constant under the root."""


def _norm(module: Any, otherwise: Callable[..., Tensor], x: Tensor) -> Tensor:
    weight = module.weight
    if weight.requires_grad or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return otherwise(x)
    normed: Tensor = RootMeanSquareNorm.apply(x, weight, module.variance_epsilon)
    return normed


class RootMeanSquareNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x * x) + eps) over the last dimension. The weight does not learn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = (length.square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x, inverse, out=_like(x)).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        slope = torch.mul(grad, weight, out=_like(x))
        share = torch.linalg.vecdot(slope, x).unsqueeze(-1).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return slope.mul_(inverse).addcmul_(x, share), None, None
