"""Where memory runs out the run uses less of it, and learns what it would have learnt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from pingjia.errors import TrainingError
from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.quant.formats import Int4Linear, Int8Linear
from pingjia.quant.half import HalfLinear
from pingjia.tune import Hooks, relief
from pingjia.tune.checkpoint import checkpoints
from pingjia.tune.distributed import ALONE
from pingjia.tune.frozen import layers_of
from pingjia.tune.journal import read_log
from pingjia.tune.ladder import HALF, INT4, INT8, Rung, next_step, path, skipped_of
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.relief import Memory, MemoryLimit, MemoryLimitReached, base_linears, is_out_of_memory, refusals
from pingjia.tune.settings import TuneSettings

Tune = Callable[..., Any]

# ---- which rung comes next


def all_steps(rung: Rung, rows: int, refused: dict[str, str]) -> list[str]:
    changes = []
    while (step := next_step(rung, rows, refused)) is not None:
        changes.append(step.change)
        rung = step.rung
    return changes


def test_the_whole_ladder() -> None:
    same = "; the rows of an update stay the same"
    assert all_steps(Rung(8), 8, {}) == [
        f"micro-batch 8 -> 4 rows, accumulation 1 -> 2{same}",
        f"micro-batch 4 -> 2 rows, accumulation 2 -> 4{same}",
        f"micro-batch 2 -> 1 rows, accumulation 4 -> 8{same}",
        "gradient checkpointing",
        HALF,
        INT8,
        INT4,
    ]


def test_what_a_network_cannot_do_is_passed_over_and_said() -> None:
    step = next_step(Rung(1, checkpointing=True), 4, {HALF: "no", INT8: "never"})
    assert step is not None
    assert step.change == INT4
    assert step.skipped == ("bfloat16 base passed over: no", "INT8 base passed over: never")
    assert next_step(Rung(1, True), 4, {HALF: "a", INT8: "b", INT4: "c"}) is None
    assert skipped_of(Rung(1, True), {HALF: "a", INT4: "c"}) == [f"{HALF}: a", f"{INT4}: c"]


@given(rows=st.integers(1, 64), refused=st.sets(st.sampled_from([HALF, INT8, INT4])), stop=st.integers(0, 12))
def test_a_resumed_run_finds_the_same_way_down(rows: int, refused: set[str], stop: int) -> None:
    start, why = Rung(rows), dict.fromkeys(refused, "no")
    rung, went = start, []
    for _ in range(stop):
        step = next_step(rung, rows, why)
        if step is None:
            break
        went.append(rung := step.rung)
    assert path(start, rung, why) == went
    assert len(all_steps(start, rows, why)) == math.ceil(math.log2(rows)) + 4 - len(refused)


def test_a_rung_that_is_not_below() -> None:
    with pytest.raises(ValueError, match="does not lie below"):
        path(Rung(4), Rung(3), {})


# ---- noticing


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryLimitReached("x"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value), "what the CPU's allocator says when the system refuses"


def test_the_limit_is_held_before_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [900, 1000, 1001]
    monkeypatch.setattr(relief, "resident_bytes", lambda: held.pop(0))
    layers = [torch.nn.Linear(2, 2) for _ in range(3)]
    ALONE.watch(layers, MemoryLimit(1000))
    layers[0](torch.ones(2))
    layers[1](torch.ones(2))
    with pytest.raises(MemoryLimitReached, match=r"the process holds 0\.00 GB of the 0\.00 it may use"):
        layers[2](torch.ones(2))


def test_resident_memory_is_what_the_kernel_says() -> None:
    before = relief.resident_bytes()
    block = torch.ones(50_000_000, dtype=torch.uint8)
    assert relief.resident_bytes() - before == pytest.approx(block.nbytes, rel=0.2)


# ---- what a rung does to the network


@pytest.fixture
def adapted(tiny_llama: Path) -> Callable[..., Any]:
    def make(**changed: Any) -> Any:
        settings = TuneSettings(output_dir="-", lora_rank=4, lora_target="q_proj,down_proj", **changed)
        model = load_model(tiny_llama)
        result = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
        use_packed_attention(model)
        return result.train()

    return make


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: m.dequantize() if hasattr(m, "dequantize") else m.weight.float() for n, m in base_linears(model)}


def test_the_base_in_fewer_bits(adapted: Callable[..., Any]) -> None:
    model = adapted()
    adapters = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    floats = weights_of(model)
    assert len(floats) == 21
    assert not any("lora" in name or "lm_head" in name for name in floats)
    memory = Memory(model, Rung(1, checkpointing=True), TuneSettings(output_dir="-"), ALONE)
    for kind, worst in ((HalfLinear, 0.005), (Int8Linear, 0.02), (Int4Linear, 0.3)):
        memory.step_down(1, "full")
        assert all(type(module) is kind for _, module in base_linears(model))
        for name, weight in weights_of(model).items():
            assert (weight - floats[name]).norm() / floats[name].norm() < worst
    assert all(torch.equal(p, adapters[n]) for n, p in model.named_parameters() if p.requires_grad)
    assert not any(p.requires_grad for _, m in base_linears(model) for p in m.parameters())
    with pytest.raises(TrainingError, match=r"out of memory \(full\), and nothing is left .* Lower cutoff_len"):
        memory.step_down(1, "full")


def test_what_cannot_be_packed(adapted: Callable[..., Any]) -> None:
    assert refusals(adapted()) == {}
    assert refusals(adapted(use_dora=True)) == {name: "use_dora reads the weights as floats" for name in (INT8, INT4)}
    model = adapted()
    relief.pack_base(model, 8)
    found = refusals(model)
    assert found == {HALF: "the base is stored in 8 bits already", INT8: "the base is stored in 8 bits already"}


# ---- whole runs


class OutOfMemory:
    """Raises in the middle of chosen updates, as often as told: after some layers of their last micro-batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: dict[int, int]) -> None:
        self.at, self.step, self.raised = dict(at), -1, []
        from pingjia.tune import loop

        real_layers, real_update = layers_of, loop.update

        def update(*args: Any, **kwargs: Any) -> Any:
            step, self.is_open = self.step + 1, True
            self.batches_left = len(args[3])
            try:
                result = real_update(*args, **kwargs)
            finally:
                self.is_open = False
            self.step = step
            return result

        def watched(model: Any) -> Any:
            layers = real_layers(model)
            layers[1].register_forward_hook(self.maybe)
            return layers

        self.is_open = False
        monkeypatch.setattr(loop, "update", update)
        monkeypatch.setattr(relief, "layers_of", watched)

    def maybe(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not self.is_open:
            return
        self.batches_left -= 1
        step = self.step + 1
        if self.batches_left <= 0 and self.at.get(step, 0):
            self.at[step] -= 1
            self.raised.append(step)
            raise torch.OutOfMemoryError(f"injected at step {step}")


LADDER_RUN: dict[str, Any] = {
    "lora_dropout": 0.0,
    "per_device_train_batch_size": 4,
    "max_steps": 39,
    "save_steps": 100,
    "learning_rate": 1e-3,
}


def losses(folder: Path) -> list[float]:
    return [log.loss for log in read_log(folder / "trainer_log.jsonl")]


def events(folder: Path) -> dict[int, str]:
    return {log.step: log.event for log in read_log(folder / "trainer_log.jsonl") if log.event}


@pytest.mark.parametrize("step", [0, 37])
@pytest.mark.parametrize(
    ("falls", "started", "said"),
    [
        (1, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, ["micro-batch 4 -> 2 rows"]),
        (
            3,
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True},
            ["micro-batch 4 -> 2 rows", "micro-batch 2 -> 1 rows, accumulation 2 -> 4", "gradient checkpointing"],
        ),
    ],
)
def test_the_loss_curve_is_that_of_a_run_that_started_there(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, falls: int, started: dict, said: list[str]
) -> None:
    tune(output_dir=str(tmp_path / "started"), **(LADDER_RUN | started))
    injected = OutOfMemory(monkeypatch, {step: falls})
    tune(output_dir=str(tmp_path / "fell"), **LADDER_RUN)
    assert injected.raised == [step] * falls
    fell, expected = losses(tmp_path / "fell"), losses(tmp_path / "started")
    assert len(fell) == 39
    assert fell == pytest.approx(expected, rel=1e-5)
    assert list(events(tmp_path / "fell")) == [step + 1]
    event = events(tmp_path / "fell")[step + 1]
    assert event.startswith(f"out of memory (injected at step {step}): ")
    assert all(text in event for text in said)
    left, right = (safetensors.torch.load_file(tmp_path / n / "adapter_model.safetensors") for n in ("fell", "started"))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=2e-5)


