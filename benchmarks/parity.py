"""How far our ChatGLM networks are from the published code, figure by figure.

    python benchmarks/parity.py [FIXTURES]

FIXTURES is the folder of reference outputs (default: ../shared/fixtures/chatglm beside the repository). Every figure is
the largest absolute difference over a whole tensor (gradients: relative to the largest entry of the reference), or
"equal" for token sequences. The last line is JSON. Exit code 1 when any figure is beyond its tolerance.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, PreTrainedModel

from pingjia.models.chatglm import prefix_cache
from pingjia.models.checkpoint import load_chatglm
from pingjia.quant.convert import quantize_model
from pingjia.quant.formats import Int8Linear, PackedLinear

DEFAULT = Path(__file__).resolve().parents[1] / ".." / "shared" / "fixtures" / "chatglm"
FLOAT, PACKED = 1e-4, 1e-3  # tolerances of the references: fp32, and fp32 over packed weights
HALF = 0.1  # fp16 on another machine and order of operations: only a sanity bound
References = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Figure:
    """One comparison. `difference` of token sequences: 0.0 when equal, 1.0 when not."""

    fixture: str
    what: str
    difference: float
    tolerance: float

    @property
    def passes(self) -> bool:
        return self.difference <= self.tolerance


def figures(fixtures: Path) -> Iterator[Figure]:
    """Every figure of every fixture, v1 first."""
    sections: list[tuple[str, float, Callable[[Path], Iterator[tuple[str, float, float]]]]] = [
        ("tiny_v1_chat", FLOAT, v1_forward),
        ("tiny_v1_chat", FLOAT, v1_training),
        ("tiny_v1_chat", FLOAT, v1_generation),
        ("tiny_v1_chat", FLOAT, v1_long),
        ("tiny_v1_chat", FLOAT, v1_prefix),
        ("tiny_v1_chat", HALF, v1_half),
        ("tiny_v1_chat_int8", PACKED, packed),
        ("tiny_v1_chat_int4", PACKED, packed),
        ("tiny_v2", FLOAT, v2_forward),
        ("tiny_v2", FLOAT, v2_generation),
    ]
    for fixture, tolerance, section in sections:
        for what, found, scale in section(fixtures / fixture):
            yield Figure(fixture, what, found, tolerance * scale)


# ---- measures: (what, difference, tolerance as a multiple of the section's)


def near(what: str, ours: torch.Tensor, reference: torch.Tensor) -> tuple[str, float, float]:
    assert ours.shape == reference.shape, f"{what}: {tuple(ours.shape)} against {tuple(reference.shape)}"
    return what, float((ours.float() - reference.float()).abs().max()), 1.0


def near_scaled(what: str, ours: torch.Tensor | None, reference: torch.Tensor) -> tuple[str, float, float]:
    assert ours is not None, what
    return what, float((ours - reference).abs().max() / reference.abs().max()), 1.0


def same(what: str, ours: torch.Tensor, reference: torch.Tensor) -> tuple[str, float, float]:
    return what, float(not torch.equal(ours, reference)), 0.0


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, References]:
    return load_chatglm(folder, dtype=dtype), load_file(folder / "expected.safetensors")


# ---- ChatGLM-6B


@torch.no_grad()
def v1_forward(folder: Path) -> Iterator[tuple[str, float, float]]:
    model, ref = load(folder)
    out = model(ref["a.input_ids"], output_hidden_states=True, use_cache=True)
    yield near("a.logits", out.logits, ref["a.logits"])
    yield near("a.hidden_states", torch.stack(out.hidden_states), ref["a.hidden_states"])
    for layer in (0, 3):
        yield from cached(out.past_key_values, layer, ref)
    keep = real_rows(ref["b.input_ids"], 3)
    out = model(ref["b.input_ids"], attention_mask=keep.long(), output_hidden_states=True)
    yield near("b.logits", out.logits[keep], ref["b.logits"][keep])
    yield near("b.hidden_states", torch.stack(out.hidden_states)[:, keep], ref["b.hidden_states"][:, keep])
    yield near("c.logits", model(ref["c.input_ids"]).logits, ref["c.logits"])
    ids = ref["c2.input_ids"]
    yield near("c2.logits (model positions)", model(ids).logits, ref["c2.logits_model_positions"])
    given = model(ids, position_ids=ref["c2.position_ids_tokenizer"]).logits
    yield near("c2.logits (tokenizer positions)", given, ref["c2.logits_tokenizer_positions"])
    model.set_attn_implementation("eager")
    out = model(ref["a.input_ids"], output_attentions=True)
    yield near("a.logits (eager)", out.logits, ref["a.logits"])
    yield near("a.attn_layer0", out.attentions[0][0], ref["a.attn_layer0"])
    yield near("a.attn_last", out.attentions[-1][0], ref["a.attn_last"])


def cached(cache: DynamicCache, layer: int, ref: References) -> Iterator[tuple[str, float, float]]:
    """Keys after rotation, and values; the reference has them as [tokens, batch, heads, size]."""
    for kind, tensor in (("k", cache.layers[layer].keys), ("v", cache.layers[layer].values)):
        yield near(f"a.kv{layer}.{kind}", tensor.permute(2, 0, 1, 3), ref[f"a.kv{layer}.{kind}"])


def real_rows(ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """bool [B, T]: False on the padding at the left. The references attend uniformly there; nobody reads those rows."""
    return (ids != pad_id).long().cumsum(-1) > 0


def v1_training(folder: Path) -> Iterator[tuple[str, float, float]]:
    model, ref = load(folder)
    gradients = load_file(folder / "expected_grads.safetensors")
    out = model(ref["d.input_ids"], labels=ref["d.labels"])
    yield near("d.logits", out.logits.detach(), ref["d.logits"])
    yield near("d.loss", out.loss.detach()[None], ref["d.loss"])
    out.loss.backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == gradients.keys()
    worst = max((near_scaled(n, parameters[n].grad, g) for n, g in gradients.items()), key=lambda found: found[1])
    yield f"d.gradients, {len(gradients)} parameters, worst: {worst[0]}", worst[1], worst[2]


@torch.no_grad()
def v1_generation(folder: Path) -> Iterator[tuple[str, float, float]]:
    model, ref = load(folder)
    yield from generated(model, ref, "a", 24, None)
    keep = real_rows(ref["b.input_ids"], 3).long()
    yield from generated(model, ref, "b", 24, keep)
    other = model.generate(
        ref["b.input_ids"], attention_mask=keep, max_new_tokens=24, do_sample=False, eos_token_id=269
    )
    yield same("e.b_eos.sequences", other, ref["e.b_eos.sequences"])


def generated(
    model: PreTrainedModel, ref: References, key: str, count: int, mask: torch.Tensor | None
) -> Iterator[tuple[str, float, float]]:
    """Greedy tokens with the cache, and the logits each was chosen from (of a finished row: up to its end)."""
    ids = ref[f"{key}.input_ids"]
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    yield same(f"e.{key}.sequences", out.sequences, ref[f"e.{key}.sequences"])
    alive = (out.sequences[:, ids.shape[1] - 1 : -1] != model.config.eos_token_id).long().cumprod(-1).bool()
    alive[:, 0] = True
    logits = torch.stack(out.logits, dim=1)
    yield near(f"e.{key}.step_logits", logits[alive], ref[f"e.{key}.step_logits"][alive])


@torch.no_grad()
def v1_long(folder: Path) -> Iterator[tuple[str, float, float]]:
    model, ref = load(folder)
    ids = ref["g.input_ids"]
    logits = model(ids).logits
    yield near("g.logits, last 4 of 702", logits[:, -4:], ref["g.logits_last4"])
    yield near("g.logits at 48..51", logits[:, 48:52], ref["g.logits_at_50"])
    tokens = model.generate(ids, max_new_tokens=16, do_sample=False)[:, -16:]
    yield same("g.greedy16", tokens, ref["g.greedy16"])


def v1_prefix(folder: Path) -> Iterator[tuple[str, float, float]]:
    """P-Tuning v2: a prefix of keys and values, straight from a table (p0) or through a small network (p1)."""
    model, ref = load(folder)
    for key in ("p0", "p1"):
        weights = {n: t.requires_grad_() for n, t in ref.items() if n.startswith(f"{key}.transformer.prefix_encoder")}
        start = f"{key}.transformer.prefix_encoder."
        yield from prefixed(model, ref, key, {n.removeprefix(start): t for n, t in weights.items()})


def prefixed(
    model: PreTrainedModel, ref: References, key: str, weights: dict[str, torch.Tensor]
) -> Iterator[tuple[str, float, float]]:
    with torch.no_grad():
        for batch in ("a", "b"):
            ids = ref[f"{batch}.input_ids"]
            keep = real_rows(ids, 3)
            logits = with_prefix(model, weights, ids, keep)
            yield near(f"{key}.{batch}.logits", logits[keep], ref[f"{key}.{batch}.logits"][keep])
            yield same(
                f"{key}.{batch}.greedy", greedy_with_prefix(model, weights, ids, keep), ref[f"{key}.{batch}.greedy24"]
            )
    ids = ref["d.input_ids"]
    logits = with_prefix(model, weights, ids, torch.ones_like(ids, dtype=torch.bool))
    loss = model.loss_function(logits=logits, labels=ref["d.labels"], vocab_size=model.config.vocab_size)
    yield near(f"{key}.d.loss", loss.detach()[None], ref[f"{key}.d.loss"])
    loss.backward()
    for name, weight in weights.items():
        reference = ref[f"{key}.d.grad.transformer.prefix_encoder.{name}"]
        yield near_scaled(f"{key}.d.gradient of {name}", weight.grad, reference)


def prefix_of(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    table = weights["embedding.weight"]
    if "trans.0.weight" not in weights:
        return table
    hidden = torch.tanh(table @ weights["trans.0.weight"].T + weights["trans.0.bias"])
    return hidden @ weights["trans.2.weight"].T + weights["trans.2.bias"]


def with_prefix(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], ids: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    prefix = prefix_of(weights)
    mask = torch.cat((keep.new_ones(len(ids), len(prefix)), keep), dim=1).long()
    return model(ids, attention_mask=mask, past_key_values=prefix_cache(model.config, prefix, len(ids))).logits


def greedy_with_prefix(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], ids: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Up to 24 tokens, the whole sequence computed anew for each: slow, and without any doubt about the cache."""
    alive = torch.ones(len(ids), dtype=torch.bool)
    for _ in range(24):
        token = with_prefix(model, weights, ids, keep)[:, -1].argmax(-1).where(alive, model.config.pad_token_id)
        ids = torch.cat((ids, token[:, None]), dim=1)
        keep = torch.cat((keep, keep.new_ones(len(ids), 1)), dim=1)
        alive = alive & (token != model.config.eos_token_id)
        if not alive.any():
            break
    return ids


