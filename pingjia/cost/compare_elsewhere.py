"""What the measured comparison would be for another network on another machine: estimates, each with its formula.

Nothing here is measured, and nothing here goes into a table of what was. The figures of the other machine are the
caller's; those of ChatGLM-6B are of its published shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pingjia.cost.compare import Arm, reached


@dataclass(frozen=True, slots=True)
class Network:
    """`linears`: weights that a QLoRA packs; `adapter_per_rank`: LoRA parameters for each rank, all linears adapted."""

    name: str
    weights: int
    linears: int
    adapter_per_rank: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """`tflops`: dense products in half precision at their peak; `utilisation`: the share of it that training gets."""

    name: str
    tflops: float
    gb_per_s: float
    memory_gb: float
    utilisation: float
    price_per_hour: float | None = None


# 28 layers: query_key_value 4096 x 12288, dense 4096 x 4096, 4096 x 16384 and back; embeddings 130528 x 4096.
CHATGLM_6B = Network("ChatGLM-6B", 6_173_286_400, 28 * 12 * 4096**2, 28 * (16_384 + 8_192 + 2 * 20_480))
GPU_24GB = Hardware("a 24 GB GPU", tflops=165, gb_per_s=1008, memory_gb=24, utilisation=0.35)

FORMULAS = {
    "tokens": "as many trained tokens to the same held-out loss as were measured here",
    "train_hours": "tokens * weights * FLOP per weight and token (full 6; LoRA and QLoRA 4: no gradient of the base's "
    "weights) / (tflops * utilisation) / 3600; unpacking 4 and 8 bits is not counted",
    "memory_gb": "full: 16 bytes per weight (half-precision weight and gradient, float32 copy, two moments); LoRA: 2 "
    "bytes per weight, QLoRA: 1 or 0.5 per packed weight and 2 for the others, and 16 per adapter parameter; without "
    "activations",
    "stored_gb": "half precision: 2 bytes per weight, or per adapter parameter",
    "ms_per_token": "bytes of the weights that are served / gb_per_s, at batch 1: a floor, memory alone",
    "money": "train_hours * price_per_hour of that machine",
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """One arm elsewhere. `fits`: whether memory_gb is below that machine's. `money`: None without a price."""

    arm: str
    tokens: int
    train_hours: float
    memory_gb: float
    fits: bool
    stored_gb: float
    ms_per_token: float
    money: float | None


def estimates(arms: Sequence[Arm], loss: float, rank: int, network: Network, machine: Hardware) -> list[Estimate]:
    """One for every arm that reached the loss."""
    found = []
    for arm in arms:
        point = reached(arm.curve, loss)
        if point is not None:
            found.append(_estimate(arm.name, round(point.tokens), rank, network, machine))
    return found


def _estimate(arm: str, tokens: int, rank: int, network: Network, machine: Hardware) -> Estimate:
    is_full = arm == "full"
    adapter = 0 if is_full else rank * network.adapter_per_rank
    flop = tokens * network.weights * (6 if is_full else 4)
    hours = flop / (machine.tflops * 1e12 * machine.utilisation) / 3600
    served = _weight_bytes(arm, network)
    memory = (16 * network.weights if is_full else served + 16 * adapter) / 1e9
    return Estimate(
        arm=arm,
        tokens=tokens,
        train_hours=hours,
        memory_gb=memory,
        fits=memory <= machine.memory_gb,
        stored_gb=2 * (network.weights if is_full else adapter) / 1e9,
        ms_per_token=served / (machine.gb_per_s * 1e9) * 1000,
        money=None if machine.price_per_hour is None else hours * machine.price_per_hour,
    )


def _weight_bytes(arm: str, network: Network) -> float:
    packed = {"qlora_int8": 1.0, "qlora_int4": 0.5}.get(arm, 2.0)
    return network.linears * packed + (network.weights - network.linears) * 2.0


def as_report(found: Sequence[Estimate], network: Network, machine: Hardware) -> Mapping[str, Any]:
    """Estimates together with all they rest on."""
    return {
        "is_measured": False,
        "network": asdict(network),
        "machine": asdict(machine),
        "formulas": FORMULAS,
        "arms": [asdict(estimate) for estimate in found],
    }
