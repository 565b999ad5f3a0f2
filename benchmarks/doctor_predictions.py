"""What `pingjia doctor` predicts of a run, beside the run itself: memory, time and tokens/s over six settings.

    python benchmarks/doctor_predictions.py [--updates 16] [--settings lora,full,...] [--out FILE]

Settings: LoRA, QLoRA over INT8 and over INT4, full fine-tuning, LoRA with activation checkpointing, and LoRA on rows
three times as long. SmolLM2 in float32 on the packaged rows. The prediction is `pingjia.tune.rehearse.rehearse`, which
is what doctor calls; the run is `pingjia.tune.train` on the same settings. Each is in a process of its own, the
prediction first. Memory: the plan (arithmetic) and the peak of the rehearsal (measured on the longest batch), each
against the peak of the run; doctor's own figure is the rehearsal's. Time: of all updates, without looks and loading.

Aims: memory within 15 %, time and tokens/s within 25 %. The last line is JSON; exit code 1 when an aim is missed. About
ten minutes on two quiet cores; on a busy machine time says nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "doctor_predictions.json"
MAX_MEMORY_ERROR, MAX_TIME_ERROR = 0.15, 0.25
LORA = {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "all", "learning_rate": 1e-3}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # model, tuning, rows joined to one
    "lora": ({}, LORA, 1),
    "qlora_int8": ({"quantization_bit": 8}, LORA, 1),
    "qlora_int4": ({"quantization_bit": 4}, LORA, 1),
    "full": ({}, {"finetuning_type": "full", "learning_rate": 1e-4}, 1),
    "checkpointing": ({}, LORA | {"gradient_checkpointing": True}, 1),
    "longer_rows": ({}, LORA, 3),
}


def settings_of(name: str, folder: Path, updates: int) -> tuple[Any, Any, Any]:
    from pingjia.data.settings import DataSettings
    from pingjia.models.settings import ModelSettings
    from pingjia.tune.settings import TuneSettings

    model, tune, joined = SETTINGS[name]
    settings = TuneSettings(
        output_dir=str(folder / "out"),
        max_steps=updates,
        per_device_train_batch_size=4,
        save_steps=updates,
        report_to=["none"],
        **tune,
    )
    rows = DataSettings(dataset=str(rows_file(folder, joined)))
    return ModelSettings(model_name_or_path="smollm2", device="cpu", **model), rows, settings


def rows_file(folder: Path, joined: int) -> Path:
    """The packaged rows; or so many of them as the turns of one conversation."""
    import pingjia

    packaged = Path(pingjia.__file__).parent / "data" / "samples" / "customer_service.jsonl"
    rows = [json.loads(line) for line in packaged.read_text(encoding="utf-8").splitlines()]
    out = folder / "rows.jsonl"
    parts = [rows[i : i + joined] for i in range(0, len(rows) - joined + 1, joined)]
    out.write_text("".join(json.dumps(conversation(part), ensure_ascii=False) + "\n" for part in parts), "utf-8")
    return out


def conversation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    turns = [(role, row[key]) for row in rows for role, key in (("user", "prompt"), ("assistant", "response"))]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def predicted(name: str, updates: int) -> dict[str, Any]:
    from pingjia.tune.rehearse import rehearse

    with tempfile.TemporaryDirectory() as folder:
        found = rehearse(*settings_of(name, Path(folder), updates))
    return {
        "planned_bytes": found.memory.total if found.memory else None,
        "peak_bytes": found.peak_bytes,
        "seconds": found.seconds_estimated,
        "tokens_per_s": found.tokens_per_s,
    }


def real(name: str, updates: int) -> dict[str, Any]:
    from pingjia.tune import train

    with tempfile.TemporaryDirectory() as folder:
        found = train(*settings_of(name, Path(folder), updates))
    return {
        "peak_bytes": found.peak_bytes,
        "seconds": found.seconds,
        "tokens_per_s": found.trained_tokens / found.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps({"predicted": predicted, "real": real}[options.one[0]](options.one[1], options.updates)))
        return
    rows = {name: compare(name, options.updates) for name in options.settings.split(",")}
    report = {"machine": machine(), "updates": options.updates, "settings": rows}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    sys.exit(1 if any(row["missed"] for row in rows.values()) else 0)


def compare(name: str, updates: int) -> dict[str, Any]:
    guess, fact = (in_own_process(what, name, updates) for what in ("predicted", "real"))
    errors = {key: round(guess[key] / fact[key] - 1, 4) for key in ("peak_bytes", "seconds", "tokens_per_s")}
    errors["planned_bytes"] = round(guess["planned_bytes"] / fact["peak_bytes"] - 1, 4)
    limits = {key: MAX_MEMORY_ERROR if key.endswith("bytes") else MAX_TIME_ERROR for key in errors}
    missed = [key for key, error in errors.items() if abs(error) > limits[key]]
    print(f"{name}: {errors}{' MISSED ' + ', '.join(missed) if missed else ''}", file=sys.stderr, flush=True)
    return {"predicted": guess, "real": fact, "errors": errors, "missed": missed}


def in_own_process(what: str, name: str, updates: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", what, name, "--updates", str(updates)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def machine() -> dict[str, Any]:
    from pingjia.cli.machine import cpu_model, usable_cores

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "load_average": round(os.getloadavg()[0], 1),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
