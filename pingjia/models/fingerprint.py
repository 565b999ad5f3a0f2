"""A short name for "these very base weights", so that an adapter is not put on another base by mistake."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from pingjia.models.source import Source
from pingjia.models.vocabulary import ADDED

TUNED = "tuned_by_run"
"""Key of config.json: the fingerprint of the run that trained these weights, with or without the norms."""


def base_fingerprint(model: torch.nn.Module) -> str:
    """sha256 over the names and values of all one-dimensional parameters (norms and biases).

    They differ between any two trainings of one architecture, are never quantised, and are few enough to hash in
    milliseconds. Values are rounded to bfloat16 first, so the number format a base was loaded in does not matter.
    Tokens added to the vocabulary (vocabulary.py) count too, and a run that trained some of the weights (TUNED): both
    may leave those parameters as they were.
    """
    return fingerprint_of(getattr(model, "config", None), model.named_parameters())


def fingerprint_of(config: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The same from a config and named tensors, the network's other ones among them or not."""
    digest = hashlib.sha256()
    added, tuned = getattr(config, ADDED, None), getattr(config, TUNED, None)
    if added:
        digest.update(f"{ADDED}:{added['sha256']}".encode())
    if tuned:
        digest.update(f"{TUNED}:{tuned}".encode())
    for name, parameter in sorted(tensors, key=lambda item: item[0]):
        if parameter.ndim == 1 and parameter.is_floating_point():
            digest.update(f"{name}:{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def source_fingerprint(source: Source) -> str:
    """`base_fingerprint` of the network of a source, without loading it."""
    small = source.read(n for n, shape in source.shapes.items() if len(shape) == 1)
    return fingerprint_of(source.config, small.items())
