"""ChatGLM-6B at its real size, packed, on this machine: what it weighs, and what it takes to load, run and tune it.

    python benchmarks/full_size.py [--bits 4|8] [--directory DIR] [--keep] [--out FILE] [--tiny]

The weights are random, so the text is noise; sizes, memory and times are those of the real network (28 layers of 4,096,
130,528 tokens). Three processes, one after the other, so that each one's peak is its own:
  build     makes the network layer by layer, directly packed, and saves it in shards of safetensors;
  generate  loads it and generates a few tokens (plain torch products, no compiled kernels);
  train     loads it and takes one LoRA step (r=16 on query_key_value) with gradient checkpointing.
Memory is the process's resident set as the kernel counts it (VmHWM), in bytes: Python, torch and mapped files included.
The last line is JSON. Needs about 6 GB of memory, 4 GB of disk and ten minutes. --tiny checks the script itself.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = ("build", "generate", "train")
PROMPT_TOKENS, NEW_TOKENS, TRAIN_TOKENS = 16, 4, 128
TINY = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 128}


# ---- memory of this process


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no /proc/self/status: this benchmark needs Linux")


def forget_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


# ---- the three steps


def build(directory: Path, bits: int, tiny: bool, float_tables: bool) -> dict[str, Any]:
    import torch

    from pingjia.models.chatglm import ChatGLMForCausalLM
    from pingjia.models.chatglm_config import ChatGLMConfig
    from pingjia.quant.convert import pack_tables
    from pingjia.quant.formats import PackedLinear

    torch.manual_seed(0)
    started = time.perf_counter()
    with torch.device("meta"):
        model = ChatGLMForCausalLM(ChatGLMConfig(quantization_bit=bits, **(TINY if tiny else {})))
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            fill_packed(module)
        elif isinstance(module, torch.nn.LayerNorm):
            module.weight = torch.nn.Parameter(torch.ones(module.normalized_shape, dtype=torch.float16))
            module.bias = torch.nn.Parameter(torch.zeros(module.normalized_shape, dtype=torch.float16))
        elif name == "transformer.word_embeddings" and float_tables:
            module.weight = torch.nn.Parameter(random_table(*module.weight.shape))
    if float_tables:
        model.lm_head.weight = model.transformer.word_embeddings.weight
    else:
        pack_tables(model, *random_packed(model.config.vocab_size, model.config.hidden_size, bits, 0.02), bits)
    built_s = time.perf_counter() - started
    model.save_pretrained(directory, max_shard_size="512MB")
    files = sorted(directory.glob("*.safetensors"))
    return {
        "build_s": built_s,
        "save_s": time.perf_counter() - started - built_s,
        "file_bytes": sum(f.stat().st_size for f in files),
        "num_shards": len(files),
        "build_peak_bytes": resident("VmHWM"),
    }


def fill_packed(linear: Any) -> None:
    import torch

    columns = linear.in_features
    weight, linear.weight_scale = random_packed(linear.out_features, columns, linear.bits, columns**-0.5)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features, dtype=torch.float16), requires_grad=False)


def random_packed(num_rows: int, num_columns: int, bits: int, spread: float) -> tuple[Any, Any]:
    """Random weights, rounded row by row; never the whole matrix in floats."""
    import torch

    from pingjia.quant.rows import quantize_rows, row_blocks, stored_columns

    weight = torch.empty(num_rows, stored_columns(num_columns, bits), dtype=torch.int8)
    scale = torch.empty(num_rows)
    for rows in row_blocks(num_rows, num_columns):
        block = torch.randn(rows.stop - rows.start, num_columns) * spread
        weight[rows], scale[rows] = quantize_rows(block, bits)
    return weight, scale.half()


def random_table(rows: int, columns: int) -> Any:
    import torch

    table = torch.empty(rows, columns, dtype=torch.float16)
    for start in range(0, rows, 4096):
        part = table[start : start + 4096]
        part.copy_(torch.randn(part.shape) * 0.02)
    return table


def load(directory: Path) -> tuple[Any, dict[str, Any]]:
    from pingjia.models.checkpoint import load_chatglm

    before, started = resident("VmRSS"), time.perf_counter()
    model = load_chatglm(directory)
    facts = {
        "load_s": time.perf_counter() - started,
        "imports_bytes": before,
        "load_peak_bytes": resident("VmHWM"),
        "loaded_bytes": resident("VmRSS"),
        "weight_bytes": sum(t.nbytes for t in {id(t): t for t in tensors_of(model)}.values()),
    }
    return model, facts


def tensors_of(model: Any) -> list[Any]:
    return [*model.parameters(), *model.buffers()]


def prompt(model: Any, count: int) -> Any:
    import torch

    config = model.config
    ids = torch.randint(1000, 50_000, (1, count - 2), generator=torch.Generator().manual_seed(1))
    return torch.cat((ids, torch.tensor([[config.gmask_token_id, config.bos_token_id]])), dim=1)


def generate(directory: Path) -> dict[str, Any]:
    import torch

    from pingjia.quant.convert import count_weights

    model, facts = load(directory)
    ids = prompt(model, PROMPT_TOKENS)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": [], "attention_mask": torch.ones_like(ids)}
    forget_peak()
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    first_s = time.perf_counter() - started
    started = time.perf_counter()
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, **options)
    later_s = time.perf_counter() - started - first_s
    assert out.shape[1] == PROMPT_TOKENS + NEW_TOKENS
    return facts | {
        "num_weights": count_weights(model),
        "prompt_tokens": PROMPT_TOKENS,
        "prefill_s": first_s,
        "torch_tokens_per_s": (NEW_TOKENS - 1) / later_s,
        "generate_peak_bytes": resident("VmHWM"),
    }


def train(directory: Path) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    from pingjia.models.chatglm import FAMILY

    base, _ = load(directory)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=list(FAMILY.default_target)))
    model.enable_input_require_grads()
    model.train()
    base.gradient_checkpointing_enable()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    ids = torch.cat((prompt(base, TRAIN_TOKENS // 2), prompt(base, TRAIN_TOKENS // 2)[:, :-2]), dim=1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < TRAIN_TOKENS // 2, -100)
    before = [p.detach().clone() for p in trainable]
    forget_peak()
    started = time.perf_counter()
    loss = model(ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    return {
        "train_step_s": time.perf_counter() - started,
        "train_tokens": ids.shape[1],
        "train_loss": float(loss.detach()),
        "train_peak_bytes": resident("VmHWM"),
        "trainable": sum(p.numel() for p in trainable),
        "tensors_changed": sum(not torch.equal(a, b) for a, b in zip(before, trainable, strict=True)),
        "tensors_trained": len(trainable),
    }


# ---- running and reporting


def run_step(step: str, directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, "--directory", str(directory), "--bits", str(args.bits)]
    done = subprocess.run(
        [*command, *(["--tiny"] if args.tiny else []), *(["--float-tables"] if args.float_tables else [])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for name, value in facts.items():
        print(f"  {name:22} {shown(name, value)}", flush=True)
    return facts


def shown(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e9:.3f} GB"
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


def where() -> dict[str, Any]:
    """Hardware, commit and date of a result."""
    import torch

    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    models = [
        x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        # Above the number of cores: others compute too, and times are not to be trusted.
        "load_average": os.getloadavg()[1],
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    directory = Path(args.directory or tempfile.mkdtemp(prefix="full-size-"))
    facts: dict[str, Any] = {
        "benchmark": "full_size",
        "bits": args.bits,
        "tiny": args.tiny,
        "float_tables": args.float_tables,
        **where(),
    }
    try:
        for step in STEPS:
            print(step, flush=True)
            facts |= run_step(step, directory, args)
    finally:
        if not args.keep:
            shutil.rmtree(directory, ignore_errors=True)
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--directory", help="where the network is saved (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="do not remove that folder afterwards")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--tiny", action="store_true", help="a miniature, to check the script itself")
    parser.add_argument("--float-tables", action="store_true", help="embeddings and head in fp16, not packed (-qe)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "build":
        facts = build(Path(args.directory), args.bits, args.tiny, args.float_tables)
    elif args.step:
        facts = {"generate": generate, "train": train}[args.step](Path(args.directory))
    else:
        facts = run(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
