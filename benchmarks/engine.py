"""How fast the engine answers on this CPU, beside llama.cpp (llama-cpp-python) and transformers' `generate`.

    python benchmarks/engine.py [--sizes small real] [--rounds 3] [--threads N] [--tiny]

small: SmolLM2-135M. Ours packs it to INT4; llama.cpp runs the same weights from the packaged GGUF (Q4_1) and, as its
usual 4-bit form, requantised to Q4_0; transformers computes in float32 (the floor). real: random weights of
ChatGLM-6B's size, INT4 with INT4 tables, against a Llama network with as many weights in Q4_0 (llama.cpp has no GLM-1).
Every measurement is a process of its own; sides take turns, `rounds` times; figures are medians.

    single   one prompt of 256 tokens (real: 64), then 64 (real: 16) tokens: prefill and decode rate, resident memory
    eight    eight different prompts of 64 tokens at once, 64 (real: 16) tokens each: tokens out per second of all of it
    adapters ours alone: eight as above on the base, and with 4 LoRA adapters (r=16, attention) mixed in the batch
    again    ours alone: time to the first token of a 512-token prompt, cold and seen before
    envelope ours alone: tokens of an answer that are out within 2 s, by prompt length

Greedy, answers of fixed length, no prefix reuse unless said. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import random_gguf

HERE = Path(__file__).parent
RESULT = HERE / "results" / "engine.json"
REAL = {"layers": 28, "hidden": 4096, "inner": 10944, "heads": 32, "vocab": 130_528}
REAL_TINY = {"layers": 2, "hidden": 256, "inner": 704, "heads": 4, "vocab": 1024}
LENGTHS = {"small": (256, 64), "real": (64, 16)}  # prompt, answer of `single`
SECONDS = 2.0


def resident(field: str = "VmRSS") -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no /proc/self/status: this benchmark needs Linux")


# ---- the sides: each answers `run(prompts, length)` with the seconds at which each token of each answer was out


class Ours:
    def __init__(self, model: str, **settings: Any) -> None:
        from pingjia.engine import Engine
        from pingjia.engine.settings import EngineSettings

        # Random prompts are answered in circles, which guesses would turn into a speed that nobody sees elsewhere.
        plain = {"prefix_caching": False, "prompt_lookup": "off", "max_num_seqs": 8, "kv_cache_tokens": 8192}
        chosen = EngineSettings(**(plain | settings))
        if model == "smollm2":
            self.engine = Engine(model, bits=4, settings=chosen)
            self.vocab, self.end = 49_152, []
        else:
            from pingjia.models import load_model

            network = load_model(model)
            self.engine = Engine(network, tokenizer=_Ids(), settings=chosen)
            self.vocab, self.end = (
                network.config.vocab_size,
                [network.config.gmask_token_id, network.config.bos_token_id],
            )
        self._number = 0

    def run(
        self, prompts: Sequence[list[int]], length: int, adapters: Sequence[str | None] = (None,)
    ) -> list[list[float]]:
        from pingjia.types import Request, Sampling

        sampling = Sampling(max_tokens=length, ignore_eos=True)
        times: dict[str, list[float]] = {}
        started = time.perf_counter()
        for i, ids in enumerate(prompts):
            self._number += 1
            times[str(self._number)] = []
            whole = tuple(ids[: len(ids) - len(self.end)] + self.end)
            self.engine.add(Request(str(self._number), whole, sampling, adapters[i % len(adapters)]))
        while self.engine.has_work():
            news = self.engine.step()
            now = time.perf_counter() - started
            for name, chunk in news:
                assert chunk.error is None, chunk.error
                times[name].extend(now for _ in chunk.token_ids)
        return list(times.values())


class _Ids:
    """Stands in for a tokenizer where only ids matter."""

    family = "chatglm"
    vocab_size = REAL["vocab"]
    pad_id = 3
    stop_ids: frozenset[int] = frozenset()
    template_digest = "ids"

    def render_text(self, text: str) -> list[int]:
        return [5, 6, 130_001, 130_004]

    def stream_answer(self) -> Any:
        return self

    def feed(self, ids: Sequence[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


class LlamaCpp:
    """llama.cpp's own batch of sequences, as its server's parallel slots use it."""

    def __init__(self, file: str, threads: int) -> None:
        import llama_cpp

        self._api = api = llama_cpp
        api.llama_backend_init()
        self._log = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._log, None)
        self._model = api.llama_model_load_from_file(file.encode(), api.llama_model_default_params())
        assert self._model, f"llama.cpp cannot load {file}"
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 8192, 2048, 512, 8
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = api.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp cannot make a context"
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(2048, 0, 1)

    def run(self, prompts: Sequence[list[int]], length: int) -> list[list[float]]:
        import numpy as np

        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        times: list[list[float]] = [[] for _ in prompts]
        started = time.perf_counter()
        tokens = [(ids, i, 0) for i, ids in enumerate(prompts)]
        for step in range(length):
            rows = self._decode(tokens)
            now = time.perf_counter() - started
            following = []
            for i, ids in enumerate(prompts):
                logits = self._api.llama_get_logits_ith(self._context, rows[i])
                best = int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())
                following.append(([best], i, len(ids) + step))
                times[i].append(now)
            tokens = following
        return times

    def _decode(self, tokens: Sequence[tuple[list[int], int, int]]) -> list[int]:
        """Compute (ids, sequence, first position) of every sequence; the places of their last tokens."""
        batch, place, last = self._batch, 0, []
        for ids, sequence, position in tokens:
            for offset, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, position + offset
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = offset == len(ids) - 1
                place += 1
            last.append(place - 1)
        batch.n_tokens = place
        assert self._api.llama_decode(self._context, batch) == 0, "llama_decode failed"
        return last


class Transformers:
    """`generate` in float32, one prompt at a time or padded together."""

    def __init__(self) -> None:
        from pingjia.models import load_model

        self._model = load_model("smollm2")
        self.vocab = 49_152

    def run(self, prompts: Sequence[list[int]], length: int) -> list[list[float]]:
        import torch
        from transformers.generation.streamers import BaseStreamer

        times: list[float] = []

        class Clock(BaseStreamer):
            def put(self, value: Any) -> None:
                times.append(time.perf_counter() - started)

            def end(self) -> None:
                pass

        ids = torch.tensor(prompts)
        started = time.perf_counter()
        # A streamer takes one sequence only; with more, all tokens count at the end.
        self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, min_new_tokens=length, do_sample=False,
            pad_token_id=0, streamer=Clock() if len(prompts) == 1 else None,
        )  # fmt: skip
        if len(prompts) > 1:
            return [[time.perf_counter() - started] * length for _ in prompts]
        return [times[1:]]  # the first is the prompt itself


# ---- what is measured: each a process of its own


def prompts(count: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Token ids; speed does not depend on which."""
    chance = random.Random(seed * 1000 + length)
    return [[chance.randrange(300, min(vocab, 40_000) - 10) for _ in range(length)] for _ in range(count)]