@torch.no_grad()
def v1_half(folder: Path) -> Iterator[tuple[str, float, float]]:
    model, ref = load(folder, torch.float16)
    yield near("a.logits in fp16", model(ref["a.input_ids"]).logits, ref["a.logits_fp16"])


# ---- published INT8 and INT4


@torch.no_grad()
def packed(folder: Path) -> Iterator[tuple[str, float, float]]:
    model, ref = load(folder)
    yield near("a.logits", model(ref["a.input_ids"]).logits, ref["a.logits"])
    keep = real_rows(ref["b.input_ids"], 3)
    logits = model(ref["b.input_ids"], attention_mask=keep.long()).logits
    yield near("b.logits", logits[keep], ref["b.logits"][keep])
    for key, mask in (("a", None), ("b", keep.long())):
        tokens = model.generate(ref[f"{key}.input_ids"], attention_mask=mask, max_new_tokens=24, do_sample=False)
        yield same(f"e.{key}.sequences", tokens, ref[f"e.{key}.sequences"])
    name = "layers.0.attention.query_key_value"
    linear = model.transformer.get_submodule(name)
    assert isinstance(linear, PackedLinear)
    yield near("dequantised weights", linear.dequantize(), ref[f"deq.{name}.fp32"])
    yield from packed_here(folder, ref, linear.bits, name)