def test_dropout_is_drawn_from_the_same_state_again(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointing computes the same; so a failed update that was done again leaves no trace, dropout included."""
    run = LADDER_RUN | {"lora_dropout": 0.3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    tune(output_dir=str(tmp_path / "whole"), **run | {"max_steps": 8})
    OutOfMemory(monkeypatch, {5: 1})
    tune(output_dir=str(tmp_path / "fell"), **run | {"max_steps": 8})
    assert events(tmp_path / "fell") == {6: "out of memory (injected at step 5): gradient checkpointing"}
    assert losses(tmp_path / "fell") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize("step", [0, 37])
def test_the_loss_curve_over_every_rung(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Six falls in one update: halved twice, checkpointed, bfloat16, INT8, INT4. Before it the curve is that of a run
    which never fell; from there on it is near it, as near as weights of 4 bits are to floats."""
    tune(output_dir=str(tmp_path / "whole"), **LADDER_RUN)
    injected = OutOfMemory(monkeypatch, {step: 6})
    tune(output_dir=str(tmp_path / "fell"), **LADDER_RUN)
    assert injected.raised == [step] * 6
    event = events(tmp_path / "fell")[step + 1]
    names = ["micro-batch 4 -> 2", "micro-batch 2 -> 1", "gradient checkpointing", HALF, INT8, INT4]
    assert [name in event for name in names] == [True] * 6
    fell, whole = losses(tmp_path / "fell"), losses(tmp_path / "whole")
    assert fell[:step] == whole[:step]
    assert fell == pytest.approx(whole, rel=0.03)
    assert fell[step:] != whole[step:]


def test_down_to_the_last_rung_and_off_it(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OutOfMemory(monkeypatch, {3: 6})
    run = LADDER_RUN | {"max_steps": 6}
    result = tune(output_dir=str(tmp_path / "a"), **run)
    assert result.finished
    event = events(tmp_path / "a")[4]
    assert [event.count(f": {name}") for name in (HALF, INT8, INT4)] == [1, 1, 1]
    monkeypatch.undo()
    tune(output_dir=str(tmp_path / "whole"), **run)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "whole"), rel=0.02), "4 bits are near the floats"
    OutOfMemory(monkeypatch, {3: 7})
    with pytest.raises(TrainingError, match=r"out of memory \(injected at step 3\), and nothing is left"):
        tune(output_dir=str(tmp_path / "b"), **run)
    assert checkpoints(tmp_path / "b")[-1].step == 3, "what had been learnt is saved"


