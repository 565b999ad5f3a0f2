"""How a model is to be compressed. Torch-free, so that the command line can check it before anything loads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pingjia.errors import ModelError

GROUP_SIZES = (32, 64, 128)
METHODS = ("gptq", "rtn")
LAYOUTS = ("group", "published")
QUANT_METHOD = "pingjia"
"""`quantization_config.quant_method` of the directories that are written."""


@dataclass(frozen=True, slots=True)
class QuantizeSettings:
    """bits: of the linears in the blocks. head_bits: of embedding and head; 16 leaves them as they are stored.

    method: gptq (calibrated) or rtn (each weight to its nearest value). damping: added to the diagonal of the inputs'
    Gram matrix, as a share of its mean. act_order: columns with the largest inputs first, with scales fixed beforehand
    (SmolLM2, groups of 64: perplexity up 10 % instead of 16).
    """

    bits: int = 4
    group_size: int = 64
    method: str = "gptq"
    head_bits: int = 8
    act_order: bool = True
    damping: float = 0.01
    layout: str = "group"

    def check(self) -> None:
        """Raise ModelError naming what cannot be had."""
        _one_of("bits", self.bits, (4, 8))
        _one_of("head bits", self.head_bits, (4, 8, 16))
        _one_of("group size", self.group_size, GROUP_SIZES)
        _one_of("method", self.method, METHODS)
        _one_of("layout", self.layout, LAYOUTS)
        if not 0 < self.damping < 1:
            raise ModelError(f"damping {self.damping}: give a share of the mean diagonal, above 0 and under 1")
        if self.layout == "published" and self.method != "rtn":
            raise ModelError("the published layout has one scale per row and is rounded to nearest: give --method rtn")
        if self.layout == "published" and self.head_bits != 16:
            raise ModelError("the published layout keeps embedding and head as they are: give --head-bits 16")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ModelError(f"{name} {value}: choose {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}")
