"""Learnt tokens per second and peak memory of LoRA training: ours, PEFT with transformers' Trainer, TRL's SFTTrainer.

    python benchmarks/train_speed.py [--updates 3] [--batch 8] [--repeats 3] [--sides ours,trainer,sft] [--out FILE]

All sides: SmolLM2-135M in float32 on the CPU, the first rows of ../shared/data/alpaca_zh_demo.json in the order of the
file, as token ids of one tokenizer, the same rows in every update, LoRA r=16 on all linears with the same starting
matrices' distribution, AdamW at the same constant rate, clipping at 1.0. What is learnt is the answer only, on every
side. Beyond that everybody runs with the defaults: 8 rows an update and rows of at most 1024 tokens, which are the
defaults of all three; the others pad to the longest row of a batch and compute logits of every position; ours lays rows
end to end, in micro-batches of about 1024 tokens. (One default of SFTTrainer is not kept: it would take bfloat16.
Gradient checkpointing, another of its defaults, is kept; --sides sft_no_checkpointing leaves it out.)

Each side runs in a process of its own, in turns; medians over the repeats. Learnt tokens over the seconds of all but
the first update; the peak is resident memory, weights and libraries included, since the network was loaded. The
held-out loss at the end is computed by one and the same code on every side's adapter. `padded` in the report says how
many tokens the others compute for each one that there is. The last line is JSON. The defaults take about 10 minutes on
two quiet cores and 16 GB. A busy machine: OMP_NUM_THREADS=1, and compare learnt_per_cpu_s.
Needs `pip install 'pingjia[model,bench]'` with constraints.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("ours", "trainer", "sft", "sft_no_checkpointing")
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "alpaca_zh_demo.json"
RANK, ALPHA, RATE, SEED = 16, 32, 2e-4, 3
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_HELD_OUT = 8


# ---- rows, the same for all


def encoded_rows(count: int, cutoff: int) -> tuple[list[Any], list[Any]]:
    """(rows to learn, held-out rows) as ids and what of them is learnt."""
    from pingjia import data
    from pingjia.chat import load_tokenizer
    from pingjia.data.layouts import parse_row

    raw = json.loads(DATA.read_text(encoding="utf-8"))
    parsed = [parse_row(row, f"{DATA.name}:{i}") for i, row in enumerate(raw)]
    found = [p.example for p in parsed if p.example is not None]
    rows, _ = data.encode_examples(found, load_tokenizer("smollm2"), cutoff)
    return rows[:count], rows[count : count + NUM_HELD_OUT]


def labels(row: Any) -> list[int]:
    return [token if learnt else -100 for token, learnt in zip(row.ids, row.learn, strict=True)]


def in_order(rows: list[Any], updates: int, batch: int) -> list[Any]:
    """Rows as every side takes them: no shuffling, over and over."""
    return [rows[i % len(rows)] for i in range(updates * batch)]


# ---- one side, in its own process


def network(dtype: str = "float32") -> Any:
    from pingjia.models import load_model

    model = load_model("smollm2", dtype=dtype)
    model.is_quantized = False  # read from GGUF, its weights are plain floats now; a Trainer would refuse it
    return model


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")


def ours(rows: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Our step as `pingjia train` runs it: packed rows in micro-batches, logits where learnt, fused adapters."""
    import torch
    from peft import get_peft_model

    from pingjia.models import family_of, use_packed_attention
    from pingjia.tune.batches import MAX_TOKENS_ON_CPU, share_out
    from pingjia.tune.distributed import ALONE
    from pingjia.tune.fused import fuse
    from pingjia.tune.relief import return_freed_memory
    from pingjia.tune.step import build_batch, update

    model = network()
    torch.manual_seed(SEED)
    adapted = get_peft_model(model, lora()).train()
    use_packed_attention(model)
    fuse(adapted)
    return_freed_memory()
    learning = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": learning, "lr": RATE, "peak": RATE}], weight_decay=0.0, fused=True)
    lengths = [len(row.ids) for row in rows]
    clock = Clock()
    for first in range(0, len(rows), options.batch):
        numbers = range(first, first + options.batch)
        micros = share_out(numbers, lengths, options.batch, max_tokens=MAX_TOKENS_ON_CPU)
        batches = [build_batch([rows[n] for n in m], family_of(model), model.config, model.device) for m in micros]
        update(ALONE, adapted, optimizer, batches, rate_factor=1.0, max_grad_norm=1.0)
        clock.tick()
    return clock.result(adapted)


