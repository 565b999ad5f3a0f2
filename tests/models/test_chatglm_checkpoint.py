"""Published ChatGLM checkpoints: every layout is read, every defect is refused by name, in one line."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pingjia.errors import ModelError
from pingjia.models import checkpoint
from pingjia.models.chatglm import ChatGLMForCausalLM
from pingjia.models.chatglm2 import ChatGLM2ForCausalLM
from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig, generation_of
from pingjia.models.checkpoint import load_chatglm
from pingjia.quant import Int4Linear, Int8Linear, quantize_model
from pingjia.quant.convert import count_weights
from pingjia.quant.rows import quantize_rows

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures" / "chatglm"
BOTH = pytest.mark.parametrize(("network", "generation"), [("v1", "v1"), ("v2", "v2")], indirect=["network"])
IDS = torch.tensor([[10, 11, 12, 13, 91, 92, 30, 31]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((ours - reference).abs().max() <= tolerance * max(1.0, float(reference.abs().max())))


def tensors_of(network: PreTrainedModel, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """As published: both copies of a tied table, the unused frequencies, everything in one dtype."""
    tensors = {n: t.detach().clone() for n, t in network.state_dict().items()}
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    if isinstance(network, ChatGLMForCausalLM):
        for i in range(network.config.num_layers):
            tensors[f"transformer.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(2, dtype=dtype)
    else:
        tensors["transformer.rotary_pos_emb.inv_freq"] = torch.ones(2, dtype=dtype)
    return tensors


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Path]:
    """Write a network the way the published ones lie on disk."""

    def write(
        network: PreTrainedModel,
        tensors: dict[str, torch.Tensor] | None = None,
        *,
        pickled: bool = False,
        shards: int = 1,
        **config: Any,
    ) -> Path:
        directory = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        tensors = tensors_of(network) if tensors is None else tensors
        (directory / "config.json").write_text(json.dumps(network.config.to_diff_dict() | config))
        stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
        names = list(tensors)
        files = {}
        for i in range(shards):
            file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
            part = {n: tensors[n] for n in names[i::shards]}
            torch.save(part, directory / file) if pickled else save_file(part, directory / file)
            files |= dict.fromkeys(part, file)
        if shards > 1:
            index = {"metadata": {"total_size": 1}, "weight_map": files}
            (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        return directory

    return write


def refused(directory: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_chatglm(directory, **options)
    assert "\n" not in str(caught.value)
    assert directory.name in str(caught.value) or "bits=" in str(caught.value)
    return str(caught.value)


# ---- layouts


@BOTH
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_published_layout_is_read(
    network: PreTrainedModel, generation: str, publish: Callable[..., Path], pickled: bool, shards: int
) -> None:
    model = load_chatglm(publish(network, pickled=pickled, shards=shards))
    assert type(model) is type(network)
    assert not model.training
    assert torch.equal(logits(model), logits(network))
    assert all(p.requires_grad for p in model.parameters())


def test_old_pickles_without_an_archive_are_read(v1: PreTrainedModel, publish: Callable[..., Path]) -> None:
    directory = publish(v1, pickled=True)
    file = directory / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    assert torch.equal(logits(load_chatglm(directory)), logits(v1))


@BOTH
def test_half_precision_files_become_what_is_asked_for(
    network: PreTrainedModel, generation: str, publish: Callable[..., Path]
) -> None:
    directory = publish(network, tensors_of(network, torch.float16), torch_dtype="float16")
    assert load_chatglm(directory).dtype == torch.float32
    assert load_chatglm(directory, dtype="bfloat16").dtype == torch.bfloat16
    assert close(logits(load_chatglm(directory)), logits(network), 5e-3)


def test_the_head_may_be_stored_once_or_twice(v1: PreTrainedModel, publish: Callable[..., Path]) -> None:
    tensors = tensors_of(v1)
    once = {n: t for n, t in tensors.items() if n != "lm_head.weight"}
    for stored in (tensors, once):
        model = load_chatglm(publish(v1, stored))
        assert model.lm_head.weight is model.transformer.word_embeddings.weight
        assert torch.equal(logits(model), logits(v1))


def test_a_head_of_its_own_needs_the_config_to_say_so(v1: PreTrainedModel, publish: Callable[..., Path]) -> None:
    tensors = tensors_of(v1)
    tensors["lm_head.weight"] += 1
    message = refused(publish(v1, tensors))
    assert "lm_head.weight differs" in message
    assert "tie_word_embeddings: false" in message
    model = load_chatglm(publish(v1, tensors, tie_word_embeddings=False))
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert model.lm_head.weight is not model.transformer.word_embeddings.weight


@BOTH
def test_what_is_read_can_be_saved_and_read_again(
    network: PreTrainedModel, generation: str, publish: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_chatglm(publish(network, pickled=True, shards=2))
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(load_chatglm(tmp_path / "again")), logits(network))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(network))


# ---- packed


@BOTH
@pytest.mark.parametrize(("bits", "kind"), [(4, Int4Linear), (8, Int8Linear)])
def test_packing_while_reading_equals_packing_afterwards(
    network: PreTrainedModel, generation: str, publish: Callable[..., Path], bits: int, kind: type
) -> None:
    directory = publish(network)
    model = load_chatglm(directory, bits=bits)
    reference = quantize_model(load_chatglm(directory), bits)
    assert sum(isinstance(m, kind) for m in model.modules()) == 4 * network.config.num_layers
    assert model.config.quantization_bit == bits
    assert torch.equal(logits(model), logits(reference))


@BOTH
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_checkpoints_stay_packed(
    network: PreTrainedModel, generation: str, publish: Callable[..., Path], bits: int
) -> None:
    quantize_model(network, bits)
    tensors = tensors_of(network, torch.float16)
    directory = publish(network, tensors, pickled=True, quantization_bit=bits)
    model = load_chatglm(directory)
    assert close(logits(model), logits(network), 2e-2)
    name = next(n for n, t in tensors.items() if t.dtype == torch.int8)
    assert torch.equal(dict(model.named_parameters())[name], tensors[name])
    other = 12 - bits
    assert f"stored in {bits} bits; it cannot become {other}" in refused(directory, bits=other)
    assert close(logits(load_chatglm(directory, bits=bits)), logits(model))


def test_the_table_keeps_its_half_precision_under_packed_linears(
    v1: PreTrainedModel, publish: Callable[..., Path]
) -> None:
    directory = publish(v1, tensors_of(v1, torch.float16))
    model = load_chatglm(directory, bits=8)
    table = model.get_input_embeddings().weight
    assert (table.dtype, model.dtype, logits(model).dtype) == (torch.float16, torch.float32, torch.float32)
    assert not table.requires_grad
    wide = load_chatglm(directory, bits=8)
    wide.get_input_embeddings().weight.data = table.data.float()
    assert close(logits(model), logits(wide))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_embeddings_are_read(v1: PreTrainedModel, publish: Callable[..., Path], bits: int) -> None:
    quantize_model(v1, bits)
    tensors = tensors_of(v1, torch.float16)
    for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
        tensors[name], scale = quantize_rows(tensors[name], bits)
        tensors[f"{name}_scale"] = scale.half()
    directory = publish(v1, tensors, quantization_bit=bits, quantization_embeddings=True)
    model = load_chatglm(directory)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.weight.dtype == torch.int8
    assert table.weight is head.weight
    assert table.weight_scale is head.weight_scale
    step = float(v1.get_input_embeddings().weight.detach().abs().max()) / (2 ** (bits - 1) - 1)
    everything = torch.arange(v1.config.vocab_size)
    assert (table(everything) - v1.get_input_embeddings()(everything)).abs().max() <= 0.55 * step  # scales are fp16
    v1.get_input_embeddings().weight.data = table(everything)
    assert torch.allclose(logits(model), logits(v1), atol=5e-3)
    with pytest.raises(ModelError, match="load_model"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_packed_tables_are_saved_and_loaded_again(
    v1: PreTrainedModel, publish: Callable[..., Path], tmp_path: Path
) -> None:
    quantize_model(v1, 4)
    tensors = tensors_of(v1, torch.float16)
    name = "transformer.word_embeddings.weight"
    tensors[name], scale = quantize_rows(tensors[name], 4)
    tensors[f"{name}_scale"] = scale
    del tensors["lm_head.weight"]
    model = load_chatglm(publish(v1, tensors, quantization_bit=4, quantization_embeddings=True))
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = load_chatglm(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert count_weights(again) == count_weights(v1)


def test_a_packed_head_that_is_not_the_table_is_refused(v1: PreTrainedModel, publish: Callable[..., Path]) -> None:
    quantize_model(v1, 8)
    tensors = tensors_of(v1, torch.float16)
    for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
        tensors[name], tensors[f"{name}_scale"] = quantize_rows(tensors[name], 8)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].neg()
    assert "differs from" in refused(publish(v1, tensors, quantization_bit=8, quantization_embeddings=True))


@pytest.mark.parametrize("bits", [3, 16])
def test_other_widths_are_refused(v1: PreTrainedModel, publish: Callable[..., Path], bits: int) -> None:
    assert f"bits={bits}: choose 4 or 8" in refused(publish(v1), bits=bits)


def test_memory_while_packing_stays_near_the_packed_size(
    publish: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No float copy of the network ever exists: at most one opened lot of tensors, and views on the file at that."""
    config = ChatGLMConfig(
        vocab_size=96, hidden_size=64, num_layers=2, num_attention_heads=4, inner_hidden_size=64,
        mask_token_id=90, gmask_token_id=91, bos_token_id=92, eos_token_id=93,
    )  # fmt: skip
    directory = publish(ChatGLMForCausalLM(config), shards=2)
    opened: list[int] = []
    real = checkpoint._batches

    def batches(stored: Any) -> Any:
        for file, names in real(stored):
            opened.append(sum(stored[n].num_bytes for n in names))
            yield file, names

    monkeypatch.setattr(checkpoint, "_batches", batches)
    monkeypatch.setattr(checkpoint, "_OPEN_BYTES", 20_000)
    load_chatglm(directory, bits=4)
    largest = 4 * max(3 * 64 * 64, 96 * 64)
    assert len(opened) > 4
    assert max(opened) < 20_000 + largest


