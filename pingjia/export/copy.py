"""A model that a run trained itself -> a directory to hand over, in another number format if wanted, with proof.

The output_dir of such a run serves and loads as it is. This leaves its checkpoints and logs behind, and halves the file
by dtype=float16 or bfloat16. Not here: adapters, which are merged first (merge.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pingjia.errors import ModelError
from pingjia.export.merge import TOLERANCE, ExportReport, logits_of, max_diff
from pingjia.models import load_model
from pingjia.tune.checkpoint import new_directory, write_bytes
from pingjia.tune.directory import save_network
from pingjia.tune.run import read_about


def export_model(
    directory: Path, out: Path, *, save_tokenizer: Callable[[Path], None], dtype: str = "auto"
) -> ExportReport:
    """Save the trained model in `directory` anew as `out`, numbers in `dtype` ("auto": as they are).

    Raises ModelError when there is no such model, or the saved files do not answer as it does; `out` is then not
    created. Refuses an `out` that exists.
    """
    if out.exists():
        raise ModelError(f"{out} exists; choose a new directory, nothing is overwritten")
    about = read_about(directory)
    if about is None or about.get("finetuning_type", "lora") == "lora":
        raise ModelError(f"{directory}: no trained model here (pingjia.json is missing, or of an adapter)")
    prompts = [chat["ids"] for chat in about["chat"]["golden"]]
    wanted = logits_of(load_model(directory), prompts)
    model = load_model(directory, dtype=dtype)
    with new_directory(out, model.num_parameters() * model.dtype.itemsize) as folder:
        save_network(folder, model)
        save_tokenizer(folder)
        got = logits_of(load_model(folder, dtype=dtype), prompts)
        report = ExportReport(
            base=about["base"]["name"],
            adapter=str(directory),
            num_merged_modules=0,
            num_prompts=len(prompts),
            max_logit_diff=max_diff(got, wanted),
            tolerance=TOLERANCE[model.dtype],
            max_change_from_base=about["proof"]["max_change_from_base"],
            stored_bytes=sum(path.stat().st_size for path in folder.iterdir()),
        )
        if report.max_logit_diff > report.tolerance:
            raise ModelError(
                f"the saved model does not answer as the trained one: logits differ by {report.max_logit_diff:.3g}, "
                f"allowed {report.tolerance:g}; nothing was exported"
            )
        write_bytes(folder / "export_report.json", (json.dumps(asdict(report), indent=2) + "\n").encode())
    return report
