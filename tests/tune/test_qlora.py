"""Adapters over a base that bitsandbytes has packed: they learn, by the right gradient, and are plain adapters."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pingjia.chat import load_tokenizer
from pingjia.data import encode_examples, read_examples
from pingjia.errors import ModelError, TrainingError
from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.quant.bnb import BnbFormat, is_packed_by_bnb
from pingjia.tune.journal import read_log
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.relief import base_linears, refusals
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import build_batch, summed_loss

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is needed: pip install 'pingjia[bnb]'"
)
NF4 = {"quantization_bit": 4, "quantization_method": "bitsandbytes"}
FORMS = [BnbFormat(4), BnbFormat(4, "fp4", False), BnbFormat(8)]


@pytest.fixture
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


bases = pytest.mark.parametrize("base", ["tiny_llama", "chatglm", "chatglm2"], indirect=True)


def adapted(directory: Path, bits: Any, **changed: Any) -> Any:
    settings = TuneSettings(output_dir="-", lora_rank=4, lora_dropout=0.0, lora_target="all", **changed)
    model = load_model(directory, bits=bits)
    result = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
    use_packed_attention(model)
    torch.manual_seed(1)
    for name, parameter in result.named_parameters():
        if "lora_B" in name:  # zero at first; A would get no gradient
            parameter.data = 0.1 * torch.randn_like(parameter)
    return result.train()


def gradients(model: Any, directory: Path, file: Path) -> dict[str, torch.Tensor]:
    rows, _ = encode_examples(read_examples([file], on_problem=print), load_tokenizer(directory), 256)
    batch = build_batch(rows[:3], family_of(model.get_base_model()), model.config, torch.device("cpu"))
    (summed_loss(model, batch) / batch.num_learnt).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def unpacked(packed: Any, floats: Any) -> Any:
    """The float network with the weights that the packed one stands for, by bitsandbytes' own unpacking."""
    import bitsandbytes.functional

    linears = dict(base_linears(floats))
    for name, linear in base_linears(packed):
        weight = linear.weight
        if weight.dtype == torch.int8:
            linears[name].weight.data = weight.CB.float() * weight.SCB[:, None] / 127
        else:
            linears[name].weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return floats


@bases
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_are_those_over_the_unpacked_base(base: Path, form: BnbFormat, rows_file: Path) -> None:
    """To 1e-4 of each tensor's largest; the adapter's starting values are the same on both."""
    packed = adapted(base, form)
    assert all(is_packed_by_bnb(m) for _, m in base_linears(packed))
    floats = unpacked(packed, adapted(base, None))
    got, wanted = gradients(packed, base, rows_file), gradients(floats, base, rows_file)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        assert (got[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


@bases
@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_learns_and_leaves_a_plain_adapter(tune: Callable, tmp_path: Path, base: Path, bits: int) -> None:
    result = tune(
        model=base,
        quantization={"quantization_bit": bits, "quantization_method": "bitsandbytes"},
        lora_dropout=0.0,
        learning_rate=1e-2,
        per_device_train_batch_size=7,
        max_steps=6,
    )
    assert result.finished
    losses = [log.loss for log in read_log(tmp_path / "out" / "trainer_log.jsonl")]
    assert losses[3] < losses[0], "three updates on the same rows"
    assert losses[-1] < losses[0] - 0.1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    tensors = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in tensors.values())


def test_the_adapter_loads_in_plain_peft(tune: Callable, tmp_path: Path, tiny_llama: Path) -> None:
    tune(quantization=NF4, learning_rate=1e-2, max_steps=3)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        after = PeftModel.from_pretrained(plain, tmp_path / "out").eval()(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_a_look_at_held_out_rows_changes_nothing(tune: Callable, tmp_path: Path, rows_file: Path, bits: int) -> None:
    """The losses of a run that looks after every update are those of one that never does."""
    for name, data in (("looks", {"eval_dataset": [str(rows_file)]}), ("blind", {})):
        tune(
            quantization=NF4 | {"quantization_bit": bits},
            output_dir=str(tmp_path / name),
            data=data,
            max_steps=4,
            eval_steps=1,
        )
    looks, blind = (read_log(tmp_path / name / "trainer_log.jsonl") for name in ("looks", "blind"))
    assert [log.loss for log in looks] == [log.loss for log in blind]


def test_dora_works_and_pissa_is_refused(tune: Callable, tmp_path: Path) -> None:
    result = tune(quantization=NF4, use_dora=True, max_steps=3, learning_rate=1e-2)
    assert result.finished
    with pytest.raises(TrainingError, match=r"init_lora_weights pissa .* are packed"):
        tune(quantization=NF4, init_lora_weights="pissa", output_dir=str(tmp_path / "p"))


def test_the_ladder_has_nothing_left_to_pack(tiny_llama: Path) -> None:
    assert set(refusals(adapted(tiny_llama, BnbFormat(4))).values()) == {"the base is packed by bitsandbytes already"}


def test_a_published_packed_checkpoint_is_not_packed_again(chatglm: Path, tmp_path: Path) -> None:
    load_model(chatglm, bits=4).save_pretrained(tmp_path / "int4")
    with pytest.raises(ModelError, match="stored in 4 bits; bitsandbytes packs floats"):
        load_model(tmp_path / "int4", bits=BnbFormat(4))
