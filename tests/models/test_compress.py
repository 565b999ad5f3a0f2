"""Packing block by block: the walk computes what the network does, for every family; what is written loads again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pingjia.errors import ModelError
from pingjia.models import base_fingerprint, family_of, load_model
from pingjia.models.compare import Text, compare
from pingjia.models.compress import Compressor, matrix_errors
from pingjia.models.fingerprint import source_fingerprint
from pingjia.models.original import open_original
from pingjia.models.packed import PackedSource
from pingjia.models.skeleton import block_paths, empty_network, fill, free, is_tied, tensor_names, tie_tables
from pingjia.models.walk import Walk
from pingjia.quant import count_weights
from pingjia.quant.formats import PackedEmbedding
from pingjia.quant.group import GroupEmbedding, GroupInt4Linear, GroupInt8Linear
from pingjia.quant.settings import QuantizeSettings
from pingjia.quant.shards import ShardWriter

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
NETWORKS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "glm4": (Glm4ForCausalLM, Glm4Config),
}
ROWS = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16], [20, 21, 3]]
WIDE = {"hidden_size": 64, "inner_hidden_size": 96}


def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.12
        parameter.data = noise + (parameter.ndim == 1 and "norm" in name and "bias" not in name)
    return model.eval()


@pytest.fixture
def make(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """make(family, **config): a directory with a random network of that family."""

    def directory(family: str, **config: Any) -> Path:
        if family in NETWORKS:
            network, kind = NETWORKS[family]
            model = network(kind(**(SHAPE | config)))
        else:
            from pingjia.models.chatglm import ChatGLMForCausalLM
            from pingjia.models.chatglm2 import ChatGLM2ForCausalLM
            from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
            from tests.models.conftest import V1, V2

            if family == "v1":
                model = ChatGLMForCausalLM(ChatGLMConfig(**(V1 | WIDE | config)))
            else:
                model = ChatGLM2ForCausalLM(
                    ChatGLM2Config(**(V2 | {"hidden_size": 64, "ffn_hidden_size": 96} | config))
                )
        out = tmp_path / family
        randomised(model).save_pretrained(out)
        return out

    return directory


def rows_of(family: str) -> list[list[int]]:
    if family == "v1":
        return [[*ids, 91, 92, *ids[::-1], 93] for ids in ROWS]
    return ROWS


FAMILIES = [*NETWORKS, "v1", "v2"]


def pack(source_dir: Path, out: Path, settings: QuantizeSettings, rows: list[list[int]]) -> Compressor:
    out.mkdir()
    compressor = Compressor(open_original(source_dir), settings, rows)
    shards = ShardWriter(out, compressor.num_shards)
    compressor.run(shards, lambda *_: None)
    shards.finish()
    config = compressor.source.raw_config
    config = config | {"quantization_config": {"quant_method": "pingjia", "version": 1} | settings.as_dict()}
    (out / "config.json").write_text(json.dumps(config))
    return compressor


@torch.inference_mode()
def logits_of(model: PreTrainedModel, rows: list[list[int]]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in rows]


# ---- the walk


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_computes_what_the_network_does(family: str, make: Callable[..., Path]) -> None:
    """Two sequences to a chunk, weights put in and taken out block by block; logits of whole tensors."""
    directory, rows = make(family), rows_of(family)
    source = open_original(directory)
    model = empty_network(source.config)
    assert not any(p.device.type != "meta" for p in model.parameters())
    inside = tuple(f"{block}." for block in block_paths(model))
    fill(model, source.read(n for n in source.shapes if not n.startswith(inside)))
    if is_tied(model):
        tie_tables(model)
    walk = Walk(model, rows)
    for path in block_paths(model):
        fill(model, source.read(tensor_names(model, path)))
        walk.through(model.get_submodule(path))
        free(model, path)
    wanted = torch.cat(logits_of(load_model(directory), rows))
    got = torch.cat([walk.logits(chunk, torch.arange(chunk.x_1TH.shape[1])) for chunk in walk.chunks])
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


# ---- writing and loading


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bits", "head_bits"), [(4, 8), (4, 4), (8, 16)])
def test_what_is_written_loads_as_what_was_meant(
    family: str, bits: int, head_bits: int, make: Callable[..., Path], tmp_path: Path
) -> None:
    directory, rows = make(family), rows_of(family)
    settings = QuantizeSettings(bits=bits, group_size=32, head_bits=head_bits)
    pack(directory, tmp_path / "out", settings, rows)
    packed, original = load_model(tmp_path / "out"), load_model(directory)
    blocks = tuple(f"{b}." for b in block_paths(packed))
    kinds = {type(m) for n, m in packed.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(blocks)}
    assert kinds == {GroupInt4Linear if bits == 4 else GroupInt8Linear}
    tables = {4: GroupEmbedding, 8: GroupEmbedding, 16: torch.nn.Embedding}
    assert type(packed.get_input_embeddings()) is tables[head_bits]
    assert base_fingerprint(packed) == base_fingerprint(original) == source_fingerprint(open_original(directory))
    assert count_weights(packed) == count_weights(original)
    assert family_of(packed) is family_of(original)
    floats = widened(packed, original)
    for got, wanted in zip(logits_of(packed, rows), logits_of(floats, rows), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


def widened(packed: PreTrainedModel, like: PreTrainedModel) -> PreTrainedModel:
    """The float network with the weights that the packed modules stand for."""
    for name, module in packed.named_modules():
        target = like.get_submodule(name)
        if isinstance(module, (GroupInt4Linear, GroupInt8Linear)):
            target.weight.data = module.dequantize()
        elif isinstance(module, PackedEmbedding):
            target.weight.data = module(torch.arange(module.num_embeddings))
        elif isinstance(module, torch.nn.Embedding) or (name and module is packed.get_output_embeddings()):
            target.weight.data = module.weight.float()  # kept as floats, but in half precision
    return like


def test_tied_tables_are_stored_once_and_shared(make: Callable[..., Path], tmp_path: Path) -> None:
    pack(make("llama", tie_word_embeddings=True), tmp_path / "out", QuantizeSettings(group_size=32), ROWS)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert not any(name.startswith("lm_head") for name in index["weight_map"])
    model = load_model(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_calibration_helps_on_the_text_it_saw(make: Callable[..., Path], tmp_path: Path) -> None:
    directory = make("llama")
    rows = [torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(40)]
    wanted = torch.cat(logits_of(load_model(directory), rows))
    lost = {}
    for method in ("gptq", "rtn"):
        pack(directory, tmp_path / method, QuantizeSettings(group_size=32, method=method, head_bits=16), rows)
        lost[method] = float((torch.cat(logits_of(load_model(tmp_path / method), rows)) - wanted).norm())
    assert lost["gptq"] < 0.9 * lost["rtn"]


def test_an_interrupted_run_goes_on_to_the_same_bytes(make: Callable[..., Path], tmp_path: Path) -> None:
    directory, settings = make("llama"), QuantizeSettings(group_size=32)
    whole = pack(directory, tmp_path / "whole", settings, ROWS)

    class Stopped(Exception):
        pass

    def stop_at_the_third(done: int, *_: object) -> None:
        if done == 2:
            raise Stopped

    (tmp_path / "cut").mkdir()
    shards = ShardWriter(tmp_path / "cut", whole.num_shards)
    with pytest.raises(Stopped):
        Compressor(open_original(directory), settings, ROWS).run(shards, stop_at_the_third)
    assert [shards.is_done(n) for n in (1, 2, 3, 4)] == [True, True, False, False]
    Compressor(open_original(directory), settings, ROWS).run(shards, lambda *_: None)
    for number in (1, 2, 3, 4):
        other = ShardWriter(tmp_path / "whole", whole.num_shards).file(number)
        assert shards.file(number).read_bytes() == other.read_bytes()
    assert [e.name for e in matrix_errors(shards)] == [
        e.name for e in matrix_errors(ShardWriter(tmp_path / "whole", 4))
    ]


def test_memory_does_not_grow_with_the_number_of_blocks(make: Callable[..., Path], tmp_path: Path) -> None:
    """No parameter of any block is in memory when the run ends, and at most one block's while it runs."""
    compressor = Compressor(open_original(make("llama")), QuantizeSettings(group_size=32), ROWS)
    (tmp_path / "out").mkdir()
    filled: list[int] = []

    def look(*_: object) -> None:
        blocks = [compressor.model.get_submodule(b) for b in compressor.blocks]
        filled.append(sum(any(p.device.type != "meta" for p in block.parameters()) for block in blocks))

    compressor.run(ShardWriter(tmp_path / "out", compressor.num_shards), look)
    assert max(filled) == 0  # steps are told between blocks


