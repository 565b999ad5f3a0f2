"""Rows per second and peak memory of `pingjia data prepare`, at two sizes, beside `datasets` and pandas doing the same.

Every side runs in its own process over the same synthetic file and does the same work: parse, reject rows without a
question or an answer, count tokens and drop rows over 1,024, tell the language by characters, find exact duplicates,
write what is kept. pingjia also does what it does by default and the others do not: rules, personal data, near
duplicates, reasons for every rejected row, a report.

    python benchmarks/prepare_rows.py [--small 100000] [--large 1000000] [--processes 2]

Needs the extra `bench` (datasets; pandas comes with it).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "prepare_rows.json"
CUTOFF = 1024
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def ours(file: Path, out: Path, processes: int, *, plain: bool) -> dict[str, int]:
    from pingjia.data import Job, prepare
    from pingjia.data.settings import DataSettings, PrepareSettings

    settings: dict[str, Any] = {"processes": processes}
    if plain:  # what the others do, and no more
        settings |= {
            "personal": {"action": "off"},
            "rules": {"skip": ["repeated", "refusal", "markup", "echo", "language"]},
            "duplicates": {"near": None},
        }
    job = Job(
        DataSettings(dataset=[str(file)], cutoff_len=CUTOFF), PrepareSettings.model_validate(settings), "smollm2", out
    )
    report = prepare(job).report
    return {"rows": report.num_rows, "kept": report.num_kept}


@functools.cache
def tokenizer() -> Any:
    """Of this process."""
    from pingjia.chat import load_tokenizer

    return load_tokenizer("smollm2")


def fits(prompt: Any, response: Any, counter: Any) -> bool:
    from pingjia.types import Example, Message

    if not (isinstance(prompt, str) and isinstance(response, str) and prompt.strip() and response.strip()):
        return False
    example = Example((Message("user", prompt), Message("assistant", response)))
    return len(counter.encode_example(example).ids) <= CUTOFF


def is_chinese(text: str) -> bool:
    letters = sum(map(str.isalpha, text))
    return letters > 0 and sum("\u4e00" <= c <= "\u9fff" for c in text) * 2 > letters


def by_datasets(file: Path, out: Path, processes: int) -> dict[str, int]:
    import datasets

    datasets.disable_progress_bars()

    def judge(row: dict[str, Any]) -> dict[str, bool]:
        good = fits(row["prompt"], row["response"], tokenizer())
        return {"good": good, "zh": good and is_chinese(row["prompt"] + row["response"])}

    num = processes if processes > 1 else None
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(out / "cache"))
    total = len(rows)
    rows = rows.map(judge, num_proc=num).filter(lambda row: row["good"], num_proc=num)
    seen: set[tuple[str, str]] = set()

    def is_new(row: dict[str, Any]) -> bool:
        key = (row["prompt"], row["response"])
        return key not in seen and not seen.add(key)  # type: ignore[func-returns-value]

    rows = rows.filter(is_new)
    rows.to_json(str(out / "train.jsonl"), force_ascii=False)
    return {"rows": total, "kept": len(rows)}


def by_pandas(file: Path, out: Path) -> dict[str, int]:
    import pandas as pd

    counter = tokenizer()
    rows = pd.read_json(file, lines=True)
    total = len(rows)
    good = [fits(p, r, counter) for p, r in zip(rows["prompt"], rows["response"], strict=True)]
    rows = rows[good]
    rows["zh"] = [is_chinese(p + r) for p, r in zip(rows["prompt"], rows["response"], strict=True)]
    rows = rows.drop_duplicates(["prompt", "response"])
    rows.to_json(out / "train.jsonl", orient="records", lines=True, force_ascii=False)
    return {"rows": total, "kept": len(rows)}


SIDES = {
    "pingjia": lambda f, o, n: ours(f, o, n, plain=False),
    "pingjia, same work": lambda f, o, n: ours(f, o, n, plain=True),
    "datasets": by_datasets,
    "pandas": lambda f, o, n: by_pandas(f, o),
}


def child(side: str, file: str, out: str, processes: str) -> None:
    started = time.perf_counter()
    counts = SIDES[side](Path(file), Path(out), int(processes))
    seconds = time.perf_counter() - started
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps(counts | {"seconds": round(seconds, 2), "peak_mb": own // 1024, "peak_worker_mb": others // 1024}))


def measure(side: str, file: Path, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=file.parent) as out:
        command = [sys.executable, __file__, "--child", side, str(file), out, str(processes)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "killed"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result | {"rows_per_s": round(result["rows"] / result["seconds"])}


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sides", nargs="*", default=list(SIDES))
    parser.add_argument("--large-sides", nargs="*", default=["pingjia"], help="the others take long at a million rows")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from synthetic_rows import write

    RESULT.parent.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="prepare_rows."))
    results: dict[str, Any] = {"machine": machine(), "processes": options.processes, "sides": {}}
    try:
        for size in (options.small, options.large):
            file = folder / f"rows{size}.jsonl"
            write(file, size)
            for side in options.sides if size == options.small else options.large_sides:
                found = measure(side, file, options.processes)
                results["sides"].setdefault(side, {})[str(size)] = found
                print(f"{side:20} {size:>9,} rows: {found}", flush=True)
                RESULT.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            file.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
