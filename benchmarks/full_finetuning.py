"""Full fine-tuning against LoRA and QLoRA: time and updates to the same held-out loss, memory, bytes on the disk.

    python benchmarks/full_finetuning.py [--updates 32] [--trial-updates 6] [--batch 4] [--held-out 16] [--arms ...]

Every arm is `pingjia.tune.train` on the packaged SmolLM2 (135 million weights) in float32 on the CPU, on the packaged
sample rows: the same rows in the same updates, AdamW at a constant rate, clipping at 1.0, no dropout. `full` trains
every weight, `lora` r=16 on all linears, `qlora_int8` and `qlora_int4` the same over a base whose linears are packed.

Rates: each arm tries the RATES below for a few updates and goes on with the one of the lowest held-out loss; the trials
are not in its time. The loss to reach is the lowest that every arm reached: the worst of their best ones. Time is that
of the updates alone, without looks at held-out rows; between two looks it is interpolated. Memory is the highest
resident memory of the arm's process, Python and libraries included. Bytes are those of what a run leaves to be served,
and of one checkpoint (weights and optimizer).

Every run is in a process of its own. Progress goes to stderr; the last line of stdout is the report as JSON, which is
also written to benchmarks/results/full_finetuning.json. About 8 minutes on two cores.
Needs `pip install 'pingjia[model]'` with constraints.txt, and 6 GB of disk for a while.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "full_finetuning.json"
LORA = {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "all"}
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of the model, of the tuning
    "full": ({}, {"finetuning_type": "full"}),
    "lora": ({}, LORA),
    "qlora_int8": ({"quantization_bit": 8}, LORA),
    "qlora_int4": ({"quantization_bit": 4}, LORA),
}
RATES = {"full": (3e-5, 1e-4), "lora": (5e-4, 2e-3), "qlora_int8": (5e-4, 2e-3), "qlora_int4": (5e-4, 2e-3)}
SEED = 3


# ---- one run, in its own process


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    """One arm at one rate."""
    from pingjia.data.settings import DataSettings
    from pingjia.meter import Meter
    from pingjia.models.settings import ModelSettings
    from pingjia.tune import train
    from pingjia.tune.journal import read_log
    from pingjia.tune.settings import TuneSettings

    model, tune = ARMS[options.arm]
    with tempfile.TemporaryDirectory() as place, Meter() as meter:
        out = Path(place) / "out"
        settings = TuneSettings(
            output_dir=str(out),
            learning_rate=options.rate,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            max_steps=options.updates,
            per_device_train_batch_size=options.batch,
            eval_steps=options.look,
            save_steps=max(1, options.updates - 1),
            save_total_limit=2,
            seed=SEED,
            report_to=["none"],
            **tune,
        )
        rows = DataSettings(
            dataset="samples:customer_service.jsonl", eval_dataset=held_out_rows(Path(place), options.held_out)
        )
        result = train(ModelSettings(model_name_or_path="smollm2", device="cpu", **model), rows, settings)
        logs = read_log(out / "trainer_log.jsonl")
        sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in out.glob("checkpoint-*")]
        return {
            "curve": curve(logs),
            "seconds": result.seconds,
            "learnt_tokens": result.learnt_tokens,
            "peak_bytes": meter.peak_bytes,
            "result_bytes": result.stored_bytes,
            "checkpoint_bytes": max(sizes),  # the last one of a run has no optimizer any more
        }


def held_out_rows(folder: Path, count: int) -> list[str]:
    """The first rows of the packaged held-out file."""
    import pingjia

    packaged = Path(pingjia.__file__).parent / "data" / "samples" / "customer_service.heldout.jsonl"
    file = folder / "held_out.jsonl"
    file.write_text("\n".join(packaged.read_text(encoding="utf-8").splitlines()[:count]) + "\n", encoding="utf-8")
    return [str(file)]


def curve(logs: list[Any]) -> list[dict[str, float]]:
    """Updates made, seconds of them, held-out loss: a point for every look."""
    points, seconds = [], 0.0
    for log in logs:
        seconds += log.seconds
        if log.eval_loss is not None:
            points.append({"updates": log.step, "seconds": round(seconds, 3), "held_out_loss": log.eval_loss})
    return points


# ---- all arms


def main() -> None:
    options = arguments()
    if options.arm:
        print(json.dumps(run_one(options)))
        return
    arms = options.arms.split(",")
    runs = {arm: run_arm(arm, options) for arm in arms}
    target = max(min(point["held_out_loss"] for point in run["curve"]) for run in runs.values())
    report = {
        "machine": machine(),
        "settings": {key: getattr(options, key) for key in ("updates", "trial_updates", "batch", "held_out", "look")},
        "target_held_out_loss": target,
        "arms": {arm: run | {"to_target": reached(run["curve"], target)} for arm, run in runs.items()},
    }
    if "full" in runs:
        report["full_over_arm"] = {arm: against(report["arms"]["full"], found) for arm, found in report["arms"].items()}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=32)
    parser.add_argument("--trial-updates", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=16, help="rows of the held-out file")
    parser.add_argument("--look", type=int, default=4, help="updates between two looks at them")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_arm(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Its trials, then its run at the better rate."""
    trials = {}
    for rate in RATES[arm]:
        trial = in_own_process(arm, rate, options.trial_updates, options.trial_updates, options)
        trials[rate] = trial["curve"][-1]["held_out_loss"]
        print(f"{arm} rate {rate:g}: held-out loss {trials[rate]:.4f}", file=sys.stderr, flush=True)
    best = min(trials, key=lambda rate: trials[rate])
    run = in_own_process(arm, best, options.updates, options.look, options)
    print(f"{arm}: {run['seconds']:.0f} s, peak {run['peak_bytes'] / 1e9:.2f} GB", file=sys.stderr, flush=True)
    return {"learning_rate": best, "trials": {f"{rate:g}": loss for rate, loss in trials.items()}, **run}


def in_own_process(arm: str, rate: float, updates: int, look: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", arm, "--rate", str(rate), "--updates", str(updates)]
    command += ["--look", str(look), "--batch", str(options.batch), "--held-out", str(options.held_out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def reached(points: list[dict[str, float]], target: float) -> dict[str, float]:
    """Updates and seconds at which the curve first goes through `target`; straight lines between looks."""
    before: dict[str, float] | None = None
    for point in points:
        if point["held_out_loss"] <= target:
            share = 1.0
            if before is not None:
                share = (before["held_out_loss"] - target) / (before["held_out_loss"] - point["held_out_loss"])
            start = before or {"updates": 0.0, "seconds": 0.0}
            return {key: round(start[key] + share * (point[key] - start[key]), 2) for key in ("updates", "seconds")}
        before = point
    raise ValueError(f"{target} is not reached")


def against(full: dict[str, Any], arm: dict[str, Any]) -> dict[str, float]:
    """How many times as much full fine-tuning takes."""
    return {
        "seconds_to_target": round(full["to_target"]["seconds"] / arm["to_target"]["seconds"], 3),
        "updates_to_target": round(full["to_target"]["updates"] / arm["to_target"]["updates"], 3),
        "peak_bytes": round(full["peak_bytes"] / arm["peak_bytes"], 3),
        "result_bytes": round(full["result_bytes"] / arm["result_bytes"], 1),
        "checkpoint_bytes": round(full["checkpoint_bytes"] / arm["checkpoint_bytes"], 1),
    }


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
