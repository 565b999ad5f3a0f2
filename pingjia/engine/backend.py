"""What computes the steps of an engine: the compiled pass where it knows the network, else torch. Chosen once."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pingjia.engine.fused import FusedRunner, description_for
from pingjia.engine.fused_kv import FusedPool
from pingjia.engine.fused_network import Description
from pingjia.engine.kv import KVPool, LayerShape, kept_as
from pingjia.engine.lora import AdapterRows
from pingjia.engine.runner import Runner
from pingjia.engine.settings import EngineSettings
from pingjia.models.family import Family
from pingjia.models.loader import max_model_len
from pingjia.quant import prepare_for_inference

_log = logging.getLogger(__name__)
_KV_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class Backend:
    """Makes the pool and the runner that belong together. `layers`: what pages keep per token."""

    model: PreTrainedModel
    family: Family
    settings: EngineSettings
    layers: dict[int, LayerShape]
    description: Description | None

    def pool(self, num_pages: int) -> KVPool | FusedPool:
        kind = KVPool if self.description is None else FusedPool
        return kind(self.layers, num_pages, self.settings.page_size)

    def runner(self, pool: KVPool | FusedPool, adapter_rows: AdapterRows) -> Runner | FusedRunner:
        """The network is taken over: packed layers are reordered for the kernels where these are there."""
        if isinstance(pool, KVPool):
            if self.model.device.type == "cpu":
                prepare_for_inference(self.model)
            return Runner(self.model, self.family, pool, adapter_rows)
        assert self.description is not None
        return FusedRunner(
            self.model, self.family, self.description, pool, adapter_rows, quantize_head=self.settings.quantize_head
        )


def choose_backend(
    model: PreTrainedModel, family: Family, settings: EngineSettings, layers: dict[int, LayerShape]
) -> Backend:
    """Decide by the network, the machine and `settings.fused`; `layers` are as the network itself computes."""
    length = min(settings.max_model_len or max_model_len(model.config), max_model_len(model.config))
    description = description_for(model, length, settings.fused)
    if description is not None:
        _log.info("steps are computed by the compiled pass")
    stored = _KV_DTYPES.get(settings.kv_cache_dtype)
    if stored is None and description is not None:
        stored = torch.float16  # finer than the int8 that the activations are rounded to before every product
    return Backend(model, family, settings, layers if stored is None else kept_as(layers, stored), description)
