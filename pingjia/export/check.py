"""Is a model directory what a run's adapter and base make? For directories that are there, whoever made them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel

from pingjia.errors import ModelError
from pingjia.export.merge import (
    TOLERANCE,
    ExportReport,
    logits_of,
    max_diff,
    new_token_prompts,
    read_adapter,
    require_all_used,
    require_as_written,
    require_floats,
    require_proof,
    require_same_base,
)
from pingjia.models import load_model
from pingjia.models.loader import read_config
from pingjia.models.packed import is_packed_directory
from pingjia.tune.guards import require_nonzero_adapter
from pingjia.tune.run import read_about

CheckChats = Callable[[Path, list[dict[str, object]]], None]


def check_export(
    adapter_dir: Path, exported: Path, *, base: str | Path | None, check_chats: CheckChats
) -> ExportReport:
    """Hold `exported` against base plus adapter: every tensor, the tokenizer, the answers. Changes nothing.

    `check_chats(directory, golden)` loads the directory's own tokenizer and renders the golden chats. Raises ModelError
    saying what is wrong: the base saved again, another run's adapter, another alpha, tensors or a tokenizer missing.
    """
    about = read_about(adapter_dir)
    if about is None or about.get("finetuning_type", "lora") != "lora":
        raise ModelError(f"{adapter_dir}: no finished adapter here to check against")
    if is_packed_directory(read_config(exported)):
        raise ModelError(
            f"{exported} is packed to few bits; its proof is quantization.json (pingjia quantize --verify)"
        )
    base = base or about["base"]["name"]
    require_as_written(adapter_dir, about)
    check_chats(exported, about["chat"]["golden"])
    found = load_model(exported)  # refuses tensors that are missing, left over or of another shape
    model = load_model(base, dtype=found.dtype)
    require_floats(model, base)
    require_same_base(model, about["base"]["fingerprint"], base)
    prompts = [*(chat["ids"] for chat in about["chat"]["golden"]), *new_token_prompts(model)]
    tensors = read_adapter(adapter_dir)
    require_nonzero_adapter(tensors)
    plain = logits_of(model, prompts)
    adapted = PeftModel.from_pretrained(model, adapter_dir)
    require_all_used(adapted, tensors)
    got = logits_of(found, prompts)
    report = ExportReport(
        base=str(base),
        adapter=str(adapter_dir),
        num_merged_modules=sum("lora_A" in name for name in tensors),
        num_prompts=len(prompts),
        max_logit_diff=max_diff(got, logits_of(adapted, prompts)),
        tolerance=TOLERANCE[found.dtype],
        max_change_from_base=max_diff(got, plain),
        stored_bytes=sum(path.stat().st_size for path in exported.iterdir()),
    )
    require_proof(report, saved=str(exported))
    return report
