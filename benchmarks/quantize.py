"""What our INT4 and INT8 lose on SmolLM2, beside llama.cpp's Q4_0 arithmetic, on real text.

    python benchmarks/quantize.py --out benchmarks/results/quantize.json

Every way packs the same linears of the blocks; embedding and head stay in floats, so that the bits compare. Q4_0 is
done by the `gguf` package, llama.cpp's own reference in Python: groups of 32, an fp16 scale, 4.5 bits per weight.

A trap, reported and not hidden: the packaged SmolLM2 is a Q4_1 file, so its weights lie on 16 levels per group of 32
already, and an asymmetric rounding in the same groups would lose nothing at all. No way here is asymmetric, but to be
sure, the same is measured on a "dithered" base (--dithered): every weight moved at random within half a step of its
grid, where the original may have lain, and everything compared with that base.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants
from transformers import PreTrainedModel

from pingjia import chat
from pingjia.data.calibration import sample
from pingjia.models import load_model
from pingjia.models.compare import Tally
from pingjia.models.compress import Compressor
from pingjia.models.original import _own_tensors
from pingjia.models.source import Source
from pingjia.quant.convert import packable
from pingjia.quant.encode import PackedMatrix
from pingjia.quant.settings import QuantizeSettings
from pingjia.quant.shards import ShardWriter, read_shard

WAYS: dict[str, tuple[float, QuantizeSettings | None]] = {
    "Q4_0 (llama.cpp)": (4.5, None),
    "int4 rtn, groups of 32": (4.5, QuantizeSettings(method="rtn", group_size=32, head_bits=16)),
    "int4 gptq, groups of 32": (4.5, QuantizeSettings(group_size=32, head_bits=16)),
    "int4 gptq, groups of 64": (4.25, QuantizeSettings(group_size=64, head_bits=16)),
    "int4 gptq, groups of 32, no act order": (4.5, QuantizeSettings(group_size=32, head_bits=16, act_order=False)),
    "int4 gptq, groups of 64, no act order": (4.25, QuantizeSettings(group_size=64, head_bits=16, act_order=False)),
    "int8 rtn": (8.0, QuantizeSettings(bits=8, method="rtn", head_bits=16)),
    "int8 gptq": (8.0, QuantizeSettings(bits=8, head_bits=16)),
}
Texts = dict[str, list[tuple[int, ...]]]


def main() -> None:
    options = _options()
    texts = _texts(options)
    model = load_model("smollm2")
    results = {"base": _measure(model, texts, options)}
    if options.dithered:
        _dither(model)
        results["dithered base"] = _measure(model, texts, options)
    report = {"tokens": {k: sum(map(len, v)) for k, v in texts.items()}, "calibration": options.calibration} | results
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", default=str(shared), help="folder with alpaca_{zh,en}_demo.json")
    parser.add_argument("--calibration", choices=("mixed", "samples"), default="mixed")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens of each language")
    parser.add_argument("--dithered", action="store_true")
    parser.add_argument("--only", default="", help="ways whose name holds this")
    parser.add_argument("--out")
    return parser.parse_args()


def _texts(options: argparse.Namespace) -> Texts:
    """Calibration and held-out rows: other rows of the same files, or the packaged samples to calibrate on."""
    tokenizer = chat.load_tokenizer("smollm2")
    found: Texts = {"calibration": []}
    for lang in ("zh", "en"):
        rows = sample([f"{options.data}/alpaca_{lang}_demo.json"], tokenizer, 10**9, 1024).rows
        found[lang] = _until(rows[::-1], options.tokens)
        found["calibration"] += _until(rows, options.calibration_tokens // 2)
    if options.calibration == "samples":
        from pingjia.data.calibration import CALIBRATION

        found["calibration"] = list(sample(CALIBRATION, tokenizer, options.calibration_tokens, 1024).rows)
    return found


def _until(rows: Sequence[tuple[int, ...]], num_tokens: int) -> list[tuple[int, ...]]:
    kept: list[tuple[int, ...]] = []
    for ids in rows:
        if sum(map(len, kept)) >= num_tokens:
            break
        kept.append(ids)
    return kept


# ---- ways of packing: linears of the blocks -> the floats they stand for


def _q4_0(model: PreTrainedModel, _: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    def both(weight: torch.Tensor) -> torch.Tensor:
        kind = GGMLQuantizationType.Q4_0
        packed = gguf_quants.quantize(weight.numpy(), kind)
        return torch.from_numpy(np.array(gguf_quants.dequantize(packed, kind))).view(weight.shape)

    return {f"{n}.weight": both(model.get_submodule(n).weight.detach()) for n in packable(model)}


def _ours(settings: QuantizeSettings) -> Callable[..., dict[str, torch.Tensor]]:
    def pack(model: PreTrainedModel, rows: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
        source = Source("smollm2", model.config, model.config.to_dict(), _own_tensors(model))
        with tempfile.TemporaryDirectory() as folder:
            compressor = Compressor(source, settings, rows)
            shards = ShardWriter(Path(folder), compressor.num_shards)
            compressor.run(shards, lambda *_: None)
            return _floats(shards)

    return pack


def _floats(shards: ShardWriter) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for number in range(1, shards.num_shards + 1):
        tensors = read_shard(shards.file(number))
        for name in (n for n in tensors if f"{n}_scale" in tensors):
            found[name] = PackedMatrix(tensors[name], tensors[f"{name}_scale"]).dequantize()
    return found


# ---- measuring


def _measure(model: PreTrainedModel, texts: Texts, options: argparse.Namespace) -> dict[str, Any]:
    before = {lang: _logits(model, texts[lang]) for lang in ("zh", "en")}
    found: dict[str, Any] = {}
    for name, (bits, settings) in WAYS.items():
        if options.only not in name:
            continue
        started = time.perf_counter()
        weights = (_ours(settings) if settings else _q4_0)(model, texts["calibration"])
        packed_s = time.perf_counter() - started
        with Weights(model, weights):
            found[name] = {"bits_per_weight": bits, "packed_s": round(packed_s, 1)} | _losses(model, texts, before)
        print(name, json.dumps(found[name]), flush=True)
    return found


class Weights:
    """The model with other weights for as long as the block lasts."""

    def __init__(self, model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
        self._model, self._new = model, weights
        self._old = {n: model.get_parameter(n).data for n in weights}

    def __enter__(self) -> None:
        for name, weight in self._new.items():
            self._model.get_parameter(name).data = weight

    def __exit__(self, *_: object) -> None:
        for name, weight in self._old.items():
            self._model.get_parameter(name).data = weight


@torch.inference_mode()
def _logits(model: PreTrainedModel, rows: list[tuple[int, ...]]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].half() for ids in rows]


@torch.inference_mode()
def _losses(model: PreTrainedModel, texts: Texts, before: dict[str, list[torch.Tensor]]) -> dict[str, Any]:
    found, total = {}, Tally()
    for lang, logits in before.items():
        tally = Tally()
        for ids, original in zip(texts[lang], logits, strict=True):
            now = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            for t in (tally, total):
                t.add(original.float(), now, torch.tensor(ids[1:]))
        found[lang] = _figures(tally)
    return {"both": _figures(total)} | found


def _figures(tally: Tally) -> dict[str, float]:
    return {
        "perplexity": round(tally.perplexity_original, 4),
        "loss_percent": round(100 * tally.perplexity_loss, 3),
        "kl": round(tally.mean_kl, 5),
        "top1": round(tally.top1_agreement, 4),
    }


def _dither(model: PreTrainedModel) -> None:
    """Move every weight of the blocks' linears at random within half a step of the grid it was stored on.

    Q4_1 puts 16 levels between the least and the largest weight of a group of 32, so their distance tells the step.
    """
    generator = torch.Generator().manual_seed(0)
    for name in packable(model):
        grouped = model.get_submodule(name).weight.data.unflatten(1, (-1, 32))
        step = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / 15
        grouped += (torch.rand(grouped.shape, generator=generator) - 0.5) * step


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