def single(side: Any, size: str) -> dict[str, float]:
    prompt_len, answer_len = LENGTHS[size]
    side.run(prompts(1, 16, side.vocab, seed=9), 4)
    [times] = side.run(prompts(1, prompt_len, side.vocab, seed=1), answer_len)
    return {
        "prefill_tokens_per_s": prompt_len / times[0],
        "decode_tokens_per_s": (len(times) - 1) / (times[-1] - times[0]),
        "resident_bytes": resident(),
    }


def eight(side: Any, size: str, **options: Any) -> dict[str, float]:
    answer_len = LENGTHS[size][1]
    side.run(prompts(8, 16, side.vocab, seed=9), 3, **options)
    times = side.run(prompts(8, 64, side.vocab, seed=2), answer_len, **options)
    ends, starts = max(t[-1] for t in times), max(t[0] for t in times)
    found = {"tokens_per_s": 8 * answer_len / ends}
    if ends > starts:  # of transformers' padded batch only the end is known
        found["decode_tokens_per_s"] = 8 * (answer_len - 1) / (ends - starts)
    return found | {"resident_bytes": resident()}


def adapters(side: Ours, size: str) -> dict[str, float]:
    """The same eight requests on the base, and on 4 adapters in turn; both in one process, in turns."""
    names = [f"adapter{i}" for i in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(names):
            save_adapter(Path(folder) / name, seed)
            side.engine.load_adapter(name, Path(folder) / name)
    found: dict[str, list[float]] = {"base": [], "mixed": []}
    for _ in range(3):
        found["base"].append(eight(side, size)["decode_tokens_per_s"])
        found["mixed"].append(eight(side, size, adapters=names)["decode_tokens_per_s"])
    base, mixed = (statistics.median(found[kind]) for kind in ("base", "mixed"))
    return {"base_tokens_per_s": base, "mixed_tokens_per_s": mixed, "cost": base / mixed - 1}


def save_adapter(folder: Path, seed: int) -> None:
    """A LoRA of rank 16 on the attention of SmolLM2 with small random weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    from pingjia.models import load_model

    torch.manual_seed(seed)
    model = get_peft_model(
        load_model("smollm2"), LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(str(folder))


def again(side: Ours, size: str) -> dict[str, float]:
    ids = prompts(1, 512, side.vocab, seed=3)
    side.run(prompts(1, 16, side.vocab, seed=9), 4)
    cold = side.run(ids, 1)[0][0]
    warm = statistics.median(side.run(ids, 1)[0][0] for _ in range(5))
    return {"cold_s": cold, "warm_s": warm, "ratio": warm / cold}


def envelope(side: Ours, size: str) -> dict[str, float]:
    side.run(prompts(1, 16, side.vocab, seed=9), 4)
    found = {}
    for length in (16, 64, 256, 1024):
        if size == "real" and length > 64:
            break
        [times] = side.run(prompts(1, length, side.vocab, seed=length), 400 if size == "small" else 24)
        found[f"prompt_{length}"] = sum(t <= SECONDS for t in times)
        found[f"prompt_{length}_first_s"] = times[0]
    return found


Measure = Callable[[Any, str], dict[str, float]]
MEASURES: dict[str, Measure] = {
    "single": single, "eight": eight, "adapters": adapters, "again": again, "envelope": envelope,
}  # fmt: skip
PLANS: dict[str, list[tuple[str, str]]] = {
    "small": [
        *((measure, side) for measure in ("single", "eight") for side in ("ours", "q4_1", "q4_0", "transformers")),
        *((measure, "ours") for measure in ("adapters", "again", "envelope")),
    ],
    "real": [
        *((measure, side) for measure in ("single", "eight") for side in ("ours", "q4_0")),
        *((measure, "ours") for measure in ("again", "envelope")),
    ],
}


def make_side(args: argparse.Namespace) -> Any:
    if args.side == "transformers":
        return Transformers()
    if args.side != "ours":
        return LlamaCpp(args.model, args.threads)
    reuse = args.measure == "again"
    return Ours(args.model, prefix_caching=reuse)


# ---- preparing, running, reporting


def prepare(folder: Path, size: str, args: argparse.Namespace) -> dict[str, str]:
    """Where each side of a size finds its model."""
    if size == "small":
        from pingjia.locate import locate_model

        packaged = str(locate_model("smollm2"))
        requantised = folder / "q4_0.gguf"
        if not requantised.exists():
            call(args, "requantise", packaged, str(requantised))
        return {"ours": "smollm2", "transformers": "smollm2", "q4_1": packaged, "q4_0": str(requantised)}
    shape = REAL_TINY if args.tiny else REAL
    file, network = folder / "real-q4_0.gguf", folder / "chatglm"
    if not file.exists():
        weights = random_gguf.write(file, **shape)
        print(f"llama network: {weights / 1e9:.2f} billion weights, {file.stat().st_size / 1e9:.2f} GB", flush=True)
    if not network.exists():
        script = [sys.executable, str(HERE / "full_size.py"), "--step", "build", "--directory", str(network)]
        subprocess.run([*script, *(["--tiny"] if args.tiny else [])], check=True, stdout=subprocess.DEVNULL)
    return {"ours": str(network), "q4_0": str(file)}


def requantise(source: str, target: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), params) == 0, "requantising failed"


def call(args: argparse.Namespace, *words: str) -> str:
    """This script again in a process of its own; the last line it printed. llama.cpp may live in another Python."""
    is_llama = words[0] == "requantise" or words[2] in ("q4_0", "q4_1")
    python = args.llama_python if is_llama else sys.executable
    threads = {"OMP_NUM_THREADS": str(args.threads), "PINGJIA_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    command = [python, __file__, "--threads", str(args.threads), "--child", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def child(args: argparse.Namespace) -> None:
    if args.child[0] == "requantise":
        requantise(*args.child[1:])
        return
    args.measure, args.size, args.side, args.model = args.child
    print(json.dumps(MEASURES[args.measure](make_side(args), args.size)))


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def run_size(size: str, folder: Path, args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    models = prepare(folder, size, args)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(args.rounds if size == "small" else max(1, args.rounds - 2)):
        for measure, side in PLANS[size]:
            if args.measures and measure not in args.measures:
                continue
            facts = json.loads(call(args, measure, size, side, models[side]))
            found.setdefault((measure, side), []).append(facts)
            print(
                f"{size:6} {measure:9} {side:13} " + " ".join(f"{k}={shown(k, v)}" for k, v in facts.items()),
                flush=True,
            )
    result: dict[str, dict[str, dict[str, float]]] = {}
    for (measure, side), rounds in found.items():
        result.setdefault(measure, {})[side] = medians(rounds)
    return result


def shown(name: str, value: float) -> str:
    return f"{value / 1e9:.2f}GB" if name.endswith("_bytes") else f"{value:.4g}"


def ratios(result: dict[str, Any]) -> Iterator[str]:
    for size, measures in result.items():
        for measure in ("single", "eight"):
            for side, facts in measures.get(measure, {}).items():
                if side == "ours":
                    continue
                ours = measures[measure]["ours"]
                told = ", ".join(
                    f"{key.removesuffix('_per_s')} {ours[key] / value:.2f}"
                    for key, value in facts.items()
                    if "per_s" in key
                )
                yield f"{size} {measure}: ours / {side}: {told}"


def machine(threads: int) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "cpu": next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?"),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[1],  # above the number of cores: others computed too
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=("small", "real"), default=["small", "real"])
    parser.add_argument("--measures", nargs="+", choices=tuple(MEASURES), help="only these")
    parser.add_argument("--rounds", type=int, default=3, help="of the small size; the real one has two fewer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--folder", type=Path, help="keep the random networks here (7 GB) and use them again")
    parser.add_argument("--tiny", action="store_true", help="a miniature of the real size, to check the script")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = {size: run_size(size, folder, args) for size in args.sizes}
    print(*ratios(result), sep="\n")
    if not args.tiny:
        args.out.write_text(json.dumps({"machine": machine(args.threads), **result}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
