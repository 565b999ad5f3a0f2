"""A number that is none is traced to the module it came from, and to the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pingjia.errors import TrainingError
from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.tune.diagnose import Cause, find_cause, find_gradient
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import build_batch, summed_loss
from pingjia.types import Encoded

ROW = Encoded((5, 6, 7, 8, 9), (False, False, True, True, True))


@pytest.fixture
def cause(tiny_llama: Path) -> Callable[..., Cause | None]:
    """cause(spoil): what is found after spoil(model)."""

    def find(spoil: Callable[[torch.nn.Module], None]) -> Cause | None:
        settings = TuneSettings(output_dir="-", lora_rank=4, lora_target="all")
        model = load_model(tiny_llama)
        adapted = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
        use_packed_attention(model)
        spoil(adapted)
        batch = build_batch([ROW], family_of(model), model.config, torch.device("cpu"))
        return find_cause(adapted, [lambda: summed_loss(adapted, batch)])

    return find


def weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    return model.get_parameter(f"base_model.model.model.layers.{name}").data


def test_a_sound_network_has_no_cause(cause: Callable[..., Cause | None]) -> None:
    assert cause(lambda model: None) is None


def test_bad_weights_of_the_base(cause: Callable[..., Cause | None]) -> None:
    found = cause(lambda m: weight(m, "1.self_attn.v_proj.base_layer.weight")[0].fill_(float("nan")))
    assert str(found).startswith("it begins in model.layers.1.self_attn.v_proj: 64 of its weights are no numbers.")


def test_bad_weights_of_the_adapter(cause: Callable[..., Cause | None]) -> None:
    found = cause(lambda m: weight(m, "2.mlp.up_proj.lora_A.default.weight")[0, 0].fill_(float("inf")))
    assert str(found).startswith("it begins in model.layers.2.mlp.up_proj (adapter, A): 1 of its weights")


def test_an_overflow(cause: Callable[..., Cause | None]) -> None:
    def spoil(model: torch.nn.Module) -> None:
        weight(model, "0.mlp.down_proj.base_layer.weight").fill_(3e38)
        weight(model, "0.post_attention_layernorm.weight").fill_(1e4)

    found = cause(spoil)
    assert found is not None
    assert found.module == "model.layers.0.mlp.down_proj"
    assert "weights and input are sound" in str(found)
    assert "Lower learning_rate" in str(found)


def test_what_is_said_of_half_precision() -> None:
    text = str(Cause("model.layers.3.mlp.down_proj", 0, 40000.0, torch.float16))
    assert text == (
        "it begins in model.layers.3.mlp.down_proj: weights and input are sound (largest input 4e+04), the result is "
        "beyond 6.55e+04, the largest float16. Use bf16=true (or dtype=bfloat16), or float32 where the device has no "
        "bfloat16"
    )
    assert "computed before it overflowed in float16" in str(Cause("x", 0, None, torch.float16))


def test_gradients_alone() -> None:
    linears = [torch.nn.Linear(2, 2, bias=False) for _ in range(3)]
    named = [(f"layers.{i}.proj.weight", linear.weight) for i, linear in enumerate(linears)]
    for _, parameter in named:
        parameter.grad = torch.ones(2, 2)
    assert "their norm is none" in find_gradient(named)
    named[1][1].grad[0, 0] = float("nan")
    assert "1 of 3 gradients are not" in find_gradient(named)
    assert "layers.1.proj" in find_gradient(named)


def test_the_message_of_a_run_names_the_module(tune: Callable, make_llama: Callable[..., Path]) -> None:
    import safetensors.torch

    directory = make_llama(3)
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"loss is nan: training has diverged: it begins in model\.layers\.1\.self"):
        tune(model=directory)
