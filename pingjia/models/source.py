"""The tensors of a model, read one by one, whatever the model is kept in.

Not here: finding the model of a name (`original.py`), running the network over them (`skeleton.py`, `walk.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from pingjia.errors import ModelError
from pingjia.models.checkpoint import StoredTensor, read_chatglm_config, read_tensors

_COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")


class Source:
    """Config and tensors. `raw_config`: config.json as it is. `shapes`: name -> shape of every stored tensor."""

    def __init__(
        self, name: str, config: Any, raw_config: dict[str, Any], stored: Mapping[str, StoredTensor | torch.Tensor]
    ) -> None:
        self.name, self.config, self.raw_config = name, config, raw_config
        self._stored = {n: t for n, t in stored.items() if not n.endswith(_COMPUTED)}
        self.shapes = {n: tuple(t.shape) for n, t in self._stored.items()}

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Copies of the named tensors as they are stored. ModelError for one that is not there."""
        found, files = {}, {}
        for name in names:
            tensor = self._stored.get(name)
            if tensor is None:
                raise ModelError(f"{self.name}: tensor {name} is missing; this checkpoint is incomplete")
            if isinstance(tensor, StoredTensor):
                files[name] = tensor
            else:
                found[name] = tensor
        return found | {name: tensor.clone() for name, tensor in read_tensors(files)}

    def require(self, names: Iterable[str], optional: Collection[str] = ()) -> None:
        """Raise ModelError unless exactly these tensors are stored; those in `optional` may be absent."""
        wanted = set(names)
        for word, odd in (
            ("missing", wanted - set(self.shapes) - set(optional)),
            ("left over", set(self.shapes) - wanted),
        ):
            if odd:
                raise ModelError(
                    f"{self.name}: {len(odd)} tensors are {word} for a {type(self.config).__name__}: "
                    f"{', '.join(sorted(odd)[:3])}"
                )


def read_any_config(directory: Path, raw: Mapping[str, Any]) -> Any:
    """The config object of a directory, of ChatGLM or of a network of transformers."""
    if raw["model_type"] == "chatglm":
        return read_chatglm_config(directory)
    return AutoConfig.from_pretrained(directory, local_files_only=True)
