"""Training in half precision: what learns stays in float32, and gradients that overflow float16 cost no row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError

from pingjia.errors import TrainingError
from pingjia.tune import Hooks, precision
from pingjia.tune.checkpoint import checkpoints
from pingjia.tune.journal import read_log
from pingjia.tune.precision import PLAIN, Bfloat16, Float16, base_dtype, pick_precision, require_float32
from pingjia.tune.settings import TuneSettings

CPU = torch.device("cpu")
RUN: dict[str, Any] = {"lora_dropout": 0.0, "max_steps": 6, "save_steps": 5, "learning_rate": 5e-3}


def losses(folder: Path) -> list[float]:
    return [log.loss for log in read_log(folder / "trainer_log.jsonl")]


def events(folder: Path) -> dict[int, str]:
    return {log.step: log.event for log in read_log(folder / "trainer_log.jsonl") if log.event}


def scale_in(folder: Path) -> dict[str, Any]:
    """Of the newest checkpoint in mid-run; the last of all holds no optimizer any more."""
    states = [torch.load(c.path / "trainer_state.pt", weights_only=True) for c in checkpoints(folder)]
    found: dict[str, Any] = [state["optimizer"] for state in states if state["optimizer"]][-1]["loss_scale"]
    return found


# ---- the scale by itself


def test_gradients_do_not_know_the_scale() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    half = Float16(CPU)
    half.attach(optimizer)
    half.scaled((weight * weight).sum()).backward()
    assert weight.grad.tolist() == [4 * 2.0**16, 6 * 2.0**16]
    half.unscale(optimizer)
    assert weight.grad.tolist() == [4, 6]
    half.step(optimizer)
    assert weight.tolist() == [0, 0]


def test_the_scale_falls_to_one_and_no_further_and_grows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    half = Float16(CPU, first_scale=4.0)
    half.attach(optimizer)
    seen = []
    while True:
        half.scaled(weight.sum()).backward()
        half.unscale(optimizer)
        if not half.skip():
            break
        seen.append(half.scale)
    assert seen == [2, 1]
    assert half.num_skipped == 2
    for _ in range(3):
        half.step(optimizer)
        half.scaled(weight.sum()).backward()
        half.unscale(optimizer)
    assert half.scale == 2


def test_weights_that_learn_in_float16_are_refused() -> None:
    with pytest.raises(TrainingError, match="1 tensors that learn are stored in float16 themselves"):
        require_float32([torch.nn.Parameter(torch.ones(2, dtype=torch.float16)), torch.nn.Parameter(torch.ones(2))])
    require_float32([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])


# ---- what a recipe means


def settings(**changed: Any) -> TuneSettings:
    return TuneSettings(output_dir="-", **changed)


def test_both_at_once() -> None:
    with pytest.raises(ValidationError, match="choose one"):
        settings(fp16=True, bf16=True)


def test_which_format_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_precision(settings(), CPU) is PLAIN
    assert isinstance(pick_precision(settings(bf16=True), CPU), Bfloat16)
    assert isinstance(pick_precision(settings(fp16=True), CPU), Float16)
    card = torch.device("cuda")
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(precision, "describe", lambda device: "npu (Ascend910A)")
    assert isinstance(pick_precision(settings(), card), Float16), "a 910A computes in float16 and must scale the loss"
    with pytest.raises(TrainingError, match=r"npu \(Ascend910A\) has no bfloat16; use fp16=true"):
        pick_precision(settings(bf16=True), card)


def test_the_base_is_loaded_accordingly() -> None:
    card = torch.device("cuda")
    assert base_dtype("auto", settings(), card) == "auto"
    assert base_dtype("auto", settings(fp16=True), card) == "float16"
    assert base_dtype("auto", settings(bf16=True), card) == "bfloat16"
    assert base_dtype("auto", settings(fp16=True), CPU) == "auto"
    assert base_dtype("float32", settings(fp16=True), card) == "float32"
    with pytest.raises(TrainingError, match="fp16=true computes in float16, and dtype=bfloat16"):
        base_dtype("bfloat16", settings(fp16=True), card)


# ---- whole runs


@pytest.mark.parametrize("key", ["fp16", "bf16"])
def test_a_run_learns_what_one_in_float32_learns(tune: Callable, tmp_path: Path, key: str) -> None:
    dtypes: set[torch.dtype] = set()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: dtypes.add(output.dtype) if type(module) is torch.nn.Linear else None
    )
    try:
        tune(output_dir=str(tmp_path / "half"), **{key: True}, **RUN)
    finally:
        handle.remove()
    assert torch.float16 in dtypes or torch.bfloat16 in dtypes
    tune(output_dir=str(tmp_path / "whole"), **RUN)
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "whole"), rel=5e-3)
    tensors = safetensors.torch.load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert events(tmp_path / "half") == {}, "a scale of 65536 is borne by so small a network"


class Overflow:
    """Makes gradients overflow in chosen updates, so many attempts long: as if the loss had been scaled too high."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: dict[int, int]) -> None:
        from pingjia.tune import loop
        from pingjia.tune.distributed import Alone

        self.left, self.step = dict(at), -1
        real_update, real_backward = loop.update, Alone.backward

        def update(*args: Any, **kwargs: Any) -> Any:
            self.step += 1
            return real_update(*args, **kwargs)

        def backward(ranks: Any, loss: torch.Tensor) -> None:
            real_backward(ranks, loss * float("inf") if self.falls() else loss)

        monkeypatch.setattr(loop, "update", update)
        monkeypatch.setattr(Alone, "backward", backward)

    def falls(self) -> bool:
        if not self.left.get(self.step, 0):
            return False
        self.left[self.step] -= 1
        return True


