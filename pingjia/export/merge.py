"""Base + adapter -> one model directory, with proof that what was saved is what was trained.

The proof is made on the files, not in memory: the directory is loaded again and its logits on the adapter's golden
chats are compared with base-plus-adapter before merging. Nothing appears under the target's name unless that holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel

from pingjia.errors import ModelError
from pingjia.models import added_tokens, base_fingerprint, load_model
from pingjia.quant.formats import PackedLinear
from pingjia.tune.checkpoint import ADAPTER_FILE, file_digests, new_directory, write_bytes
from pingjia.tune.directory import save_network
from pingjia.tune.guards import require_nonzero_adapter
from pingjia.tune.run import read_about

# float32 merge of W + BA against x W + (x A) B: rounding only. Half precision rounds the merged weight itself.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
_PROMPT_LEN = 128


@dataclass(frozen=True, slots=True)
class ExportReport:
    """Logits are compared over whole prompts; differences are absolute, in logit units."""

    base: str
    adapter: str  # or the model that was trained itself
    num_merged_modules: int
    num_prompts: int
    max_logit_diff: float
    tolerance: float
    max_change_from_base: float
    stored_bytes: int = 0


def merge_adapter(
    adapter_dir: Path,
    out: Path,
    *,
    base: str | Path | None = None,
    save_tokenizer: Callable[[Path], None],
    dtype: str = "auto",
) -> ExportReport:
    """Merge the adapter into its base and save a directory any transformers tool loads.

    Raises ModelError when the adapter is not of this base, changes nothing, or the saved files do not answer as the
    adapter did; `out` is then not created. Refuses an `out` that exists.
    """
    if out.exists():
        raise ModelError(f"{out} exists; choose a new directory, nothing is overwritten")
    about = read_about(adapter_dir)
    if about is None:
        raise ModelError(f"{adapter_dir}: no finished adapter here (no pingjia.json)")
    if about.get("finetuning_type", "lora") != "lora":
        raise ModelError(f"{adapter_dir} is a model of its own, not an adapter; there is nothing to merge")
    base = base or about["base"]["name"]
    model = load_model(base, dtype=dtype)
    require_floats(model, base)
    prompts = [*(chat["ids"] for chat in about["chat"]["golden"]), *new_token_prompts(model)]
    require_same_base(model, about["base"]["fingerprint"], base)
    tensors = read_adapter(adapter_dir)
    require_nonzero_adapter(tensors)
    plain = logits_of(model, prompts)
    adapted = PeftModel.from_pretrained(model, adapter_dir)
    require_all_used(adapted, tensors)
    require_as_written(adapter_dir, about)
    wanted = logits_of(adapted, prompts)
    merged = adapted.merge_and_unload()
    with new_directory(out) as folder:
        save_network(folder, merged)
        save_tokenizer(folder)
        got = logits_of(load_model(folder, dtype=dtype), prompts)
        report = ExportReport(
            base=str(base),
            adapter=str(adapter_dir),
            num_merged_modules=sum("lora_A" in name for name in tensors),
            num_prompts=len(prompts),
            max_logit_diff=max_diff(got, wanted),
            tolerance=TOLERANCE[merged.dtype],
            max_change_from_base=max_diff(got, plain),
            stored_bytes=sum(p.stat().st_size for p in folder.iterdir()),
        )
        require_proof(report)
        write_bytes(folder / "export_report.json", (json.dumps(asdict(report), indent=2) + "\n").encode())
    return report


def read_adapter(adapter_dir: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors. ModelError for a file that is missing or torn, before PEFT looks for it elsewhere."""
    try:
        json.loads((adapter_dir / CONFIG_NAME).read_bytes())
        return safetensors.torch.load_file(adapter_dir / ADAPTER_FILE)
    except (OSError, ValueError, safetensors.SafetensorError) as e:
        raise ModelError(f"{adapter_dir}: the adapter cannot be read: {e}") from None


def new_token_prompts(model: PreTrainedModel) -> list[list[int]]:
    """Every token added to the base's vocabulary, since golden chats need not hold any whose rows were trained."""
    tokens = added_tokens(model.config)
    return [tokens[i : i + _PROMPT_LEN] for i in range(0, len(tokens), _PROMPT_LEN)]


def require_floats(model: PreTrainedModel, base: str | Path) -> None:
    """Merging into few bits would round the adapter away without a word."""
    packed = next((m for m in model.modules() if isinstance(m, PackedLinear)), None)
    if packed is not None:
        raise ModelError(
            f"{base} is packed to {packed.bits} bits and nothing is merged into it. Give the float base with --base; "
            "for few bits with the adapter inside: pingjia quantize FLOAT_BASE --adapter ADAPTER --out DIR"
        )


def require_as_written(adapter_dir: Path, about: Mapping[str, Any]) -> None:
    """Refuse files that are not those the run wrote; an adapter from before digests were kept is taken as it is."""
    written, found = about.get("sha256"), file_digests(adapter_dir)
    if written is None or written == found:
        return
    name = next(name for name in found if written.get(name) != found[name])
    hint = ""
    if name == CONFIG_NAME:
        alpha, trained = json.loads((adapter_dir / name).read_bytes()).get("lora_alpha"), about["recipe"]["lora_alpha"]
        hint = f" (lora_alpha is {alpha:g}, trained with {trained:g})" if alpha != trained else ""
    raise ModelError(
        f"{adapter_dir / name} is not the file that the run wrote{hint}: changed, or left from another run; "
        "take the adapter from where it was trained, or train again"
    )


def require_same_base(model: PreTrainedModel, fingerprint: str, base: str | Path) -> None:
    if base_fingerprint(model) != fingerprint:
        raise ModelError(f"{base} is not the base this adapter was trained on (its weights differ); give the right one")


def require_all_used(adapted: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name or ".trainable_tokens_delta." in name]
    loaded = {name.replace(".default", "") for name in names}
    if loaded != set(tensors):
        odd = sorted(loaded ^ set(tensors))
        raise ModelError(
            f"{len(odd)} adapter tensors have no place in this network or are missing, for example {odd[0]}"
        )


def require_proof(report: ExportReport, saved: str = "the saved model") -> None:
    """Refuse a model that does not answer as base plus adapter, or that answers as the base alone."""
    if report.max_change_from_base <= min(report.max_logit_diff, report.tolerance):
        raise ModelError(f"{saved} equals its base: the adapter was not merged, so it is not what was trained")
    if report.max_logit_diff > report.tolerance:
        raise ModelError(
            f"{saved} does not answer as the adapter did: logits differ by {report.max_logit_diff:.3g}, "
            f"allowed {report.tolerance:g}; it is not what was trained"
        )
    if report.max_change_from_base <= report.max_logit_diff:
        raise ModelError(f"{saved} is no nearer to the adapter than to its base; it is not what was trained")


@torch.inference_mode()
def logits_of(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """[T, V] in float32 of each prompt."""
    device = next(model.parameters()).device
    return [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float() for ids in prompts]


def max_diff(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """The largest absolute difference between logits of the same prompts."""
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