def trainer(rows: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """PEFT's model in transformers' Trainer, with its collator for token ids and labels."""
    import torch
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from pingjia.chat import load_tokenizer

    model = network()
    torch.manual_seed(SEED)
    adapted = get_peft_model(model, lora())
    arguments = TrainingArguments(**common(options))
    given = [{"input_ids": list(r.ids), "attention_mask": [1] * len(r.ids), "labels": labels(r)} for r in rows]
    collate = DataCollatorForSeq2Seq(padder(load_tokenizer("smollm2")), padding=True)
    clock = Clock()
    in_file_order(Trainer)(
        model=adapted, args=arguments, train_dataset=given, data_collator=collate, callbacks=[clock.callback()]
    ).train()
    return clock.result(adapted)


def sft(rows: list[Any], options: argparse.Namespace, checkpointing: bool = True) -> dict[str, Any]:
    """TRL's SFTTrainer on the same ids; it puts on the adapter and collates by itself."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from pingjia.chat import load_tokenizer

    model = network()
    torch.manual_seed(SEED)
    arguments = SFTConfig(**common(options), bf16=False, max_length=None, gradient_checkpointing=checkpointing)
    given = Dataset.from_list([{"input_ids": list(r.ids), "labels": labels(r)} for r in rows])
    clock = Clock()
    made = in_file_order(SFTTrainer)(
        model=model,
        args=arguments,
        train_dataset=given,
        processing_class=padder(load_tokenizer("smollm2")),
        peft_config=lora(),
        callbacks=[clock.callback()],
    )
    made.train()
    return clock.result(made.model)


def common(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": options.updates,
        "per_device_train_batch_size": options.batch,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": SEED,
    }


def padder(tokenizer: Any) -> Any:
    """The packaged tokenizer for code that pads with transformers."""
    from transformers import PreTrainedTokenizerFast

    folder = Path(tempfile.mkdtemp())
    tokenizer.save(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder, pad_token="<|im_end|>", eos_token="<|im_end|>")


def in_file_order(kind: type) -> type:
    """The same trainer without shuffling: every side must see the same rows in the same updates."""
    import torch

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset if dataset is not None else self.train_dataset)

    return InOrder


class Clock:
    """Seconds of every update, by the clock and of the processor, and the peak since it was made."""

    def __init__(self) -> None:
        from pingjia.meter import Meter

        self._meter = Meter().__enter__()
        self._seconds: list[float] = []
        self._cpu_seconds: list[float] = []
        self.start()

    def start(self) -> None:
        self._before, self._cpu_before = time.perf_counter(), time.process_time()

    def tick(self) -> None:
        self._seconds.append(time.perf_counter() - self._before)
        self._cpu_seconds.append(time.process_time() - self._cpu_before)
        self.start()

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Tick(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.start()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.tick()

        return Tick()

    def result(self, model: Any) -> dict[str, Any]:
        return {
            "seconds": self._seconds,
            "cpu_seconds": self._cpu_seconds,
            "peak_bytes": self._meter.peak_bytes,
            "model": model,
        }


def run_side(options: argparse.Namespace) -> None:
    """Print one side's figures as JSON."""
    sys.path.remove(str(Path(__file__).resolve().parent))  # or a benchmark would be taken for a library of its name
    rows, held_out = encoded_rows(options.rows, options.cutoff)
    rows = in_order(rows, options.updates, options.batch)
    sides = {"ours": ours, "trainer": trainer, "sft": sft}
    with contextlib.redirect_stdout(io.StringIO()):
        if options.side == "sft_no_checkpointing":
            found = sft(rows, options, checkpointing=False)
        else:
            found = sides[options.side](rows, options)
        loss = held_out_loss(found.pop("model"), held_out)
    learnt = sum(row.num_learnt for row in rows[options.batch :])
    updates = [[len(row.ids) for row in rows[i : i + options.batch]] for i in range(0, len(rows), options.batch)]
    padded = sum(len(lengths) * max(lengths) for lengths in updates) / sum(map(sum, updates))
    rates = {
        "learnt_per_s": learnt / sum(found["seconds"][1:]),
        "learnt_per_cpu_s": learnt / sum(found["cpu_seconds"][1:]),
    }
    print(json.dumps(found | rates | {"held_out_loss": loss, "learnt": learnt, "padded": padded}))


def held_out_loss(model: Any, rows: list[Any]) -> float:
    """By our code, whatever trained the adapter."""
    from pingjia.models import family_of, use_packed_attention
    from pingjia.tune.step import build_batch, mean_loss

    base = model.get_base_model()
    use_packed_attention(base)
    return mean_loss(model, [build_batch([row], family_of(base), base.config, base.device) for row in rows])


# ---- all sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--cutoff", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", default="ours,trainer,sft")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options)
        return
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides.split(",")}
    for _ in range(options.repeats):
        for side, results in runs.items():
            results.append(in_own_process(side))
            print(side, {k: v for k, v in results[-1].items() if k != "seconds"}, file=sys.stderr)
    report = {"machine": machine(), "settings": settings(options), "sides": {s: summary(r) for s, r in runs.items()}}
    if "ours" in runs:
        report["against_ours"] = {s: against(report["sides"]["ours"], v) for s, v in report["sides"].items()}
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def in_own_process(side: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("learnt_per_s", "learnt_per_cpu_s", "peak_bytes", "held_out_loss", "learnt", "padded")
    middle = {name: statistics.median(run[name] for run in runs) for name in names}
    return middle | {"learnt_per_s_of_each": [round(run["learnt_per_s"], 2) for run in runs]}


def against(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    return {
        "our_speed_over_its": round(ours["learnt_per_s"] / other["learnt_per_s"], 3),
        "our_speed_over_its_by_cpu_time": round(ours["learnt_per_cpu_s"] / other["learnt_per_cpu_s"], 3),
        "our_memory_over_its": round(ours["peak_bytes"] / other["peak_bytes"], 3),
        "our_loss_minus_its": round(ours["held_out_loss"] - other["held_out_loss"], 7),
    }


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if key not in ("out", "side")}


if __name__ == "__main__":
    main()