def packed_here(folder: Path, ref: References, bits: int, name: str) -> Iterator[tuple[str, float, float]]:
    """The float checkpoint, packed by us."""
    model = quantize_model(load_chatglm(folder.parent / "tiny_v1_chat", dtype=torch.float32), bits)
    linear = model.transformer.get_submodule(name)
    yield same("packing: weights", linear.weight, ref[f"runtime_fp32.{name}.weight"])
    yield near("packing: scales", linear.weight_scale, ref[f"runtime_fp32.{name}.weight_scale"])
    yield near("packing: a.logits", model(ref["a.input_ids"]).logits, ref["runtime_fp32.a.logits"])


# ---- ChatGLM2 and 3


@torch.no_grad()
def v2_forward(folder: Path) -> Iterator[tuple[str, float, float]]:
    model, ref = load(folder)
    out = model(ref["a.input_ids"], output_hidden_states=True, use_cache=True)
    yield near("a.logits", out.logits, ref["a.logits"])
    yield near("a.hidden_states", torch.stack(out.hidden_states), ref["a.hidden_states"])
    yield from cached(out.past_key_values, 0, ref)
    keep = ref["b.attention_mask"].bool()
    logits = model(ref["b.input_ids"], attention_mask=ref["b.attention_mask"]).logits
    yield near("b.logits", logits[keep], ref["b.logits"][keep])
    out = model(ref["d.input_ids"], labels=ref["d.labels"])
    yield near("d.logits", out.logits, ref["d.logits"])
    yield near("d.loss", out.loss[None], ref["d.loss"])
    yield near("g.logits, last 4 of 702", model(ref["g.input_ids"]).logits[:, -4:], ref["g.logits_last4"])
    what, found, _ = near_scaled(
        "q8.y, the published INT8 product in fp16, relative", q8(ref).float(), ref["q8.y"].float()
    )
    yield what, found, 10.0  # one rounding of fp16 is 5e-4


