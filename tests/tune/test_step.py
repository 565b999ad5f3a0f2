"""The arithmetic of an update: packing, accumulation and checkpointing change nothing but time and memory."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

from pingjia.errors import TrainingError
from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.tune.distributed import ALONE
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import MicroBatch, build_batch, mean_loss, summed_loss, update
from pingjia.types import Encoded

CPU = torch.device("cpu")
Adapted = Callable[..., PeftModel]


def some_rows(count: int, *, seed: int = 3, vocab: int = 49152) -> list[Encoded]:
    """Rows of 2 to 40 tokens; what is learnt lies at the end, in the middle, or is a single token."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        size = chance.randint(2, 40)
        first = chance.randint(1, size - 1)
        last = chance.randint(first, size - 1)
        learn = tuple(first <= i <= last for i in range(size))
        rows.append(Encoded(tuple(chance.randrange(vocab) for _ in range(size)), learn))
    return rows


@pytest.fixture
def adapted(tiny_llama: Path) -> Adapted:
    """adapted(packed=True, **TuneSettings): the tiny network with an adapter that already changes something."""

    def make(*, packed: bool = True, **changed: object) -> PeftModel:
        settings = TuneSettings(
            output_dir="-", **{"lora_rank": 4, "lora_dropout": 0.0, "lora_target": "all", **changed}
        )
        model = load_model(tiny_llama)
        result = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
        generator = torch.Generator().manual_seed(11)
        for name, parameter in result.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        if packed:
            use_packed_attention(model)
        return result.train()

    return make


def plain_sgd(model: PeftModel) -> torch.optim.Optimizer:
    """Peak rate 1: an update moves a weight by rate_factor times its gradient."""
    return torch.optim.SGD([{"params": [p for p in model.parameters() if p.requires_grad], "peak": 1.0}])


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def batch_of(model: PeftModel, rows: Sequence[Encoded]) -> MicroBatch:
    return build_batch(rows, family_of(model), model.config, CPU)


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def one_by_one(model: PeftModel, rows: Sequence[Encoded]) -> float:
    """The loss as a textbook has it: each row alone, in transformers' own attention, every position's logits."""
    total = torch.zeros(())
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        labels = torch.tensor([t if learnt else -100 for t, learnt in zip(row.ids, row.learn, strict=True)])
        total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    total.backward()
    return total.item()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_packed_equals_one_by_one(adapted: Adapted, seed: int) -> None:
    rows = some_rows(7, seed=seed)
    packed, plain = adapted(), adapted(packed=False)
    loss = summed_loss(packed, batch_of(packed, rows))
    loss.backward()
    assert loss.item() == pytest.approx(one_by_one(plain, rows), rel=1e-5)
    assert_close(gradients(packed), gradients(plain))


def test_order_within_a_batch_does_not_matter(adapted: Adapted) -> None:
    rows = some_rows(6)
    model = adapted()
    losses = [mean_loss(model, [batch_of(model, order)]) for order in (rows, rows[::-1])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_row_does_not_see_its_neighbours(adapted: Adapted) -> None:
    """Other ids in the first row must not move the second one's loss at all."""
    first, second = some_rows(2, seed=5)
    unlearnt = Encoded(first.ids, tuple(False for _ in first.ids))
    other = Encoded(tuple((i + 1) % 49152 for i in first.ids), unlearnt.learn)
    model = adapted()
    losses = [mean_loss(model, [batch_of(model, [row, second])]) for row in (unlearnt, other)]
    assert losses[0] == losses[1]


def test_accumulation_equals_one_big_batch(adapted: Adapted) -> None:
    """With unequal numbers of learnt tokens, where a mean of means would be wrong."""
    rows = some_rows(8)
    results, weights = [], []
    for parts in ([rows], [rows[:1], rows[1:3], rows[3:]]):
        model = adapted()
        optimizer = plain_sgd(model)
        batches = [batch_of(model, part) for part in parts]
        results.append(update(ALONE, model, optimizer, batches, rate_factor=0.1, max_grad_norm=1e9))
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)
    assert (results[0].num_tokens, results[0].num_learnt) == (results[1].num_tokens, results[1].num_learnt)
    assert_close(*weights)


def test_a_mean_of_means_would_have_been_noticed(adapted: Adapted) -> None:
    """The rows of the test above are uneven enough to tell the two apart."""
    rows = some_rows(8)
    right, wrong = adapted(), adapted()
    (summed_loss(right, batch_of(right, rows)) / sum(row.num_learnt for row in rows)).backward()
    for part in (rows[:1], rows[1:3], rows[3:]):
        batch = batch_of(wrong, part)
        (summed_loss(wrong, batch) / batch.num_learnt / 3).backward()
    left, other = gradients(right), gradients(wrong)
    assert max(float((left[n] - other[n]).abs().max() / left[n].abs().max()) for n in left) > 0.05


