"""Which modules are adapted, exactly; and that the adapter is one any PEFT tool reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pingjia.errors import TrainingError
from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.tune.lora import Targets, add_adapter, count_parameters, resolve_targets
from pingjia.tune.ranges import parse_layers
from pingjia.tune.settings import TuneSettings

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def targets(tiny_llama: Path) -> Callable[..., Targets]:
    model = load_model(tiny_llama)

    def resolve(target: str | list[str] = "", layers: str | None = None) -> Targets:
        settings = TuneSettings(output_dir="-", lora_target=target, lora_layers=layers)
        return resolve_targets(model, family_of(model), settings)

    return resolve


def modules(names: tuple[str, ...], layers: range = range(3)) -> set[str]:
    return {
        f"model.layers.{layer}.{'mlp' if name in FFN else 'self_attn'}.{name}" for layer in layers for name in names
    }


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("", ("q_proj", "v_proj")),
        ("attention", ATTENTION),
        ("ffn", FFN),
        ("all", ATTENTION + FFN),
        ("q_proj,down_proj", ("q_proj", "down_proj")),
        (["attention", "q_proj", "up_proj"], (*ATTENTION, "up_proj")),
    ],
)
def test_names_and_groups(targets: Callable[..., Targets], target: str | list[str], names: tuple[str, ...]) -> None:
    found = targets(target)
    assert set(found.modules) == modules(names)
    assert len(found.modules) == len(set(found.modules))
    assert set(found.names) == set(names)


@pytest.mark.parametrize(
    ("text", "layers"), [("1", range(1)), ("2-3", range(1, 3)), ("3", range(2, 3)), ("1,2,3", range(3))]
)
def test_layer_ranges(targets: Callable[..., Targets], text: str, layers: range) -> None:
    assert set(targets("attention", text).modules) == modules(ATTENTION, layers)


def test_a_single_layer_may_be_written_as_a_number() -> None:
    assert TuneSettings(output_dir="-", lora_layers=13).lora_layers == "13-13"


@pytest.mark.parametrize("text", ["0-2", "2-4", "3-2", "4", "1-2-3", "-1", "a", "", "1,,2", "1-2,9"])
def test_layers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(TrainingError, match=r"lora_layers .*: (the network has layers 1-3|write ranges like 13-28)"):
        parse_layers(text, 3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_porj", r"'q_porj' matches no linear layer; did you mean q_proj\?; this network has down_proj, .*"),
        ("atention", r"did you mean attention\?"),
        ("query_key_value", r"matches no linear layer; this network has"),
        ("proj", r"'proj' matches no linear layer"),
        ("lm_head", r"'lm_head' matches no linear layer"),
    ],
)
def test_a_target_that_matches_nothing_names_what_there_is(
    targets: Callable[..., Targets], target: str, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        targets(f"q_proj,{target}")


@pytest.mark.parametrize(("target", "layers"), [("all", None), ("q_proj,down_proj", "2-3")])
def test_the_adapter_sits_on_exactly_these_modules(tiny_llama: Path, target: str, layers: str | None) -> None:
    settings = TuneSettings(output_dir="-", lora_rank=4, lora_target=target, lora_layers=layers)
    model = load_model(tiny_llama)
    found = resolve_targets(model, family_of(model), settings)
    linears = dict(model.named_modules())
    expected = sum(4 * (linears[name].in_features + linears[name].out_features) for name in found.modules)
    total = sum(p.numel() for p in model.parameters())
    adapted = add_adapter(model, found, settings)
    trained = {n.split(".lora_")[0] for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{name}" for name in found.modules}
    assert count_parameters(adapted) == (expected, total + expected)


def test_the_same_seed_starts_from_the_same_matrices(tiny_llama: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        settings = TuneSettings(output_dir="-", lora_target="q_proj", seed=seed)
        model = load_model(tiny_llama)
        torch.rand(seed + 5)  # whatever was drawn before must not matter
        adapted = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
        return torch.cat([p.flatten() for n, p in adapted.named_parameters() if "lora_A" in n])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize("layers", [None, "2-3"])
def test_plain_peft_loads_it_and_answers_equally(
    tune: Callable, tiny_llama: Path, tmp_path: Path, layers: str | None
) -> None:
    """Trained here, loaded by `peft` and `transformers` alone: equal to the weights in memory, not to the base."""
    tune(lora_layers=layers)
    ids = torch.tensor([[1, 50, 60, 70, 80, 90, 2]])
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
        after = theirs(input_ids=ids).logits
        expected = ours(tiny_llama, tmp_path / "out", ids)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


def ours(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """W x + scale * B A x written out over the saved tensors, in packed attention."""
    import safetensors.torch

    from pingjia.models.attention import PackedSequences

    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    model = load_model(base)
    for name, a in tensors.items():
        if ".lora_A." in name:
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            module.weight.data += config["lora_alpha"] / config["r"] * b @ a
    use_packed_attention(model)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    return model(
        input_ids=ids, position_ids=positions, packed=PackedSequences.of([ids.shape[1]]), use_cache=False
    ).logits


def test_what_is_written_beside_the_adapter(tune: Callable, tmp_path: Path, tiny_llama: Path) -> None:
    result = tune(data={"eval_dataset": str(tmp_path / "eval.jsonl")} if write_eval(tmp_path) else None)
    about = json.loads((tmp_path / "out" / "pingjia.json").read_text(encoding="utf-8"))
    assert about["base"]["name"] == str(tiny_llama)
    assert about["data"]["num_rows"] == 7
    assert about["recipe"]["lora_rank"] == 4
    assert len(about["chat"]["golden"]) >= 3
    assert about["metrics"]["last_loss"] == result.last_loss
    assert result.eval_loss is not None
    assert about["metrics"]["eval_loss"] == result.eval_loss
    assert (tmp_path / "out" / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"], config["bias"]) == ("LORA", "CAUSAL_LM", 4, "none")


def write_eval(folder: Path) -> bool:
    (folder / "eval.jsonl").write_text('{"prompt": "Hello?", "response": "Hello."}\n', encoding="utf-8")
    return True
