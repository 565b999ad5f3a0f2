"""Training of ChatGLM and on packed bases goes the same road, with the same promises."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel

from pingjia import chat, data
from pingjia.errors import TrainingError
from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.tune import Hooks
from pingjia.tune.step import build_batch, mean_loss

Make = Callable[[], Path]


@pytest.fixture
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


both = pytest.mark.parametrize("base", ["chatglm", "chatglm2"], indirect=True)
packed = pytest.mark.parametrize(
    ("base", "bits"), [("chatglm", 4), ("chatglm2", 8), ("tiny_llama", 4)], indirect=["base"]
)


def weights(directory: Path) -> str:
    return hashlib.sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()


def stop_after(step: int) -> Hooks:
    seen: list[int] = []
    return Hooks(on_step=lambda log: seen.append(log.step), should_stop=lambda: seen[-1] >= step)


@both
def test_a_stopped_run_goes_on_bit_for_bit(tune: Callable, tmp_path: Path, base: Path) -> None:
    first = tune(model=base, output_dir=str(tmp_path / "whole"), learning_rate=0.01)
    assert not tune(model=base, hooks=stop_after(3), learning_rate=0.01).finished
    again = tune(model=base, learning_rate=0.01)
    assert again.last_loss == first.last_loss
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@both
def test_it_learns(tune: Callable, tmp_path: Path, base: Path) -> None:
    """Seven rows by heart: the loss comes near zero, so targets and positions belong together."""
    result = tune(model=base, learning_rate=0.02, num_train_epochs=80, lora_rank=16, lora_dropout=0.0, save_steps=1000)
    assert result.last_loss < 0.7


@both
def test_the_adapter_sits_where_it_was_asked_for(tune: Callable, tmp_path: Path, base: Path) -> None:
    plans: list[Any] = []
    tune(model=base, lora_target="", lora_layers="2-3", max_steps=2, hooks=Hooks(on_plan=plans.append))
    assert len(plans[0].targets.modules) == 2
    assert all(m.endswith("query_key_value") for m in plans[0].targets.modules)
    assert [".layers.1." in m or ".layers.2." in m for m in plans[0].targets.modules] == [True, True]
    tensors = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 4


@both
def test_packed_rows_have_the_loss_of_single_ones(base: Path, rows_file: Path) -> None:
    model, tokenizer = load_model(base), chat.load_tokenizer(base)
    examples = list(data.read_examples([rows_file], on_problem=lambda p: pytest.fail(str(p))))
    rows, _ = data.encode_examples(examples, tokenizer, 256)
    family = family_of(model)
    use_packed_attention(model)

    def batch(some: list[Any]) -> Any:
        return build_batch(some, family, model.config, torch.device("cpu"))

    together = mean_loss(model, [batch(rows)])
    assert mean_loss(model, [batch([row]) for row in rows]) == pytest.approx(together, rel=1e-5)
    model.set_attn_implementation("eager")
    total = 0.0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
            learnt = [i for i in range(1, len(row.ids)) if row.learn[i]]
            total -= sum(float(torch.log_softmax(logits[i - 1], -1)[row.ids[i]]) for i in learnt)
    assert total / sum(row.num_learnt for row in rows) == pytest.approx(together, rel=1e-4)


@packed
def test_on_a_packed_base(tune: Callable, tmp_path: Path, base: Path, bits: int) -> None:
    """Resumed bit for bit; not mixed with a run on the floats; loaded by PEFT on the floats with an effect."""
    settings = {"model": base, "quantization_bit": bits, "learning_rate": 0.01}
    plans: list[Any] = []
    whole = tune(**settings, output_dir=str(tmp_path / "whole"), hooks=Hooks(on_plan=plans.append))
    assert plans[0].num_parameters > sum(p.numel() for p in load_model(base).parameters())
    tune(**settings, hooks=stop_after(3))
    for other in ({"quantization_bit": None}, {"quantization_bit": 12 - bits}):
        with pytest.raises(TrainingError, match="belongs to a run with other"):
            tune(**(settings | other))
    assert tune(**settings).last_loss == whole.last_loss
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    ids = torch.tensor([[5, 6, 7, 8]]) if base.name.startswith("llama") else prompt(base)
    plain = load_model(base)
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        after = PeftModel.from_pretrained(plain, tmp_path / "out").eval()(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-3


def prompt(base: Path) -> torch.Tensor:
    return torch.tensor([chat.load_tokenizer(base).render([{"role": "user", "content": "冰箱保修多久？"}])])


def test_another_number_format_is_another_run(tune: Callable, tmp_path: Path) -> None:
    tune(hooks=stop_after(2))
    with pytest.raises(TrainingError, match="belongs to a run with other"):
        tune(dtype="bfloat16")


def test_where_a_data_file_lies_does_not_make_it_another_run(tune: Callable, tmp_path: Path, rows_file: Path) -> None:
    tune(max_steps=2)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(b"\n" + rows_file.read_bytes())
    assert tune(max_steps=2, dataset=moved).was_finished
    assert json.loads((tmp_path / "out" / "pingjia.json").read_text(encoding="utf-8"))["data"]["files"] == [
        str(rows_file)
    ]