def q8(ref: References) -> torch.Tensor:
    rows, columns = ref["q8.weight"].shape
    linear = Int8Linear(columns, rows)
    linear.weight.data, linear.weight_scale = ref["q8.weight"], ref["q8.weight_scale"]
    assert linear.bias is not None
    linear.bias.data = ref["q8.bias"]
    return linear(ref["q8.x"])


@torch.no_grad()
def v2_generation(folder: Path) -> Iterator[tuple[str, float, float]]:
    model, ref = load(folder)
    yield from generated(model, ref, "a", 24, None)
    yield from generated(model, ref, "b", 24, ref["b.attention_mask"])


def main() -> int:
    fixtures = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if not fixtures.is_dir():
        print(f"{fixtures}: no reference outputs here", file=sys.stderr)
        return 2
    found: list[Figure] = []
    for figure in figures(fixtures):
        found.append(figure)
        shown = f"{figure.difference:.1e}" if figure.tolerance else ("equal" if figure.passes else "DIFFERENT")
        print(f"{figure.fixture:18} {figure.what:64} {shown:>9}  {'' if figure.passes else '<-- beyond'}")
    report: dict[str, Any] = {"figures": [asdict(f) for f in found], "failed": sum(not f.passes for f in found)}
    print(json.dumps(report | {"torch": torch.__version__}))
    return int(report["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
