"""The recipe keys of this room; flat, at the top level of the file."""

from typing import Annotated, Literal

from pydantic import BeforeValidator

from pingjia.recipe import Section

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _long_name(value: object) -> object:
    return "bitsandbytes" if value == "bnb" else value


Method = Annotated[Literal["auto", "pingjia", "bitsandbytes"], BeforeValidator(_long_name)]


class ModelSettings(Section):
    """Which network, in which number format, on which device."""

    model_name_or_path: str
    dtype: Dtype = "auto"  # auto: the checkpoint's own on a GPU, float32 on a CPU
    quantization_bit: Literal[4, 8] | None = None  # pack the base's linears; the adapter stays in floats (QLoRA)
    quantization_method: Method = "auto"  # auto: bitsandbytes on cuda where it is installed, else pingjia's own formats
    quantization_type: Literal["nf4", "fp4"] = "nf4"  # bitsandbytes with 4 bits
    double_quantization: bool = True  # bitsandbytes with 4 bits: the scales are packed too
    device: str = "auto"  # auto: cuda, npu or mps when torch finds one, else cpu