# ---- defects


def test_missing_left_over_and_mis_shaped_tensors_are_named(v1: PreTrainedModel, publish: Callable[..., Path]) -> None:
    name = "transformer.layers.1.mlp.dense_h_to_4h.weight"
    tensors = tensors_of(v1)
    without = {n: t for n, t in tensors.items() if n != name}
    assert f"1 tensors are missing for a ChatGLM of 3 layers, hidden size 32: {name}" in refused(publish(v1, without))
    surplus = tensors | {"transformer.extra.weight": torch.ones(2)}
    assert "1 tensors are left over" in refused(publish(v1, surplus))
    assert "transformer.extra.weight" in refused(publish(v1, surplus))
    shaped = tensors | {name: torch.ones(48, 31)}
    assert f"{name} [48, 31] instead of [48, 32]" in refused(publish(v1, shaped))


@BOTH
@pytest.mark.parametrize("layers", [2, 5])
def test_a_config_that_lies_about_layers_is_found_out(
    network: PreTrainedModel, generation: str, publish: Callable[..., Path], layers: int
) -> None:
    message = refused(publish(network, num_layers=layers))
    assert f"of {layers} layers" in message
    assert ("left over" in message) == (layers == 2)
    assert ("missing" in message) == (layers == 5)
    assert f"layers.{min(layers, 3)}." in message


