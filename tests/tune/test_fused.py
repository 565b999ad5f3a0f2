"""The shorter way through adapted linears, gated units and norms gives the numbers of the long one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.tune import buffers, fused
from pingjia.tune.fused import AdaptedProduct, AdaptedSum, GatedUnit, RootMeanSquareNorm, fuse, unfused
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import build_batch, summed_loss
from pingjia.types import Encoded

ROWS = [Encoded(tuple(range(5, 5 + n)), tuple(i > n // 2 for i in range(n))) for n in (30, 21, 40)]
Adapted = Callable[..., Any]


@pytest.fixture
def adapted(tiny_llama: Path) -> Adapted:
    """adapted(bits, **TuneSettings): the tiny network under an adapter that changes something already."""

    def make(bits: int | None = None, base: Path = tiny_llama, **changed: Any) -> Any:
        wanted = {"lora_rank": 4, "lora_dropout": 0.0, "lora_target": "all"} | changed
        settings = TuneSettings(output_dir="-", **wanted)
        model = load_model(base, bits=bits)
        result = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
        torch.manual_seed(1)
        for name, parameter in result.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn_like(parameter)
        use_packed_attention(model)
        return result.train()

    return make


def learn(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    batch = build_batch(ROWS, family_of(model.get_base_model()), model.config, torch.device("cpu"))
    loss = summed_loss(model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(model: Any) -> None:
    long_loss, long = learn(model)
    fuse(model)
    loss, gradients = learn(model)
    assert loss == pytest.approx(long_loss, rel=1e-6)
    assert gradients.keys() == long.keys()
    for name, gradient in long.items():
        assert (gradients[name] - gradient).abs().max() <= 3e-5 * gradient.abs().max(), name


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"lora_target": "q_proj,v_proj"},
        {"lora_target": "down_proj"},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_layers": "2-3"},
        {"lora_target": "embedding,attention"},
        {"bits": 4},
        {"bits": 8},
    ],
    ids=str,
)
def test_loss_and_gradients_are_the_same(adapted: Adapted, changed: dict[str, Any]) -> None:
    assert_same(adapted(**changed))


@pytest.mark.parametrize("base", ["chatglm", "chatglm2"])
def test_of_chatglm_too(adapted: Adapted, base: str, request: pytest.FixtureRequest) -> None:
    assert_same(adapted(base=request.getfixturevalue(base)))


@pytest.mark.parametrize(
    "changed", [{}, {"bits": 4}, {"base": "chatglm"}, {"base": "chatglm2"}, {"gradient_checkpointing": True}], ids=str
)
def test_where_every_matrix_lies_in_a_shared_block(
    adapted: Adapted, changed: dict[str, Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a real network do. Four times over, so that blocks are used again; and none stays in use."""
    monkeypatch.setattr(buffers, "LEAST_BYTES", 0)
    monkeypatch.setattr(fused, "BUFFERS", buffers.Buffers())
    changed = dict(changed)
    checkpointing = changed.pop("gradient_checkpointing", False)
    if "base" in changed:
        changed["base"] = request.getfixturevalue(changed["base"])
    model = adapted(**changed)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model)
    first, num_blocks = learn(model), fused.BUFFERS.num_free
    for _ in range(2):
        again = learn(model)
        assert again[0] == first[0]
        assert all(torch.equal(again[1][name], gradient) for name, gradient in first[1].items())
    assert num_blocks > 2
    assert fused.BUFFERS.num_free == num_blocks


def test_with_checkpointed_activations(adapted: Adapted) -> None:
    model = adapted(lora_dropout=0.3)
    fuse(model)
    torch.manual_seed(5)
    whole = learn(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(5)
    again = learn(model)
    assert again[0] == whole[0]
    assert all(torch.allclose(again[1][name], whole[1][name], rtol=1e-5, atol=1e-7) for name in whole[1])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shorter way was taken; "gated product": one of silu(gate) * x."""
    seen: Counter[str] = Counter()

    def counted(kind: Any) -> Any:
        real = kind.apply

        def apply(*args: Any) -> Any:
            gated = kind is AdaptedProduct and args[1] is not None
            seen["gated product" if gated else kind.__name__] += 1
            return real(*args)

        return apply

    for kind in (AdaptedProduct, AdaptedSum, GatedUnit, RootMeanSquareNorm):
        monkeypatch.setattr(kind, "apply", counted(kind))
    return seen


def test_every_part_takes_the_shorter_way(adapted: Adapted, calls: Counter[str]) -> None:
    """Or the tests above would compare PEFT with PEFT."""
    model = adapted()
    fuse(model)
    learn(model)
    assert calls == {"AdaptedProduct": 18, "gated product": 3, "RootMeanSquareNorm": 7}
    calls.clear()
    with unfused(model):
        learn(model)
    assert not calls
    learn(model)
    assert calls.total() == 28, "back again"


def test_which_way_other_networks_take(adapted: Adapted, calls: Counter[str]) -> None:
    for changed, expected in (
        ({"bits": 4}, {"AdaptedSum": 21, "GatedUnit": 3, "RootMeanSquareNorm": 7}),
        ({"use_dora": True}, {"GatedUnit": 3, "RootMeanSquareNorm": 7}),
        ({"lora_target": "q_proj"}, {"AdaptedProduct": 3, "GatedUnit": 3, "RootMeanSquareNorm": 7}),
    ):
        calls.clear()
        model = adapted(**changed)
        fuse(model)
        learn(model)
        assert calls == expected


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_dropout_by_finite_differences(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask that stays the same: gradcheck in float64, of x, the gate, A and B."""
    torch.manual_seed(0)
    mask = torch.rand(5, 6) > 0.4
    monkeypatch.setattr(fused, "_kept", lambda h, dropped: mask)
    x, gate = (torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    a, b = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 6), (7, 2)))
    if packed:

        def run(x: Any, gate: Any, a: Any, b: Any) -> Any:
            return fused.AdaptedSum.apply(x @ weight.T, x, a, b, 1.5, 0.4)
    else:

        def run(x: Any, gate: Any, a: Any, b: Any) -> Any:
            return AdaptedProduct.apply(x, gate, weight, bias, a, b, 1.5, 0.4)

    assert torch.autograd.gradcheck(run, (x, gate, a, b)) if not packed else True
    if packed:
        assert torch.autograd.gradcheck(lambda x, a, b: run(x, None, a, b), (x, a, b))


def test_gradients_of_gate_and_norm_by_finite_differences() -> None:
    torch.manual_seed(0)
    x, gate = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(GatedUnit.apply, (x, gate))
    weight = torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: RootMeanSquareNorm.apply(x, weight, 1e-5), (x,))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x, zero = torch.ones(400, 64), torch.zeros(8, 64)
    a, b = torch.eye(64), torch.full((8, 64), 1 / 64)
    y = AdaptedProduct.apply(x, None, zero, None, a, b, 1.0, 0.25)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    assert y.std().item() > 0.01
    assert fused._kept(x, 0.25).float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert fused._kept(x, 0.0) is None


def test_under_autocast_modules_go_their_own_way() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.tensor([[1, 2, 3]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(input_ids=ids).logits
        fuse(model)
        assert torch.equal(model(input_ids=ids).logits, before)
