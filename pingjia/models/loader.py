"""A path on disk -> a network in eval mode. No remote code, no pickle beyond plain tensors, no downloads.

Does not know tokenizers (chat/) or adapters' training (tune/).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from pingjia.errors import ModelError
from pingjia.locate import locate_model
from pingjia.models.checkpoint import load_chatglm
from pingjia.models.device import pick_device, pick_dtype, require_packed_weights
from pingjia.models.packed import is_packed_directory, load_packed
from pingjia.models.registry import require_supported
from pingjia.quant import quantize_model
from pingjia.quant.bnb import BnbFormat, replace_linears, require_bitsandbytes
from pingjia.quant.convert import packable


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    bits: int | BnbFormat | None = None,
) -> PreTrainedModel:
    """Load the causal language model at `path` (directory, .gguf file or packaged name), eval mode.

    dtype: "auto" is float32 on a CPU and the checkpoint's own elsewhere. bits: 4 or 8 packs the linears of the blocks
    (rounded to nearest, one scale per row), a BnbFormat has bitsandbytes pack them; ChatGLM is packed while it is read,
    others after. None leaves what is stored as it is; a directory of `pingjia quantize` stays packed. Raises
    ModelError, one line, when anything of the checkpoint is missing, left over, of the wrong shape or of an unsupported
    kind.
    """
    location = locate_model(path)
    target = device if isinstance(device, torch.device) else pick_device(device)
    _check_bits(bits, target)
    raw_config = read_config(location) if location.is_dir() else {}
    with quiet():
        if is_packed_directory(raw_config):
            return load_packed(location, raw_config, dtype=dtype, device=target, bits=bits)
        if raw_config.get("model_type") == "chatglm":
            return load_chatglm(location, dtype=dtype, device=target, bits=bits)
        if location.is_file():
            model = _load_gguf(location, pick_dtype(dtype, target))
        else:
            model = _load_directory(location, dtype, target)
        if isinstance(bits, BnbFormat):
            replace_linears(model, packable(model), bits, target)
        elif bits is not None:
            quantize_model(model, bits)
    model.to(target)
    return model.eval()


def _check_bits(bits: int | BnbFormat | None, device: torch.device) -> None:
    if isinstance(bits, BnbFormat):
        require_bitsandbytes()
    elif bits not in (None, 4, 8):
        raise ModelError(f"bits={bits}: weights can be packed to 4 or 8 bits, or left as they are (None)")
    elif bits is not None:
        require_packed_weights(device, bits)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory as a dict; ModelError when it is absent or broken."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in directory.iterdir())[:6]) or "nothing"
        raise ModelError(f"{directory}: not a model directory: no config.json (found: {found})") from None
    except (OSError, ValueError) as e:
        raise ModelError(f"{file}: cannot be read: {e}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file}: says no model_type; this is not a transformers model")
    return config


def max_model_len(config: Any) -> int:
    """Tokens a sequence may have, prompt and answer together.

    A sliding window ends it too: inside the window full attention is exact, beyond it this package would be wrong.
    """
    limits = [config.max_position_embeddings]
    if getattr(config, "sliding_window", None) and "sliding_attention" in (
        getattr(config, "layer_types", None) or ["sliding_attention"]
    ):
        limits.append(config.sliding_window)
    return min(limits)


def _load_gguf(file: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        # The GGUF reader of transformers draws its own bar on stderr and offers no switch.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    except (ValueError, OSError, RuntimeError, KeyError, IndexError) as e:
        raise ModelError(f"{file}: cannot be loaded as GGUF: {_first_line(e)}") from None
    require_supported(model.config.model_type)
    # The weights are plain floats now, but transformers still takes them for GGUF and would refuse to save them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _load_directory(directory: Path, dtype: str | torch.dtype, device: torch.device) -> PreTrainedModel:
    require_supported(read_config(directory)["model_type"])
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=pick_dtype(dtype, device, getattr(config, "dtype", None)),
            local_files_only=True,
            output_loading_info=True,
            weights_only=True,
        )
    except Exception as e:  # safetensors, pickle, zip and transformers each have their own error types
        raise ModelError(f"{directory}: cannot be loaded: {_first_line(e)}") from None
    _refuse_incomplete(directory, info)
    return model


def _refuse_incomplete(directory: Path, info: dict[str, Any]) -> None:
    for kind, word in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "left over"),
        ("mismatched_keys", "mis-shaped"),
    ):
        names = sorted(str(n[0] if isinstance(n, tuple) else n) for n in info.get(kind) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(f"{directory}: {len(names)} tensors are {word}: {', '.join(names[:3])}{more}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers prints bars and weight reports to the terminal; ours say what matters."""
    before, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
        if bars:
            hf_logging.enable_progress_bar()