def test_a_config_that_lies_about_packing_is_found_out(v1: PreTrainedModel, publish: Callable[..., Path]) -> None:
    assert "weight_scale" in refused(publish(v1, quantization_bit=8))
    integer = tensors_of(v1) | {"lm_head.weight": torch.ones(96, 32, dtype=torch.int64)}
    assert "lm_head.weight int64" in refused(publish(v1, integer))
    quantize_model(v1, 8)
    assert "weight_scale" in refused(publish(v1, quantization_bit=0))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_shard_is_one_line(
    v1: PreTrainedModel, publish: Callable[..., Path], pickled: bool, share: float
) -> None:
    directory = publish(v1, pickled=pickled, shards=2)
    shard = next(directory.glob("*00002-of-00002*"))
    os.truncate(shard, int(share * shard.stat().st_size))
    message = refused(directory)
    assert shard.name in message
    assert "cannot be read, perhaps truncated" in message


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.file),))


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    v1: PreTrainedModel, publish: Callable[..., Path], tmp_path: Path, archive: bool
) -> None:
    directory = publish(v1, pickled=True)
    trace = tmp_path / "it-ran"
    tensors = {**tensors_of(v1), "bomb": Bomb(trace)}
    if archive:
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps(tensors))
    assert "holds more than tensors; refused, and none of it was run" in refused(directory)
    assert not trace.exists()


def test_files_that_are_not_the_weights_are_refused(v1: PreTrainedModel, publish: Callable[..., Path]) -> None:
    directory = publish(v1)
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refused(directory)
    (directory / "model.safetensors").unlink()
    assert "no weights" in refused(directory)
    directory = publish(v1, pickled=True)
    torch.save({"nested": {"a": torch.ones(1)}}, directory / "pytorch_model.bin")
    assert "holds more than tensors" in refused(directory)


def test_an_index_that_does_not_hold_is_refused(v1: PreTrainedModel, publish: Callable[..., Path]) -> None:
    directory = publish(v1, shards=2)
    index = directory / "model.safetensors.index.json"
    for broken, message in (
        ({"weight_map": {"a": "../../etc/passwd"}}, "outside its directory"),
        ({"weight_map": {"a": "model-00009.safetensors"}}, "1 of 1 shards are not there"),
        ({"weight_map": ["a"]}, "not an index"),
        ({}, "not an index"),
    ):
        index.write_text(json.dumps(broken))
        assert message in refused(directory)
    index.write_text("{")
    assert "not an index" in refused(directory)