def test_an_overflow_halves_the_scale_and_loses_no_row(
    tune: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(output_dir=str(tmp_path / "whole"), fp16=True, **RUN)
    Overflow(monkeypatch, {0: 1, 3: 2})
    tune(output_dir=str(tmp_path / "fell"), fp16=True, **RUN)
    found = events(tmp_path / "fell")
    assert list(found) == [1, 4]
    assert found[1] == (
        "gradients overflowed float16: loss scale 65536 -> 32768, same rows again (1 attempts skipped so far)"
    )
    assert "32768 -> 8192" in found[4]
    assert "(3 attempts" in found[4]
    assert losses(tmp_path / "fell") == pytest.approx(losses(tmp_path / "whole"), rel=2e-3)
    saved = scale_in(tmp_path / "fell")
    assert (saved["scale"], saved["num_skipped"]) == (8192, 3)


def test_gradients_that_overflow_at_every_scale_stop_the_run(
    tune: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Overflow(monkeypatch, {2: 99})
    with pytest.raises(
        TrainingError,
        match=r"gradient norm is (nan|inf): .*forward pass is sound.*overflow float16 although the loss is scaled by 1 "
        r"only: use bf16=true",
    ):
        tune(fp16=True, **RUN | {"save_steps": 1})
    assert checkpoints(tmp_path / "out")[-1].step == 2


def test_a_loss_that_is_no_number_is_not_tried_again(
    tune: Callable, make_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that overflow on the way forward do so at every scale."""
    directory = make_llama(5)
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e4)
    tensors["model.layers.1.post_attention_layernorm.weight"].fill_(300.0)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"loss is .*begins in model\.layers\.1\..*largest float16"):
        tune(model=directory, fp16=True, **RUN)


def test_a_stopped_run_goes_on_bit_for_bit_with_its_scale(
    tune: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Overflow(patch, {1: 3})
        tune(output_dir=str(tmp_path / "whole"), fp16=True, **RUN)
    seen: list[int] = []
    hooks = Hooks(on_step=lambda log: seen.append(log.step), should_stop=lambda: seen[-1] >= 3)
    with monkeypatch.context() as patch:
        Overflow(patch, {1: 3})
        assert not tune(fp16=True, hooks=hooks, **RUN).finished
    assert scale_in(tmp_path / "out")["scale"] == 8192
    assert tune(fp16=True, **RUN).finished
    assert scale_in(tmp_path / "out") == scale_in(tmp_path / "whole")
    left, right = (tmp_path / n / "adapter_model.safetensors" for n in ("whole", "out"))
    assert left.read_bytes() == right.read_bytes()