# ---- comparing


@pytest.mark.parametrize("family", ["llama", "v1", "v2"])
def test_the_comparison_is_that_of_whole_networks(family: str, make: Callable[..., Path], tmp_path: Path) -> None:
    directory, rows = make(family), rows_of(family)
    pack(directory, tmp_path / "out", QuantizeSettings(group_size=32), rows)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    texts = [Text(tuple(ids), "en" if i else "zh") for i, ids in enumerate(rows)]
    got = compare(open_original(directory), PackedSource(tmp_path / "out", raw), texts, lambda *_: None)
    first, second = (logits_of(load_model(d), rows) for d in (directory, tmp_path / "out"))
    nll = kl = same = count = 0.0
    for ids, a, b in zip(rows, first, second, strict=True):
        start = ids.index(92) if family == "v1" else 0  # the prompt of v1 is read both ways, so nothing predicts it
        a, b = a[start:-1].double().log_softmax(-1), b[start:-1].double().log_softmax(-1)
        nll -= float(b.gather(1, torch.tensor(ids[start + 1 :])[:, None]).sum())
        kl += float((a.exp() * (a - b)).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        count += len(a)
    assert got.total.num_tokens == count
    assert got.total.nll_packed / count == pytest.approx(nll / count, rel=1e-4)
    assert got.total.mean_kl == pytest.approx(kl / count, rel=1e-2, abs=3e-7)  # a difference of float32 sums
    assert got.total.num_same_top == same
    assert sum(t.num_tokens for t in got.by_label.values()) == count
    assert len(got.blocks) == 3
    assert all(0 < error < 1 for _, error in got.blocks)


def test_a_text_that_nothing_predicts(make: Callable[..., Path], tmp_path: Path) -> None:
    directory = make("v1")
    pack(directory, tmp_path / "out", QuantizeSettings(group_size=32, method="rtn"), [])
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    prompts = [Text((5, 6, 91, 92))]
    with pytest.raises(ModelError, match="holds no token that this model predicts"):
        compare(open_original(directory), PackedSource(tmp_path / "out", raw), prompts, lambda *_: None)


# ---- what is refused


def test_a_flipped_byte_is_found_and_named(make: Callable[..., Path], tmp_path: Path) -> None:
    pack(make("llama"), tmp_path / "out", QuantizeSettings(group_size=32, method="rtn"), [])
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ModelError, match=r"(weight|weight_scale) is not as it was written") as caught:
            load_model(tmp_path / "out")
        assert "\n" not in str(caught.value)
        file.write_bytes(good)
    load_model(tmp_path / "out")


