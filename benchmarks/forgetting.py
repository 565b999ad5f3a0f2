"""Three tasks one after the other, A -> B -> C: what is left of A and B? Plain tuning against grown ranks and replay.

Both arms start from the same adapter of A and see the same rows of B and C, by `pingjia train` as a user would run it.
`naive` goes on training the one adapter (ewc with a lambda of 0, no replay); `ours` grows new ranks beside the frozen
ones, holds them at right angles, and replays. Probes are held-out wordings of the same facts. Where the gate refuses
the naive arm, that is noted, and the arm goes on with the gate open, to see where it ends.

    python benchmarks/forgetting.py [--topics 8] [--rows 3] [--epochs 6] [--replay 0.5] [--max-steps N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "forgetting.json"
TASKS = {"A": "customer_service", "B": "tutoring", "C": "writing"}
MIN_RETENTION = 0.8
RECIPE: dict[str, Any] = {
    "model_name_or_path": "smollm2",
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 4,
    "report_to": ["none"],
}


def rows_of(name: str) -> list[dict[str, Any]]:
    import pingjia.data

    file = Path(pingjia.data.__file__).parent / "samples" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def write_task(folder: Path, task: str, num_topics: int, rows_per_topic: int) -> dict[str, int]:
    """TASK.jsonl and TASK.held.jsonl: the first topics that have held-out wordings, so many rows of each."""
    learnt, held = rows_of(TASKS[task]), rows_of(f"{TASKS[task]}.heldout")
    asked = {row["topic"] for row in held}
    topics = [t for t in dict.fromkeys(row["topic"] for row in learnt) if t in asked][:num_topics]
    chosen = [row for t in topics for row in [r for r in learnt if r["topic"] == t][:rows_per_topic]]
    probe = [row for row in held if row["topic"] in topics]
    for name, rows in ((f"{task}.jsonl", chosen), (f"{task}.held.jsonl", probe)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    return {"topics": len(topics), "rows": len(chosen), "probe_questions": len(probe)}


class Arm:
    """One way through the tasks."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace, continual: dict[str, Any]) -> None:
        self.name, self._folder, self._args, self._continual = name, folder, args, continual
        self.blocked: list[dict[str, str]] = []
        self.seconds = 0.0

    def run(self, first: Path) -> dict[str, Any]:
        before = first
        for task in ("B", "C"):
            before = self._stage(task, before)
        about = json.loads((before / "pingjia.json").read_text(encoding="utf-8"))
        matrix = {
            row["stage"]: {
                probe: {"facts": score["facts"], "loss": round(score["loss"], 4)}
                for probe, score in sorted(row["scores"].items())
            }
            for row in about["accuracy"]
        }
        ranks = about["continual"]["ranks"]
        return {"matrix": matrix, "blocked": self.blocked, "ranks": ranks, "seconds": round(self.seconds, 1)}

    def _stage(self, task: str, before: Path) -> Path:
        out = self._folder / self.name / task
        recipe = recipe_of(self._folder, task, out, self._args)
        recipe |= {"continue_from": str(before), "continual": self._continual | {"min_retention": MIN_RETENTION}}
        started = time.perf_counter()
        code, words = train(recipe)
        self.seconds += time.perf_counter() - started
        if code == 2 and "not promoted" in words:
            self.blocked.append({"stage": task, "why": words[words.index("not promoted") :].strip()})
            recipe["continual"]["min_retention"] = 0.0
            code, words = train(recipe)
        if code:
            sys.exit(f"{self.name} {task}: exit code {code}\n{words}")
        return out


def recipe_of(folder: Path, task: str, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    return RECIPE | {
        "dataset": str(folder / f"{task}.jsonl"),
        "eval_dataset": str(folder / f"{task}.held.jsonl"),
        "output_dir": str(out),
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps,
    }


def train(recipe: dict[str, Any]) -> tuple[int, str]:
    """Exit code and output of `pingjia train`."""
    out = Path(recipe["output_dir"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "pingjia.cli.main", "train", str(out / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "400"})
    print(done.stdout, done.stderr[-2000:], sep="\n", flush=True)
    return done.returncode, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topics", type=int, default=8)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--replay", type=float, default=0.5)
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="forgetting-"))
    try:
        result = compare(folder, args)
    finally:
        shutil.rmtree(folder)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for name in ("naive", "ours"):
        show(name, result[name])


def compare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    tasks = {task: write_task(folder, task, args.topics, args.rows) for task in TASKS}
    code, words = train(recipe_of(folder, "A", folder / "A", args))
    if code:
        sys.exit(words)
    first = folder / "A"
    naive = Arm("naive", folder, args, {"method": "ewc", "ewc": 0.0}).run(first)  # no row is replayed
    ours = Arm("ours", folder, args, {"method": "grow", "replay_ratio": args.replay}).run(first)
    return {
        "what": "exact facts and loss on held-out wordings of each task after each stage, SmolLM2-135M",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "settings": {key: value for key, value in vars(args).items() if key != "out"}
        | {"min_retention": MIN_RETENTION},
        "recipe": RECIPE,
        "tasks": tasks,
        "naive": naive,
        "ours": ours,
    }


def show(name: str, arm: dict[str, Any]) -> None:
    print(f"{name}: {arm['seconds']} s; refused by the gate: {[b['stage'] for b in arm['blocked']] or 'never'}")
    for stage, scores in arm["matrix"].items():
        cells = "  ".join(f"{probe} {score['facts']:.0%} ({score['loss']:.2f})" for probe, score in scores.items())
        print(f"  after {stage}: {cells}")


if __name__ == "__main__":
    main()
