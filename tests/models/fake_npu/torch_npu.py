"""An Ascend card that is not there: what torch_npu does to torch by being imported, as far as pingjia asks.

FAKE_NPU names the card. Tensors "on" it are the CPU's; only placement is simulated.
"""

import os
from types import SimpleNamespace

import torch

_NAME = os.environ["FAKE_NPU"]
_state = [torch.Generator().manual_seed(5).get_state()]
_asked: dict = {}

npu = SimpleNamespace(
    is_available=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    is_bf16_supported=lambda: "910B" in _NAME,
    get_device_name=lambda device=None: _NAME,
    mem_get_info=lambda device=None: (20 * 10**9, 32 * 10**9),
    get_device_properties=lambda device=None: SimpleNamespace(total_memory=32 * 10**9),
    set_per_process_memory_fraction=lambda share, device=None: _asked.update(share=share),
    get_rng_state_all=lambda: list(_state),
    set_rng_state_all=lambda states: _state.__setitem__(slice(None), states),
    asked=_asked,
)
npu_fusion_attention = None  # transformers imports it
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty.memory_format", lambda size, **_: torch.zeros(size), "PrivateUse1")