@pytest.mark.parametrize("bits", [3, 8])
def test_another_width_than_is_stored(bits: int, make: Callable[..., Path], tmp_path: Path) -> None:
    pack(make("llama"), tmp_path / "out", QuantizeSettings(group_size=32, method="rtn"), [])
    with pytest.raises(ModelError, match=f"bits={bits}|stored in 4 bits; it cannot become {bits}"):
        load_model(tmp_path / "out", bits=bits)
    assert load_model(tmp_path / "out", bits=4).config.quantization_bit == 4


def test_a_version_of_later_days(make: Callable[..., Path], tmp_path: Path) -> None:
    pack(make("llama"), tmp_path / "out", QuantizeSettings(group_size=32, method="rtn"), [])
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["version"] = 2
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="version 2, bits 4; this release reads version 1"):
        load_model(tmp_path / "out")


def test_columns_that_no_group_divides(make: Callable[..., Path]) -> None:
    source = open_original(make("llama", intermediate_size=72))
    with pytest.raises(ModelError, match=r"mlp\.down_proj has 72 columns, which no group of 32 divides: use bits=8"):
        Compressor(source, QuantizeSettings(), ROWS)


def test_a_packed_model_is_no_original(make: Callable[..., Path], tmp_path: Path, shared: Path) -> None:
    pack(make("llama"), tmp_path / "out", QuantizeSettings(group_size=32, method="rtn"), [])
    for directory in (tmp_path / "out", shared / "fixtures" / "chatglm" / "tiny_v1_chat_int4"):
        with pytest.raises(ModelError, match="packed to 4 bits already; give the float checkpoint"):
            open_original(directory)


def test_an_incomplete_checkpoint(make: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    directory = make("llama")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 tensors are missing .*model\.layers\.1\.mlp\.up_proj\.weight"):
        Compressor(open_original(directory), QuantizeSettings(), ROWS)


def test_the_published_layout_loads_as_a_published_checkpoint(make: Callable[..., Path], tmp_path: Path) -> None:
    directory, rows = make("v1"), rows_of("v1")
    settings = QuantizeSettings(method="rtn", head_bits=16, layout="published")
    compressor = pack(directory, tmp_path / "out", settings, [])
    config = {k: v for k, v in compressor.source.raw_config.items()} | {"quantization_bit": 4}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    got, wanted = load_model(tmp_path / "out"), load_model(directory, bits=4)
    for a, b in zip(logits_of(got, rows), logits_of(wanted, rows), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)  # its embedding is stored in half precision
    with pytest.raises(ModelError, match="only ChatGLM has a published layout"):
        Compressor(open_original(make("llama")), settings, [])
