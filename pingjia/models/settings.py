"""The recipe keys of this room; flat, at the top level of the file."""

from typing import Literal

from pingjia.recipe import Section

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSettings(Section):
    """Which network, in which number format, on which device."""

    model_name_or_path: str
    dtype: Dtype = "auto"  # auto: the checkpoint's own on a GPU, float32 on a CPU
    quantization_bit: Literal[4, 8] | None = None  # pack the base's linears; the adapter stays in floats (QLoRA)
    device: str = "auto"  # auto: cuda, npu or mps when torch finds one, else cpu