def test_a_weight_multiplies_the_loss_of_its_row(adapted: Adapted) -> None:
    """Weight 2 pulls as the row twice; weight 0 not at all; held-out loss does not know weights."""
    first, second = some_rows(2, seed=9)
    weighted, repeated = adapted(), adapted()
    rows = [dataclasses.replace(first, weight=2.0), dataclasses.replace(second, weight=0.0)]
    loss = summed_loss(weighted, batch_of(weighted, rows))
    loss.backward()
    summed_loss(repeated, batch_of(repeated, [first, first])).backward()
    assert_close(gradients(weighted), gradients(repeated))
    assert mean_loss(weighted, [batch_of(weighted, rows)]) == mean_loss(weighted, [batch_of(weighted, [first, second])])


def test_gradient_checkpointing_changes_nothing(adapted: Adapted) -> None:
    rows = some_rows(5)
    plain, saving = adapted(), adapted()
    saving.enable_input_require_grads()
    saving.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert saving.base_model.model.is_gradient_checkpointing
    for model in (plain, saving):
        summed_loss(model, batch_of(model, rows)).backward()
    assert_close(gradients(plain), gradients(saving))


def test_gradient_checkpointing_in_a_whole_run(tune: Callable, tmp_path: Path) -> None:
    """Dropout is drawn again in the second forward; the weights stay those of a run without checkpointing."""
    plain = tune(output_dir=str(tmp_path / "a"))
    saving = tune(output_dir=str(tmp_path / "b"), gradient_checkpointing=True)
    assert saving.last_loss == pytest.approx(plain.last_loss, rel=1e-5)


def test_logits_exist_only_where_something_is_learnt(adapted: Adapted) -> None:
    rows = some_rows(6)
    model = adapted()
    batch = batch_of(model, rows)
    seen = []
    model.base_model.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:2]))
    summed_loss(model, batch)
    assert seen == [(1, sum(row.num_learnt for row in rows))]
    assert batch.num_learnt == sum(row.num_learnt for row in rows)
    assert batch.num_tokens == sum(len(row.ids) for row in rows)


def test_the_first_token_is_never_a_target(adapted: Adapted) -> None:
    model = adapted()
    row = Encoded((5, 6, 7), (True, True, True))
    batch = batch_of(model, [row, row])
    assert batch.keep_K.tolist() == [0, 1, 3, 4]
    assert batch.target_K.tolist() == [6, 7, 6, 7]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]


def test_clipping_bounds_the_step_and_reports_the_norm_before(adapted: Adapted) -> None:
    rows = some_rows(4)
    moves, norms = [], []
    for limit in (1e9, 0.01):
        model = adapted()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = plain_sgd(model)
        result = update(ALONE, model, optimizer, [batch_of(model, rows)], rate_factor=1.0, max_grad_norm=limit)
        norms.append(result.grad_norm)
        squares = [(p.detach() - before[n]).pow(2).sum() for n, p in model.named_parameters()]
        moves.append(float(sum(squares).sqrt()))
    assert norms[0] == pytest.approx(norms[1])
    assert moves[0] == pytest.approx(norms[0], rel=1e-3)
    assert moves[1] == pytest.approx(0.01, rel=1e-3)


def test_a_loss_that_is_no_number_leaves_the_weights_alone(adapted: Adapted) -> None:
    model = adapted()
    model.base_model.model.model.norm.weight.data[3] = float("nan")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(TrainingError, match="loss is nan: training has diverged"):
        update(ALONE, model, optimizer, [batch_of(model, some_rows(2))], rate_factor=1e-3, max_grad_norm=1.0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_mean_loss_is_without_dropout_and_puts_the_mode_back(adapted: Adapted) -> None:
    model = adapted(lora_dropout=0.5)
    batches = [batch_of(model, some_rows(3)), batch_of(model, some_rows(2, seed=9))]
    first, second = mean_loss(model, batches), mean_loss(model, batches)
    assert first == second
    assert model.training
    learnt = [b.num_learnt for b in batches]
    each = [mean_loss(model, [b]) for b in batches]
    assert first == pytest.approx(sum(n * m for n, m in zip(learnt, each, strict=True)) / sum(learnt), rel=1e-6)