def test_a_tensor_in_two_shards_is_refused(v1: PreTrainedModel, publish: Callable[..., Path]) -> None:
    directory = publish(v1, shards=2)
    first, second = sorted(directory.glob("model-0*"))
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name].clone()}, second)
    assert f"{name} lies here and again in {first.name}" in refused(directory)


# ---- which generation


def test_the_generation_is_told_from_the_keys(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type]] = [
        (ChatGLMConfig().to_diff_dict(), ChatGLMConfig),
        (ChatGLM2Config().to_diff_dict(), ChatGLM2Config),
        (ChatGLM2Config(seq_length=8192).to_diff_dict() | {"vocab_size": 65024}, ChatGLM2Config),  # as v3 has it
    ]
    for i, (config, kind) in enumerate(cases):
        directory = tmp_path / ("chatglm2-6b", "chatglm-6b", "chatglm3")[i]  # the names lie
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "code.Config"}}))
        read = AutoConfig.from_pretrained(directory)
        assert type(read) is kind
        assert not hasattr(read, "auto_map")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multi_query_group_num": 2}, "mixes ChatGLM-6B .* and ChatGLM2"),
        ({"num_layers": 0}, "num_layers must be a positive integer"),
        ({"num_layers": "28"}, "num_layers must be a positive integer"),
        ({"hidden_size": 4100}, "not a multiple of 4 x 32 heads"),
        ({"position_encoding_2d": False}, "position_encoding_2d False is not supported"),
        ({"quantization_bit": 3}, "quantization_bit 3"),
        ({"pre_seq_len": 128}, "P-Tuning"),
    ],
)
def test_contradictory_configs_of_v1(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ChatGLMConfig.from_dict(ChatGLMConfig().to_diff_dict() | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multi_query_group_num": 3}, "32 heads cannot share 3 groups"),
        ({"add_bias_linear": True}, "add_bias_linear True is not supported"),
        ({"multi_query_attention": False}, "multi_query_attention False is not supported"),
        ({"vocab_size": 7}, "vocab_size and padded_vocab_size differ"),
    ],
)
def test_contradictory_configs_of_v2(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ChatGLMConfig.from_dict(ChatGLM2Config().to_diff_dict() | changes)


def test_configs_of_no_generation_or_of_the_other() -> None:
    with pytest.raises(ModelError, match=r"no key of ChatGLM-6B .* found: hidden_size, model_type"):
        generation_of({"model_type": "chatglm", "hidden_size": 8})
    with pytest.raises(ModelError, match="lacks hidden_size"):
        generation_of({"inner_hidden_size": 8, "vocab_size": 9, "num_layers": 1, "num_attention_heads": 1})
    with pytest.raises(ModelError, match="that of a ChatGLMConfig"):
        ChatGLM2Config.from_dict(ChatGLMConfig().to_diff_dict())


def test_a_contradictory_config_names_its_directory(v1: PreTrainedModel, publish: Callable[..., Path]) -> None:
    assert "mixes ChatGLM-6B" in refused(publish(v1, multi_query_group_num=2))
    assert "num_layers must be a positive integer" in refused(publish(v1, num_layers=-1))


def test_a_config_that_is_none(v1: PreTrainedModel, publish: Callable[..., Path]) -> None:
    directory = publish(v1)
    for text, message in (("{", "cannot be read"), ("[]", "model_type is None"), ('{"model_type": "t5"}', "'t5'")):
        (directory / "config.json").write_text(text)
        assert message in refused(directory)
    (directory / "config.json").unlink()
    assert "cannot be read" in refused(directory)


# ---- the references on disk


@pytest.mark.parametrize("name", ["tiny_v1_chat", "tiny_v1_chat_int4"])
def test_pickled_and_safe_files_of_a_published_checkpoint_are_one_network(name: str, tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no reference outputs beside the repository: {SHARED}")
    for file in ("config.json", "pytorch_model.bin"):
        shutil.copy(SHARED / name / file, tmp_path / file)
    pickled, safe = load_chatglm(tmp_path), load_chatglm(SHARED / name)
    ids = torch.tensor([[5, 49, 135, 681, 684]])
    assert torch.equal(pickled(ids).logits, safe(ids).logits)
    assert isinstance(safe, ChatGLMForCausalLM)
    assert not isinstance(safe, ChatGLM2ForCausalLM)
