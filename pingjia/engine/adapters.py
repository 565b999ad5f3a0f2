"""A PEFT adapter directory -> matrices checked against a network. Says no rather than serve something else.

Plain LoRA on the linears of the blocks, and rows of the embedding and the head that were trained whole, are applied as
they are, without merging; whatever else PEFT can train is refused by name with the advice to merge it. How they are
applied is in lora.py and token_rows.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors.torch
import torch
from transformers import PreTrainedModel

from pingjia import chat
from pingjia.chat import Tokenizer
from pingjia.engine.lora import AdaptedLinear, LoraWeights
from pingjia.engine.token_rows import TokenRows, bare, read_rows
from pingjia.errors import ModelError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ABOUT_FILE = "pingjia.json"
_TENSOR = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<which>[AB])\.weight")
_ROWS = re.compile(r"base_model\.model\.(?P<path>.+)\.token_adapter\.trainable_tokens_delta")
_APPLIED = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "trainable_token_indices",
}  # fmt: skip
# Fields that decide how an adapter is trained or where it came from, not what it computes.
_WITHOUT_EFFECT = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "megatron_core", "loftq_config", "eva_config", "qalora_group_size",
}  # fmt: skip
# PEFT's ways to start training that leave the base as it is; the others (PiSSA, OLoRA, ...) also change base weights.
_HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")


@runtime_checkable
class Linear(Protocol):
    """A linear layer of any storage format."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """A checked adapter. `digest`: sha256 of its files; two adapters with equal digests are the same adapter."""

    path: Path
    digest: str
    weights: Mapping[str, LoraWeights]
    token_rows: Mapping[str, TokenRows]


def read_adapter(
    path: str | Path, model: PreTrainedModel, tokenizer: Tokenizer, base_fingerprint: str, *, max_rank: int
) -> Adapter:
    """Read the adapter in directory `path` and check it against the network, its tokenizer and its fingerprint.

    Raises ModelError: not an adapter, of a rank over `max_rank`, of a kind that must be merged first, for another base,
    trained with another chat template, with missing, unknown, mis-shaped or not-a-number tensors, or without any
    effect.
    """
    path = Path(path).expanduser()
    files = {name: _read(path, name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    config = _as_json(path / CONFIG_FILE, files[CONFIG_FILE])
    _refuse_other_kinds(path, config)
    _refuse_other_base(path, tokenizer, base_fingerprint)
    tensors, rows = _tensors(path, files[WEIGHTS_FILE])
    linears = _linears(model)
    _refuse_high_rank(path, tensors, max_rank)
    _refuse_missing(path, tensors, _targets(path, config, linears))
    weights = {
        name: _weights(path, name, pair, config, linears[name], model.device) for name, pair in sorted(tensors.items())
    }
    token_rows = read_rows(path, config.get("trainable_token_indices"), rows, model)
    _refuse_idle(path, weights.values())
    _refuse_changed(path, files)
    digest = hashlib.sha256(files[CONFIG_FILE] + b"\0" + files[WEIGHTS_FILE]).hexdigest()
    return Adapter(path, digest, weights, token_rows)


def _refuse_changed(path: Path, files: Mapping[str, bytes]) -> None:
    """Files that are not those the run wrote (another alpha, another run's weights), where it noted which they are."""
    try:
        about = json.loads((path / ABOUT_FILE).read_bytes())
        written = dict(about.get("sha256") or {})
    except (OSError, ValueError, TypeError, AttributeError):
        return  # not an adapter of ours, or an older one
    for name, data in files.items():
        if name in written and written[name] != hashlib.sha256(data).hexdigest():
            raise ModelError(
                f"{path / name} is not the file that the run wrote: changed, or left from another run; take the "
                f"adapter from where it was trained (to serve it all the same, remove {ABOUT_FILE})"
            )


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except OSError as e:
        found = (
            ", ".join(sorted(p.name for p in directory.iterdir())[:6]) if directory.is_dir() else "no such directory"
        )
        raise ModelError(
            f"{directory}: not a PEFT adapter: {name}: {e.strerror} (found: {found or 'nothing'})"
        ) from None


def _as_json(file: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as e:
        raise ModelError(f"{file}: not JSON: {e}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected a mapping, found a {type(value).__name__}")
    return value


def _refuse_other_kinds(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{path}: peft_type {kind!r} cannot be applied while serving, only LORA; merge it first")
    odd = [k for k, v in config.items() if k not in _APPLIED | _WITHOUT_EFFECT and not _is_neutral(k, v)]
    if odd:
        shown = ", ".join(f"{k}={config[k]!r}" for k in sorted(odd))
        raise ModelError(f"{path}: {shown}: the engine applies plain LoRA only; merge this adapter into its base first")


def _is_neutral(key: str, value: Any) -> bool:
    if key == "init_lora_weights":
        return any(value is harmless or value == harmless for harmless in _HARMLESS_INIT)
    return value in (None, False, "none") or value == [] or value == {}


def _refuse_other_base(path: Path, tokenizer: Tokenizer, base_fingerprint: str) -> None:
    if not (path / ABOUT_FILE).exists():
        return  # an adapter of another tool: its shapes and names are all there is to go by
    about = _as_json(path / ABOUT_FILE, _read(path, ABOUT_FILE))
    base = about.get("base") or {}
    if base.get("fingerprint") not in (None, base_fingerprint):
        raise ModelError(
            f"{path}: trained on another base model: {base.get('name', 'unnamed')}, fingerprint "
            f"{base['fingerprint'][:12]}, not {base_fingerprint[:12]}; serve it on its own base"
        )
    golden = (about.get("chat") or {}).get("golden")
    if golden:
        _check_golden(path, tokenizer, golden)


def _check_golden(path: Path, tokenizer: Tokenizer, golden: Any) -> None:
    try:
        chat.check_golden(tokenizer, golden)
    except ModelError as e:
        raise ModelError(f"{path}: trained with another chat template than this base renders: {e}") from None
    except (KeyError, TypeError) as e:
        raise ModelError(f"{path / ABOUT_FILE}: damaged: its golden chats have no messages and ids: {e!r}") from None


def _tensors(path: Path, data: bytes) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Module path -> {"A": [R, I], "B": [O, R]}, and module path -> rows of tokens [N, H]."""
    try:
        tensors = safetensors.torch.load(data)
    except Exception as e:  # the library has its own error type and several of Python's
        raise ModelError(f"{path / WEIGHTS_FILE}: cannot be read: {e}") from None
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    rows: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{path}: tensor {name} holds values that are not numbers: its training went wrong")
        if match := _TENSOR.fullmatch(name):
            pairs.setdefault(str(match["path"]), {})[str(match["which"])] = tensor.float()
        elif match := _ROWS.fullmatch(name):
            rows[str(match["path"])] = tensor.float()
        else:
            raise ModelError(
                f"{path}: unknown tensor {name}: the engine applies lora_A and lora_B of linears, and rows of tokens; "
                "merge it first"
            )
    return pairs, rows


def _linears(model: PreTrainedModel) -> dict[str, Linear]:
    """Every linear of the blocks by its path; the head is none of them (it sees other rows than its block)."""
    head = bare(model.get_output_embeddings())
    modules: dict[str, torch.nn.Module] = dict(model.named_modules())
    wrapped = {f"{name}.base": name for name, m in modules.items() if isinstance(m, AdaptedLinear)}
    return {wrapped.get(name, name): m for name, m in modules.items() if m is not head and isinstance(m, Linear)}


def _targets(path: Path, config: Mapping[str, Any], linears: Iterable[str]) -> set[str]:
    """The linears PEFT would adapt under this config."""
    wanted = config.get("target_modules") or []
    found = {name for name in linears if _is_target(name, wanted, config)}
    if isinstance(wanted, list):
        idle = [t for t in wanted if not any(_ends_with(name, t) for name in linears)]
        if idle:
            raise ModelError(
                f"{path}: target module {idle[0]!r} is no linear of this network's blocks: another base, or merge first"
            )
    return found


def _is_target(name: str, wanted: str | list[str], config: Mapping[str, Any]) -> bool:
    excluded = config.get("exclude_modules") or []
    if re.fullmatch(excluded, name) if isinstance(excluded, str) else any(_ends_with(name, e) for e in excluded):
        return False
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, name) is not None
    return name in wanted or (any(_ends_with(name, t) for t in wanted) and _in_layers(name, config))


def _in_layers(name: str, config: Mapping[str, Any]) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    match = next((m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name))), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _refuse_missing(path: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], targets: set[str]) -> None:
    unknown = sorted(set(tensors) - targets)
    if unknown:
        raise ModelError(
            f"{path}: tensors for {unknown[0]}, which its config does not target in this network: another base?"
        )
    for module in sorted(targets):
        absent = {"A", "B"} - set(tensors.get(module, {}))
        if absent:
            raise ModelError(f"{path}: lora_{min(absent)} of {module} is missing: the file is incomplete")


def _refuse_high_rank(path: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], max_rank: int) -> None:
    for module, pair in sorted(tensors.items()):
        rank = min(min(tensor.shape, default=0) for tensor in pair.values())
        if rank > max_rank:
            raise ModelError(
                f"{path}: rank {rank} ({module}) is over the limit of {max_rank}; raise engine.max_lora_rank, or train "
                "with a lower rank"
            )


def _weights(
    path: Path, name: str, pair: Mapping[str, torch.Tensor], config: Mapping[str, Any], linear: Linear, device: Any
) -> LoraWeights:
    rank = _by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    for which, expected in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
        if tuple(pair[which].shape) != expected:
            raise ModelError(
                f"{path}: lora_{which} of {name} has shape {tuple(pair[which].shape)}, not {expected}: another base?"
            )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraWeights(pair["A"].to(device), (pair["B"] * scale).to(device))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's path."""
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module)), default)


def _refuse_idle(path: Path, weights: Iterable[LoraWeights]) -> None:
    if not any(w.a_RI.any() and w.b_OR.any() for w in weights):
        raise ModelError(
            f"{path}: every delta is zero, so it equals the base model: nothing was trained, or the wrong file saved"
        )
