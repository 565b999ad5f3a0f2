"""What `pingjia quantize` takes in memory and time, for networks of the same width and different depth.

    python benchmarks/quantize_memory.py [--hidden 1024] [--layers 4,16] [--method gptq] [--out FILE]
    python benchmarks/quantize_memory.py --hidden 4096 --layers 28 --vocab 130528 --method rtn    # the real size

A random ChatGLM-6B of that width is written in fp16, layer by layer, and quantised by the command in a process of its
own, whose peak resident set (VmHWM) is taken. One block is in memory at a time, so the peak must not grow with the
layers: it is checked (exit code 1 above 10 %). Needs ../shared/fixtures for the tokenizer. The last line is JSON.

`--vocab` writes tables of that many rows, embedding and head apart, as the published files hold them; the fixture's
tokenizer does not belong to those, so the command's own function is called, with random ids to calibrate on.
`--limit-gib` runs it under that limit of memory (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "chatglm" / "tiny_v1_chat"
CHILD = """
import sys
from pathlib import Path
if sys.argv[1] == "--ids":
    import random
    from pingjia.export.quantize import QuantizeJob, quantize
    from pingjia.quant.settings import QuantizeSettings
    model, out, method, tokens = sys.argv[2:]
    chance = random.Random(0)
    ids = [chance.randrange(1000, 100_000) for _ in range(int(tokens))]
    rows = [[*ids[i : i + 510], 681, 684] for i in range(0, len(ids), 510)]  # [gMASK] and <sop> of the fixture
    job = QuantizeJob(model, Path(out), QuantizeSettings(method=method), rows if method == "gptq" else ())
    report = quantize(job, save_tokenizer=lambda folder: None, on_step=lambda *step: print(*step, file=sys.stderr))
    print(report.stored_bytes)
    code = 0
else:
    from pingjia.cli.main import invoke
    code = invoke(sys.argv[1:])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print("PEAK", int(peak.split()[1]) * 1024)
sys.exit(code)
"""


def main() -> None:
    options = _options()
    runs = [_run(int(layers), options) for layers in options.layers.split(",")]
    peaks = [run["peak_bytes"] for run in runs]
    report = {"machine": _machine(), "hidden": options.hidden, "vocab": options.vocab, "method": options.method}
    report |= {"limit_gib": options.limit_gib, "runs": runs, "growth": max(peaks) / min(peaks) - 1}
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    sys.exit(report["growth"] > 0.1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", default="4,16")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, help="rows of embedding and head; without it a few, in one table")
    parser.add_argument("--limit-gib", type=float)
    parser.add_argument("--folder", type=Path, help="where the files are put meanwhile (13 GB for the real size)")
    parser.add_argument("--out")
    return parser.parse_args()


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "cpu": next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?"),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[1], 1),  # above the number of cores: others computed too
        "date": datetime.now(UTC).date().isoformat(),
    }


def _limited(gib: float | None) -> Callable[[], None] | None:
    """What the child does before it starts."""
    if gib is None:
        return None
    num_bytes = int(gib * 2**30)
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def _run(layers: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model, out = Path(folder) / "model", Path(folder) / "out"
        stored = _write(model, options.hidden, layers, options.vocab)
        command = _command(model, out, options)
        started = time.perf_counter()
        child = [sys.executable, "-c", CHILD, *map(str, command)]
        done = subprocess.run(child, capture_output=True, text=True, preexec_fn=_limited(options.limit_gib))
        if done.returncode:
            raise SystemExit(done.stderr)
        facts = {
            "layers": layers,
            "float_bytes": stored,
            "packed_bytes": sum(f.stat().st_size for f in out.glob("*.safetensors")),
            "peak_bytes": int(done.stdout.rpartition("PEAK")[2]),
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(json.dumps(facts), file=sys.stderr, flush=True)
        return facts


def _command(model: Path, out: Path, options: argparse.Namespace) -> list[Any]:
    tokens = options.calibration_tokens
    if options.vocab:
        return ["--ids", model, out, options.method, tokens]
    command = ["quantize", model, "--out", out, "--method", options.method, "--json"]
    return command + (["--calibration-tokens", tokens] if options.method == "gptq" else [])


def _write(directory: Path, hidden: int, layers: int, vocab: int | None) -> int:
    """A shard per layer; nothing is held for longer than it takes to write it."""
    from pingjia.models.chatglm_config import ChatGLMConfig
    from pingjia.models.skeleton import block_paths, empty_network, tensor_names

    directory.mkdir()
    config = json.loads((FIXTURE / "config.json").read_text()) | {
        "hidden_size": hidden,
        "inner_hidden_size": 4 * hidden,
        "num_layers": layers,
        "num_attention_heads": max(1, hidden // 128),
    }
    config |= {"vocab_size": vocab} if vocab else {}
    config.pop("dtype", None)
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copyfile(FIXTURE / name, directory / name)
    model = empty_network(ChatGLMConfig.from_dict(config))
    blocks = block_paths(model)
    rest = [n for n in tensor_names(model) if not n.startswith(tuple(f"{b}." for b in blocks)) and "lm_head" not in n]
    shards = [*(tensor_names(model, b) for b in blocks), rest]
    weight_map, total = {}, 0
    for number, names in enumerate(shards):
        file = directory / f"model-{number:05d}.safetensors"
        tensors = {name: _random(name, model.get_parameter(name).shape) for name in names}
        if vocab and names is rest:
            tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
        save_file(tensors, file)
        weight_map |= dict.fromkeys(tensors, file.name)
        total += file.stat().st_size
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    if len(shape) == 1:
        return torch.full(shape, float("norm" in name and name.endswith("weight")), dtype=torch.float16)
    return torch.randn(shape, dtype=torch.float16) * shape[1] ** -0.5


if __name__ == "__main__":
    main()
