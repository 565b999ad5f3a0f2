"""Packed layers in the kernels' order stay normal modules: saving, loading, copying, moving, adapters, ties."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pingjia.quant import Int4Linear, Int8Linear, count_weights, kernels, prepare_for_inference, quantize_model
from pingjia.quant.convert import pack_tables
from pingjia.quant.formats import PackedLinear
from pingjia.quant.group import GroupInt4Linear, GroupInt8Linear, GroupLinear, pack_groups
from pingjia.quant.rows import quantize_rows
from pingjia.quant.tiled import Tiled, restore_plain

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.why_not()}")


def layer(kind: type[PackedLinear]) -> PackedLinear:
    torch.manual_seed(0)
    if not issubclass(kind, GroupLinear):
        return kind.of(nn.Linear(64, 20))
    grouped = kind(64, 20, group_size=32)
    values = torch.randint(-8, 8, (20, 64))
    grouped.weight.copy_(pack_groups(values) if kind.bits == 4 else 15 * values)
    grouped.weight_scale.copy_(torch.rand(20, 2))
    grouped.bias.copy_(torch.randn(20))
    return grouped


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**size, vocab_size=40)).eval()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


KINDS = pytest.mark.parametrize("kind", [Int4Linear, Int8Linear, GroupInt4Linear, GroupInt8Linear])


@needs_kernels
@KINDS
def test_a_prepared_layer_computes_the_same_within_rounding(kind: type[PackedLinear]) -> None:
    plain = layer(kind)
    tiled = prepare_for_inference(copy.deepcopy(plain))
    x = torch.randn(5, 3, 64)
    assert tiled.tiles is not None
    assert plain.tiles is None
    assert (tiled(x) - plain(x)).norm() < 0.02 * plain(x).norm()
    assert torch.equal(tiled.dequantize(), plain.dequantize())
    assert tiled.dequantize(torch.float16).dtype == torch.float16
    assert repr(tiled) == repr(plain)


@needs_kernels
@KINDS
def test_a_prepared_layer_is_exact_where_a_gradient_flows(kind: type[PackedLinear]) -> None:
    plain = layer(kind)
    tiled = prepare_for_inference(copy.deepcopy(plain))
    x, y = (torch.ones(3, 64).mul(0.3).requires_grad_() for _ in range(2))
    assert torch.allclose(tiled(x), plain(y), atol=1e-5)
    tiled(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-4)


@needs_kernels
@KINDS
def test_saving_and_loading_see_the_published_tensors(kind: type[PackedLinear]) -> None:
    plain, tiled = layer(kind), prepare_for_inference(layer(kind))
    assert same(tiled.state_dict(), plain.state_dict())
    other = layer(kind)
    other.bias.data += 1
    other.weight.data += 1
    tiled.load_state_dict(other.state_dict())
    assert tiled.tiles is not None
    assert same(tiled.state_dict(), other.state_dict())
    assert torch.equal(tiled.dequantize(), other.dequantize())


@needs_kernels
@KINDS
def test_restoring_and_preparing_again(kind: type[PackedLinear]) -> None:
    plain, tiled = layer(kind), prepare_for_inference(prepare_for_inference(layer(kind)))
    x = torch.randn(4, 64)
    first = tiled(x)
    restore_plain(tiled)
    assert tiled.tiles is None
    assert torch.equal(tiled.weight, plain.weight)
    assert torch.equal(tiled(x), plain(x))
    assert torch.equal(prepare_for_inference(tiled)(x), first)


@needs_kernels
@KINDS
def test_copies_and_pickles_are_independent(kind: type[PackedLinear]) -> None:
    tiled = prepare_for_inference(layer(kind))
    weight = tiled.tiles.plain()[0]  # held: a copy must not be handed this one
    stream = io.BytesIO()
    torch.save(tiled, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(tiled), torch.load(stream, weights_only=False)):
        assert twin.tiles is not tiled.tiles
        assert torch.equal(twin(torch.ones(1, 64)), tiled(torch.ones(1, 64)))
        twin.restore()
        assert twin.weight is not weight
        assert torch.equal(twin.weight, weight)


@needs_kernels
@KINDS
def test_moving_off_the_cpu_and_changing_dtype(kind: type[PackedLinear]) -> None:
    plain, tiled = layer(kind), prepare_for_inference(layer(kind))
    tiled.to(torch.float16)
    assert tiled.tiles is not None
    assert tiled.bias.dtype == torch.float16
    assert tiled(torch.randn(2, 64).half()).dtype == torch.float16
    tiled.to(torch.float32).restore()
    assert same(tiled.state_dict(), plain.half().float().state_dict() | {"weight_scale": layer(kind).weight_scale})
    elsewhere = prepare_for_inference(layer(kind)).to("meta")
    assert elsewhere.tiles is None
    assert elsewhere.weight.shape == plain.weight.shape
    assert prepare_for_inference(elsewhere).tiles is None


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_a_whole_network(bits: int, tmp_path: Path) -> None:
    model = quantize_model(llama(), bits)
    ids = torch.tensor([[1, 2, 3, 4]])
    wanted, weights, tensors = model(ids).logits.detach(), count_weights(model), model.state_dict()
    assert prepare_for_inference(model) is model
    with torch.no_grad():
        assert (model(ids).logits - wanted).norm() < 0.03 * wanted.norm()
    assert count_weights(model) == weights
    assert same(model.state_dict(), tensors)
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} >= {".safetensors", ".json"}


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_tied_to_its_embedding_stays_tied(bits: int) -> None:
    model = quantize_model(llama(), bits)
    weight, scale = quantize_rows(model.get_input_embeddings().weight.detach(), bits)
    pack_tables(model, weight, scale, bits)
    ids, weights, tensors = torch.tensor([[1, 2, 3, 39]]), count_weights(model), model.state_dict()
    wanted = model(ids).logits.detach()
    head, table = (prepare_for_inference(model), model.get_output_embeddings(), model.get_input_embeddings())[1:]
    assert head.tiles is table.tiles
    with torch.no_grad():
        assert (model(ids).logits - wanted).norm() < 0.03 * wanted.norm()
    assert count_weights(model) == weights
    assert same(model.state_dict(), tensors)
    restore_plain(model)
    assert head.weight is table.weight
    assert torch.equal(model(ids).logits, wanted)


@needs_kernels
def test_an_adapter_trains_over_prepared_layers() -> None:
    plain, tiled = quantize_model(llama(), 4), prepare_for_inference(quantize_model(llama(), 4))
    ids = torch.tensor([[1, 2, 3, 4]])
    gradients = []
    for model in (plain, tiled):
        torch.manual_seed(1)
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        tuned.enable_input_require_grads()
        tuned(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in tuned.parameters() if p.requires_grad])
    assert len(gradients[0]) == 8
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*gradients, strict=True))


@needs_kernels
def test_exporting_a_prepared_network() -> None:
    tiled = prepare_for_inference(layer(Int4Linear))
    batch = torch.export.Dim("batch", min=2, max=64)
    x = torch.randn(7, 64)
    graph = torch.export.export(tiled, (torch.randn(3, 64),), dynamic_shapes=({0: batch},))
    assert torch.equal(graph.module()(x), tiled(x))


def test_without_kernels_it_says_so_and_computes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_load", lambda: "the kernels were not built; run `pip install --editable .`")
    plain = layer(Int4Linear)
    with pytest.warns(UserWarning, match=r"slower: the kernels were not built; run `pip install"):
        prepare_for_inference(plain)
    assert plain.tiles is None
    assert plain(torch.ones(1, 64)).shape == (1, 20)


@needs_kernels
def test_every_packed_layer_can_be_prepared() -> None:
    model = prepare_for_inference(quantize_model(llama(), 8))
    assert all(m.tiles is not None for m in model.modules() if isinstance(m, Tiled))