def test_pissa_goes_down_to_packed_weights_too(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the base is packed; what PiSSA took out of it learns on, and leaves as a plain adapter."""
    run = LADDER_RUN | {"max_steps": 6, "init_lora_weights": "pissa"}
    tune(output_dir=str(tmp_path / "whole"), **run)
    OutOfMemory(monkeypatch, {3: 6})
    assert tune(output_dir=str(tmp_path / "fell"), **run).finished
    assert INT4 in events(tmp_path / "fell")[4]
    assert losses(tmp_path / "fell") == pytest.approx(losses(tmp_path / "whole"), rel=0.02)


@pytest.mark.parametrize("falls", [2, 6])
def test_a_stopped_run_goes_on_on_its_rung(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, falls: int
) -> None:
    """On the last rung too: the base is packed by the same steps, so the bits are the same."""
    run = LADDER_RUN | {"max_steps": 8}
    with monkeypatch.context() as patch:
        OutOfMemory(patch, {2: falls})
        tune(output_dir=str(tmp_path / "whole"), **run)
    seen: list[int] = []
    hooks = Hooks(on_step=lambda log: seen.append(log.step), should_stop=lambda: seen[-1] >= 5)
    with monkeypatch.context() as patch:
        OutOfMemory(patch, {2: falls})
        assert not tune(output_dir=str(tmp_path / "out"), hooks=hooks, **run).finished
    assert tune(output_dir=str(tmp_path / "out"), **run).finished
    left, right = (safetensors.torch.load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "out"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")


def test_it_is_saved_before_it_goes_on(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies in the update after the fall goes on from it, and the fall is in the log."""
    OutOfMemory(monkeypatch, {5: 1})
    saved: list[int] = []

    def die(log: Any) -> None:
        saved.extend(c.step for c in checkpoints(tmp_path / "out"))
        if log.step == 6:
            raise KeyboardInterrupt

    run = LADDER_RUN | {"max_steps": 8}
    with pytest.raises(KeyboardInterrupt):
        tune(hooks=Hooks(on_step=die), **run)
    assert saved == [5]
    monkeypatch.undo()
    assert tune(**run).finished
    assert "micro-batch 4 -> 2" in events(tmp_path / "out")[6]


def test_memory_off(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pingjia.tune import loop

    def update(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(TrainingError, match=r"no memory.*memory=auto"):
        tune(memory="off")


# ---- the longest batch first


def test_the_longest_batch_is_tried_before_the_first_update(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an out-of-memory that only the longest row brings about, nothing has been updated when it shows."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "hi", "response": f"hello {i}"} for i in range(15)] + [{"prompt": "x", "response": "long " * 99}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokens: list[int] = []
    real = relief.layers_of

    def watched(model: Any) -> Any:
        layers = real(model)
        layers[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
        return layers

    monkeypatch.setattr(relief, "layers_of", watched)
    tune(output_dir=str(tmp_path / "tried"), dataset=file)
    assert tokens[0] == max(tokens)
    assert len(tokens) == 16 + 1
    monkeypatch.undo()
    tune(output_dir=str(tmp_path / "off"), dataset=file, memory="off")
    left, right = (safetensors.torch.load_file(tmp_path / n / "adapter_model.safetensors") for n in ("tried", "off"))
    assert all(torch.equal(left[name], right[name]) for name in left), "trying it has changed nothing, dropout included"


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory that is 10 bytes per token that is in the first layer's input, on top of 1000."""
    now = [0]
    real = relief.layers_of

    def watched(model: Any) -> Any:
        layers = real(model)
        layers[0].register_forward_pre_hook(lambda module, args: now.__setitem__(0, args[0].shape[1]))
        return layers

    monkeypatch.setattr(relief, "layers_of", watched)
    monkeypatch.setattr(relief, "resident_bytes", lambda: 1000 + 10 * now[0])
    return now


def test_a_limit_decides_the_rung_before_the_first_update(tune: Tune, tmp_path: Path, growing: list[int]) -> None:
    tune(memory_limit_gb=(1000 + 10 * 100) / 1e9, per_device_train_batch_size=4)
    found = events(tmp_path / "out")
    assert list(found) == [1]
    assert "micro-batch 4 -> 2 rows, accumulation 1 -> 2" in found[1]
    assert "the process holds" in found[1]
