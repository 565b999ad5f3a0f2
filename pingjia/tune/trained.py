"""What a run trains, as its checkpoints keep it: an adapter in PEFT's format, or weights of the network itself.

Not here: which weights those are (lora.py, weights.py), and when they are written (checkpoint.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from pingjia.errors import TrainingError
from pingjia.tune.checkpoint import ADAPTER_FILE, load_tensors, refused, write_adapter
from pingjia.tune.frozen import Model
from pingjia.tune.phases import trainable_names

WEIGHTS_FILE = "trained.safetensors"
_MOMENTS = 2  # numbers that AdamW keeps for each weight


class Trained(ABC):
    """What the two kinds share. `file`: where in a checkpoint the weights are. `what`: its name in messages."""

    file: str
    what: str

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights as they are now, by their names in the file."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the weights as they are now."""

    @abstractmethod
    def load(self, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
        """Put weights back. TrainingError when they are not all of this run's kind."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Of the weights in a file."""

    @property
    def checkpoint_bytes(self) -> int:
        """Of a checkpoint: weights and what the optimizer keeps."""
        return (1 + _MOMENTS) * self.weight_bytes


class AdapterWeights(Trained):
    """An adapter on a network that stays as it is."""

    file, what = ADAPTER_FILE, "adapter"

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        return found

    def write(self, folder: Path) -> None:
        write_adapter(folder, self._model)

    def load(self, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
        load_tensors(self._model, tensors, where)

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self._model.parameters() if p.requires_grad)


class NetworkWeights(Trained):
    """Weights of the network, all or some, by their names in it; one that is used twice is there once.

    Made while all that the run trains is open. Written without a copy in memory: they may be most of it.
    """

    file, what = WEIGHTS_FILE, "weight"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._names = model, trainable_names(model)
        self._weight_bytes = sum(p.numel() * p.element_size() for _, p in self._own())

    def _own(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self._model.named_parameters() if name in self._names]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self._own()}

    def write(self, folder: Path) -> None:
        write_tensors(folder / self.file, {name: t.cpu().contiguous() for name, t in self.tensors().items()})

    def load(self, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
        if set(tensors) != self._names:
            odd = sorted(set(tensors) ^ self._names)
            raise TrainingError(
                f"{where}: weights of another kind of run: {len(odd)} names differ, the first: {odd[0]}"
            )
        with torch.no_grad():
            for name, parameter in self._own():
                parameter.copy_(tensors[name])

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes


def trained_of(model: Model) -> Trained:
    """For a model whose weights are open as the run trains them."""
    return AdapterWeights(model) if isinstance(model, PeftModel) else NetworkWeights(model)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file, written from where the tensors are. OSError when the disk refuses."""
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as e:
        raise refused(e, path) from None
