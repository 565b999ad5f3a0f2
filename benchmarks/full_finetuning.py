"""Full fine-tuning against LoRA and QLoRA: time and updates to the same held-out loss, memory, bytes, answers, money.

    python benchmarks/full_finetuning.py [--updates 20] [--trial-updates 4] [--held-out 16] [--arms ...] [--folder DIR]

This is `pingjia cost compare` on recipes/demo.yaml: SmolLM2 (135 million weights) in float32 on the CPU, the packaged
rows, LoRA r=16 on all linears, AdamW at a constant rate, clipping at 1.0. What is measured and how is in docs/cost.md.

Progress goes to stderr; the report is written to benchmarks/results/full_finetuning.json with machine, commit and date,
and is the last line of stdout. About ten minutes on two quiet cores; --folder keeps the runs, and goes on from them.
Needs `pip install 'pingjia[model]'` with constraints.txt, and 6 GB of disk for a while.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pingjia.cli.compare import Options, print_outcome, run_comparison
from pingjia.cli.compare_arms import ARMS, Length
from pingjia.cli.machine import cpu_model, usable_cores
from pingjia.cli.schema import load_recipe

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "full_finetuning.json"


def main() -> None:
    options = arguments()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="full-finetuning-"))
    length = Length(options.updates, options.look, options.trial_updates)
    wanted = Options(tuple(options.arms.split(",")), length, options.held_out, serving=not options.no_serving)
    changed = [f"output_dir={folder}", f"per_device_train_batch_size={options.batch}"]
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", [*changed, "device=cpu"])
    try:
        outcome = run_comparison(recipe, wanted, lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print_outcome(outcome)
    report = {"machine": machine(), "settings": settings(options), **outcome.to_dict()}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, ensure_ascii=False))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--trial-updates", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=16, help="rows of the held-out file")
    parser.add_argument("--look", type=int, default=4, help="updates between two looks at them")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--no-serving", action="store_true", help="leave out how the results answer")
    parser.add_argument("--folder", type=Path, help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if key not in ("out", "folder")}


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
