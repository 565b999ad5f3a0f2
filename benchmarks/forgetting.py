"""Three tasks one after the other, A -> B -> C: what is left of A and B? Plain tuning against grown ranks and replay.

Both arms start from the same adapter of A and see the same rows of B and C, by `pingjia train` as a user would run it.
`naive` goes on training the one adapter (ewc with a lambda of 0, no replay); `ours` grows new ranks beside the frozen
ones, holds them at right angles, and replays. The tasks are in forgetting_rows.py: eight invented facts each, four
wordings to learn and two held out, which are the probe. An answer counts when it states the fact to the character.
Where the gate refuses an arm, that is noted, and the arm goes on with the gate open, to see where it ends.

    python benchmarks/forgetting.py [--epochs 5] [--rate 1e-3] [--replay 1] [--folder DIR] [--out FILE]

With --folder a stopped experiment goes on where it was. Exit code 1 when a task was not learnt (less than 80 % of its
probe right after it was trained), when the gate let the naive arm through, or when it refused ours.
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

from forgetting_rows import TASKS, Fact

RESULT = Path(__file__).parent / "results" / "forgetting.json"
MIN_RETENTION = 0.8
MIN_LEARNT = 0.8
SYSTEM = "简短回答。"  # of every row: the model's own default is longer than the questions
RECIPE: dict[str, Any] = {
    "model_name_or_path": "smollm2",
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 4,
    "report_to": ["none"],
}


def write_task(folder: Path, task: str) -> dict[str, int]:
    """TASK.jsonl and TASK.held.jsonl."""
    facts = TASKS[task]
    learnt = [row_of(fact, question) for fact in facts for question in fact.learnt]
    held = [row_of(fact, question) for fact in facts for question in fact.held_out]
    for name, rows in ((f"{task}.jsonl", learnt), (f"{task}.held.jsonl", held)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    return {"facts": len(facts), "rows": len(learnt), "probe_questions": len(held)}


def row_of(fact: Fact, question: str) -> dict[str, Any]:
    turns = (("system", SYSTEM), ("user", question), ("assistant", fact.answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns], "facts": [fact.fact]}


class Arm:
    """One way through the tasks."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace, continual: dict[str, Any]) -> None:
        self.name, self._folder, self._args, self._continual = name, folder, args, continual
        self._noted = folder / f"{name}.blocked.json"  # so that an experiment that goes on knows of it
        self.blocked: list[dict[str, str]] = json.loads(self._noted.read_text("utf-8")) if self._noted.exists() else []
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
        recipe |= {
            "continue_from": str(before),
            "continual": self._continual | {"min_retention": MIN_RETENTION, "max_tokens": 32},
        }
        started = time.perf_counter()
        code, words = train(recipe)
        self.seconds += time.perf_counter() - started
        if code == 2 and "not promoted" in words:
            others = [each for each in self.blocked if each["stage"] != task]
            self.blocked = [*others, {"stage": task, "why": words[words.rindex("error: not promoted") :].strip()}]
            self._noted.write_text(json.dumps(self.blocked, ensure_ascii=False), encoding="utf-8")
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
        "learning_rate": args.rate,
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
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--replay", type=float, default=1.0, help="replayed rows for each new one, of our arm")
    parser.add_argument("--folder", type=Path, help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="forgetting-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = compare(folder, args)
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for name in ("naive", "ours"):
        show(name, result[name])
    wrong = unproved(result)
    sys.exit("\n".join(wrong) if wrong else 0)


def compare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    tasks = {task: write_task(folder, task) for task in TASKS}
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
        "settings": {"epochs": args.epochs, "rate": args.rate, "replay": args.replay, "min_retention": MIN_RETENTION},
        "recipe": RECIPE,
        "tasks": tasks,
        "naive": naive,
        "ours": ours,
    }


def unproved(result: dict[str, Any]) -> list[str]:
    """What the experiment was to show and did not."""
    found = [
        f"{arm}: only {right:.0%} of {task} were right after it was trained"
        for arm in ("naive", "ours")
        for task in TASKS
        if (right := result[arm]["matrix"][task][task]["facts"]) < MIN_LEARNT
    ]
    if not result["naive"]["blocked"]:
        found.append("naive: the gate let it through")
    return found + [f"ours: refused at {b['stage']}" for b in result["ours"]["blocked"]]


def show(name: str, arm: dict[str, Any]) -> None:
    print(f"{name}: {arm['seconds']} s; refused by the gate: {[b['stage'] for b in arm['blocked']] or 'never'}")
    for stage, scores in arm["matrix"].items():
        cells = "  ".join(f"{probe} {score['facts']:.0%} ({score['loss']:.2f})" for probe, score in scores.items())
        print(f"  after {stage}: {cells}")


if __name__ == "__main__":
    main()
