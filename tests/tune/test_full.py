"""Full fine-tuning: every weight learns, and the model directory that is left is exactly what was trained."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from pingjia import Engine, Message, Sampling
from pingjia.chat import check_golden, load_tokenizer
from pingjia.data import encode_examples, read_examples
from pingjia.data.settings import DataSettings
from pingjia.errors import StorageError, TrainingError
from pingjia.models import base_fingerprint, load_model
from pingjia.models.settings import ModelSettings
from pingjia.tune import Hooks, TrainResult, directory, train
from pingjia.tune.checkpoint import checkpoints
from pingjia.tune.distributed import require_possible
from pingjia.tune.journal import read_log
from pingjia.tune.launch import Layout, free_port, launch
from pingjia.tune.plan import TrainPlan
from pingjia.tune.rehearse import rehearse
from pingjia.tune.run import read_about
from pingjia.tune.settings import TuneSettings

Train = Callable[..., TrainResult]
FULL: dict[str, Any] = {"finetuning_type": "full"}
PHASES = [{"target": "embedding"}, {"target": "attention"}, {"target": "ffn,norms"}]


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(file)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def stop_after(step: int) -> Hooks:
    seen: list[int] = []
    return Hooks(on_step=lambda log: seen.append(log.step), should_stop=lambda: seen[-1] >= step)


# ---- the arithmetic


def test_updates_equal_plain_torch_on_single_rows(
    tune: Train, tmp_path: Path, tiny_llama: Path, rows_file: Path
) -> None:
    """Three updates over all rows, against the published network, one row at a time, and torch's AdamW."""
    tune(**FULL, num_train_epochs=3, per_device_train_batch_size=7, lr_scheduler_type="constant", warmup_ratio=0.0)
    network = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).train()
    rows, _ = encode_examples(read_examples([rows_file], on_problem=print), load_tokenizer(tiny_llama), 256)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    learnt = sum(row.num_learnt for row in rows)
    for _ in range(3):
        optimizer.zero_grad()
        for row in rows:
            labels = [token if learns else -100 for token, learns in zip(row.ids, row.learn, strict=True)]
            loss = network(input_ids=torch.tensor([row.ids]), labels=torch.tensor([labels])).loss
            (loss * row.num_learnt / learnt).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    trained = dict(load_model(tmp_path / "out").named_parameters())
    start = dict(load_model(tiny_llama).named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), atol=2e-5, rtol=1e-4)
        assert not torch.equal(trained[name], start[name]), f"{name} has not moved"


def test_it_learns(tune: Train, tmp_path: Path, make_llama: Callable[..., Path]) -> None:
    rows = tmp_path / "two.jsonl"
    pairs = [("Is it dishwasher safe?", "No."), ("How much is the kettle?", "129 yuan.")]
    rows.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs), encoding="utf-8")
    base = make_llama(3, tie_word_embeddings=False)
    tune(model=base, dataset=rows, **FULL, max_steps=60, learning_rate=0.01, save_steps=100)
    logs = read_log(tmp_path / "out" / "trainer_log.jsonl")
    assert logs[-1].loss < 0.5 < logs[0].loss
    question = [Message("user", pairs[0][0])]
    assert Engine(str(tmp_path / "out")).generate([question], Sampling(max_tokens=8))[0].text == pairs[0][1]


def test_norms_and_biases_do_not_decay(tune: Train, tmp_path: Path, tiny_llama: Path) -> None:
    """A rate so low that decay is all that moves anything."""
    tune(**FULL, weight_decay=1e6, learning_rate=1e-8, max_steps=1, warmup_ratio=0.0, lr_scheduler_type="constant")
    start, end = tensors(tiny_llama / "model.safetensors"), tensors(tmp_path / "out" / "model.safetensors")
    for name, tensor in start.items():
        expected = tensor if tensor.ndim == 1 else tensor * (1 - 1e-2)
        torch.testing.assert_close(end[name], expected, atol=1e-6, rtol=1e-5)
    logs = read_log(tmp_path / "out" / "trainer_log.jsonl")
    assert list(logs[0].rates) == ["all"]


# ---- what is left


def test_the_directory_stands_alone(tune: Train, tmp_path: Path, tiny_llama: Path) -> None:
    """Moved elsewhere, the base gone: weights, config, tokenizer and template are there; other tools load it too."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    result = tune(model=base, **FULL)
    shutil.rmtree(base)
    alone = shutil.copytree(tmp_path / "out", tmp_path / "alone", ignore=shutil.ignore_patterns("checkpoint-*"))
    about = read_about(alone)
    assert about is not None
    assert about["finetuning_type"] == "full"
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= set(about["files"])
    assert all((alone / name).is_file() for name in about["files"])
    assert result.stored_bytes == sum((alone / name).stat().st_size for name in [*about["files"], "pingjia.json"])
    assert about["proof"]["max_logit_diff"] == 0.0
    assert about["proof"]["max_change_from_base"] > 0
    tokenizer = load_tokenizer(alone)
    check_golden(tokenizer, about["chat"]["golden"])
    other = AutoModelForCausalLM.from_pretrained(alone)
    ids = AutoTokenizer.from_pretrained(alone).apply_chat_template(
        [{"role": "user", "content": "hi"}], return_dict=False
    )
    assert ids == tokenizer.render([Message("user", "hi")], add_generation_prompt=False)
    mine = load_model(alone)
    given = torch.tensor([ids])
    torch.testing.assert_close(mine(input_ids=given).logits, other(input_ids=given).logits)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tied_head_learns_and_is_stored_once(
    tune: Train, tmp_path: Path, make_llama: Callable[..., Path], is_tied: bool
) -> None:
    plans: list[TrainPlan] = []
    tune(model=make_llama(2, tie_word_embeddings=is_tied), **FULL, hooks=Hooks(on_plan=plans.append))
    stored = tensors(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not is_tied
    count = sum(t.numel() for t in stored.values())
    assert plans[0].num_trainable == plans[0].num_parameters == count
    assert sum(row.num_parameters for row in plans[0].rates) == count
    checkpoint = tensors(checkpoints(tmp_path / "out")[-1].path / "trained.safetensors")
    assert checkpoint.keys() == stored.keys()
    assert all(torch.equal(checkpoint[name], stored[name]) for name in stored)


def test_layer_wise_rates_cover_every_weight(tune: Train) -> None:
    plans: list[TrainPlan] = []
    rates = {"1-2": 1e-4, "3": 1e-3}
    with pytest.raises(TrainingError, match=r"gives no rate to .*embed_tokens \(no layer\); add 'other'"):
        tune(**FULL, layer_learning_rates=rates)
    tune(**FULL, layer_learning_rates={**rates, "other": 1e-5}, hooks=Hooks(on_plan=plans.append))
    assert [(row.layers, row.rate) for row in plans[0].rates] == [
        ("layers 1-2", 1e-4),
        ("layers 3", 1e-3),
        ("other", 1e-5),
    ]
    assert sum(row.num_parameters for row in plans[0].rates) == plans[0].num_parameters


def test_the_memory_plan_counts_gradients_and_moments_of_every_weight(tune: Train) -> None:
    plans: list[TrainPlan] = []
    tune(**FULL, hooks=Hooks(on_plan=plans.append))
    memory, count = plans[0].memory, plans[0].num_parameters
    assert memory is not None
    assert (memory.adapters, memory.gradients, memory.optimizer) == (4 * count, 4 * count, 8 * count)
    assert memory.weights < 1000  # buffers


@pytest.mark.parametrize("network", ["chatglm", "chatglm2"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_chatglm_directories(
    tune: Train, tmp_path: Path, request: pytest.FixtureRequest, network: str, stored: torch.dtype
) -> None:
    """Of a half-precision checkpoint the tables are kept in half precision, until they are to learn."""
    base = shutil.copytree(request.getfixturevalue(network), tmp_path / "base")
    halved = {n: t.to(stored) for n, t in tensors(base / "model.safetensors").items()}
    safetensors.torch.save_file(halved, base / "model.safetensors", metadata={"format": "pt"})
    tune(model=base, **FULL)
    shutil.rmtree(base)
    engine = Engine(str(tmp_path / "out"))
    assert engine.generate([[Message("user", "怎么退货？")]], Sampling(max_tokens=4))[0].usage.completion_tokens
    trained = tensors(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in trained.values()} == {torch.float32}
    assert all(not torch.equal(trained[name], halved[name].float()) for name in trained if name in halved)


def test_from_a_gguf_file(tune: Train, tmp_path: Path) -> None:
    """The packaged model is one GGUF file; what is left has a tokenizer and a template of its own."""
    load_tokenizer("smollm2")
    rows = tmp_path / "one.jsonl"
    rows.write_text(json.dumps({"prompt": "hi", "response": "hello"}) + "\n", encoding="utf-8")
    changed = {"num_train_epochs": 2, "save_total_limit": 1, "learning_rate": 1e-4}
    tune(model=Path("smollm2"), dataset=rows, finetuning_type="freeze", freeze_trainable_layers=1, **changed)
    about = read_about(tmp_path / "out")
    assert about is not None
    check_golden(load_tokenizer(tmp_path / "out"), about["chat"]["golden"])
    assert about["proof"]["max_logit_diff"] < 1e-4 < about["proof"]["max_change_from_base"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_training_goes_on_from_the_directory(tune: Train, tmp_path: Path) -> None:
    tune(**FULL, output_dir=str(tmp_path / "first"))
    tune(model=tmp_path / "first", **FULL, learning_rate=2e-3, output_dir=str(tmp_path / "second"))
    about = read_about(tmp_path / "second")
    assert about is not None
    assert [stage["name"] for stage in about["lineage"]] == ["first"]
    assert about["base"]["fingerprint"] == base_fingerprint(load_model(tmp_path / "first"))
    tune(model=tmp_path / "second", output_dir=str(tmp_path / "adapter"))  # and an adapter on top of it
    assert Engine(str(tmp_path / "second"), adapter=str(tmp_path / "adapter")).models()[-1].id == "adapter"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_model_is_not_trained_into_its_own_directory(tune: Train, tmp_path: Path, kind: str) -> None:
    tune(**FULL)
    with pytest.raises(TrainingError, match="is the model that is trained; choose another output_dir"):
        tune(model=tmp_path / "out", finetuning_type=kind, resume_from_checkpoint=False)
    assert load_model(tmp_path / "out")


def test_golden_chats_have_a_tool_where_rows_have_one(tune: Train, tmp_path: Path) -> None:
    rows = tmp_path / "tools.jsonl"
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    for has_tools in (False, True):
        row = {"messages": messages, **({"tools": [tool]} if has_tools else {})}
        rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
        tune(dataset=rows, output_dir=str(tmp_path / str(has_tools)))
        about = read_about(tmp_path / str(has_tools))
        assert about is not None
        assert any("tools" in chat for chat in about["chat"]["golden"]) is has_tools


# ---- phases, over-fitting


def test_phases_open_their_own_weights(tune: Train, tmp_path: Path, tiny_llama: Path) -> None:
    tune(**FULL, phases=PHASES, num_train_epochs=1, save_steps=1, save_total_limit=99)
    states = [tensors(c.path / "trained.safetensors") for c in checkpoints(tmp_path / "out")]
    start = {n: p.detach() for n, p in load_model(tiny_llama).named_parameters()}
    for before, after, parts in (
        (start, states[3], ("embed_tokens",)),
        (states[3], states[7], ("self_attn",)),
        (states[7], states[11], ("mlp", "norm")),
    ):
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert moved == {name for name in after if any(part in name for part in parts)}


def test_what_no_phase_names_keeps_every_byte(tune: Train, tmp_path: Path, tiny_llama: Path) -> None:
    tune(**FULL, phases=PHASES[1:2])
    start, end = tensors(tiny_llama / "model.safetensors"), tensors(tmp_path / "out" / "model.safetensors")
    assert {n for n in end if not torch.equal(start[n], end[n])} == {n for n in end if "self_attn" in n}
    assert {n for n in tensors(checkpoints(tmp_path / "out")[-1].path / "trained.safetensors")} == {
        n for n in end if "self_attn" in n
    }


def test_early_stopping_puts_the_best_weights_back(tune: Train, tmp_path: Path, over_fitting: dict[str, Any]) -> None:
    changed = {key: value for key, value in over_fitting.items() if not key.startswith("lora_")} | {
        "learning_rate": 0.01
    }
    result = tune(**FULL, **changed, early_stopping_patience=2, eval_steps=1, save_steps=100)
    logs = read_log(tmp_path / "out" / "trainer_log.jsonl")
    losses = [log.eval_loss for log in logs]
    assert (logs[-1].event or "").startswith("stopped early")
    assert result.eval_loss == min(losses) < losses[-1]
    best = tensors(tmp_path / "out" / f"best-{losses.index(min(losses)) + 1:06d}" / "trained.safetensors")
    kept = tensors(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(best[name], kept[name]) for name in kept)


# ---- interrupted


@pytest.fixture(scope="session")
def job(tiny_llama: Path, rows_file: Path, contradiction: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """For killed_run.py: two phases, one of which stops early."""
    tune = {key: value for key, value in settings.items() if not key.startswith("lora_")}
    phases = [{"target": "all"}, {"target": "ffn", "max_steps": 4}]
    watch = {"eval_steps": 2, "early_stopping_patience": 2, "learning_rate": 0.01, "num_train_epochs": 4}
    return {
        "model": {"model_name_or_path": str(tiny_llama), "device": "cpu"},
        "data": {"dataset": str(rows_file), "eval_dataset": str(contradiction)},
        "tune": {**tune, **FULL, **watch, "phases": phases, "save_steps": 3},
    }


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, job: dict[str, Any]) -> Path:
    """The uninterrupted run of the job."""
    out = tmp_path_factory.mktemp("whole") / "out"
    settings = TuneSettings.model_validate(job["tune"] | {"output_dir": str(out)})
    train(ModelSettings(**job["model"]), DataSettings(**job["data"]), settings)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    killed: Callable[..., int], job: dict[str, Any], whole: Path, tmp_path: Path, seed: int
) -> None:
    assert killed(job, tmp_path / "killed", seed, max_kills=3) >= 1, "nothing was killed: the test has shown nothing"
    assert digest(tmp_path / "killed") == digest(whole)
    mine, other = (read_log(folder / "trainer_log.jsonl") for folder in (tmp_path / "killed", whole))
    assert [(log.step, log.loss, log.eval_loss, log.event) for log in mine] == [
        (log.step, log.loss, log.eval_loss, log.event) for log in other
    ]
    assert not list((tmp_path / "killed").glob(".*.partial"))


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_stopped_run_goes_on_bit_for_bit(tune: Train, tmp_path: Path, step: int) -> None:
    tune(**FULL, output_dir=str(tmp_path / "whole"))
    assert not tune(**FULL, hooks=stop_after(step)).finished
    assert not (tmp_path / "out" / "model.safetensors").exists()
    again = tune(**FULL)
    assert again.finished
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert tune(**FULL).was_finished


def test_starting_over_sets_the_model_aside(tune: Train, tmp_path: Path) -> None:
    tune(**FULL)
    before = digest(tmp_path / "out")
    with pytest.raises(TrainingError, match="holds a finished model of a run with other"):
        tune(**FULL, learning_rate=2e-3)
    tune(learning_rate=2e-3, resume_from_checkpoint=False)  # an adapter this time
    assert digest(tmp_path / "out" / "previous") == before
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_checkpoint_of_an_adapter_is_not_one_of_a_model(tune: Train) -> None:
    tune(hooks=stop_after(3))
    with pytest.raises(TrainingError, match="belongs to a run with other"):
        tune(**FULL)


def test_a_disk_without_room_is_refused_before_the_first_update(
    tune: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000_000))
    with pytest.raises(StorageError, match=r"take up to 0\.1 GB, and 0\.1 GB are there") as caught:
        tune(**FULL, hooks=Hooks(on_step=lambda log: steps.append(log.step)))
    assert "lower save_total_limit" in str(caught.value)
    assert steps == []
    assert tune(**FULL, save_total_limit=1).finished  # 2 checkpoints of 39 MB and a model of 13


def test_a_disk_that_fills_leaves_the_last_good_checkpoint(
    tune: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, free = shutil.disk_usage(tmp_path), [10**12]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))

    def fill(log: Any) -> None:
        free[0] = 10**7 if log.step == 3 else free[0]

    with pytest.raises(
        StorageError, match=r"checkpoint-000004 could not be saved: the disk is full; the last good one"
    ):
        tune(**FULL, hooks=Hooks(on_step=fill))
    assert [c.step for c in checkpoints(tmp_path / "out")] == [2]
    free[0] = 10**12
    assert tune(**FULL).finished


# ---- what would only look like training


@pytest.mark.parametrize("max_steps", [1, 3, 8])
def test_learning_rate_zero(tune: Train, tmp_path: Path, max_steps: int) -> None:
    with pytest.raises(TrainingError, match=r"rate of every update was 0|nothing was learnt"):
        tune(**FULL, learning_rate=0.0, max_steps=max_steps)
    assert not (tmp_path / "out" / "pingjia.json").exists()


def test_a_model_that_is_saved_wrong_is_not_kept(tune: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: what lies on the disk is the base, or lacks the last update of one tensor."""
    write = directory.save_network

    def spoil(folder: Path, model: Any) -> None:
        write(folder, model)
        stored = tensors(folder / "model.safetensors")
        stored["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
        safetensors.torch.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(directory, "save_network", spoil)
    with pytest.raises(TrainingError, match=r"1 tensors differ, the first: model\.layers\.1\.mlp\.up_proj\.weight"):
        tune(**FULL)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not list((tmp_path / "out").glob(".*.partial"))
    monkeypatch.undo()
    assert tune(**FULL).finished


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_base_is_refused_with_the_way_out(tune: Train, bits: int) -> None:
    with pytest.raises(TrainingError, match=rf"packed to {bits} bits.*nothing would move.*finetuning_type=lora"):
        tune(**FULL, quantization_bit=bits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_refused(tune: Train, dtype: str) -> None:
    with pytest.raises(TrainingError, match=rf"in {dtype} most updates would be rounded away.*float32"):
        tune(**FULL, dtype=dtype)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"lora_rank": 4}, "lora_rank: only with finetuning_type=lora.*leave it out"),
        ({"lora_alpha": 8, "lora_l2": 0.01}, "lora_alpha, lora_l2: only .*leave them out"),
        ({"use_dora": True}, "use_dora"),
        ({"shrink_lora_rank_to": 4}, "shrink_lora_rank_to"),
        ({"continue_from": "runs/a"}, "continue_from.*give its directory as model_name_or_path"),
        ({"continual": {"probes": {"a": "b"}}}, "continual"),
        ({"freeze_trainable_layers": 2}, "freeze_trainable_layers: only with finetuning_type=freeze"),
    ],
)
def test_keys_of_another_type_are_refused(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        TuneSettings(output_dir="-", **FULL, **keys)


def test_a_target_that_matches_nothing(tune: Train) -> None:
    with pytest.raises(TrainingError, match=r"phases: target 'atention' matches no weights; did you mean attention"):
        tune(**FULL, phases=[{"target": "atention"}])


def test_fsdp2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "0")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    for kind in ("full", "freeze"):
        settings = TuneSettings(output_dir="-", finetuning_type=kind, distributed={"strategy": "fsdp2"})
        with pytest.raises(TrainingError, match=f"fsdp2.*finetuning_type={kind}"):
            require_possible(settings)


def test_memory_runs_out_and_the_weights_are_never_rounded(tune: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batch and checkpointing help; packing what learns does not, and is passed over with its reason."""
    from pingjia.tune import relief

    monkeypatch.setattr(relief, "resident_bytes", lambda: 10**15)
    with pytest.raises(TrainingError, match=r"nothing is left to use less.*INT4 base: the base's own weights learn"):
        tune(**FULL, memory_limit_gb=1.0)


def test_the_rehearsal_takes_the_same_road(
    tiny_llama: Path, rows_file: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    changed = {k: v for k, v in settings.items() if not k.startswith("lora_")} | {"output_dir": str(tmp_path / "out")}
    found = rehearse(
        ModelSettings(model_name_or_path=str(tiny_llama), device="cpu"),
        DataSettings(dataset=str(rows_file)),
        TuneSettings(**changed, **FULL),
    )
    assert found.num_steps == 8
    assert found.memory is not None
    assert found.memory.gradients == 4 * found.num_trainable
    assert found.event is None
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is needed: pip install 'pingjia[distributed]'"
)
def test_zero3_shares_out_every_weight_and_comes_to_the_same(
    tune: Train, tmp_path: Path, tiny_llama: Path, rows_file: Path, settings: dict[str, Any]
) -> None:
    """Two processes, a checkpoint on the way; the model is gathered, saved whole, and held against its files."""
    tune(**FULL, output_dir=str(tmp_path / "one"))
    changed = {k: v for k, v in settings.items() if not k.startswith("lora_")} | FULL
    distributed = {"strategy": "zero3", "processes": 2, "timeout_s": 240}
    job = {
        "model": {"model_name_or_path": str(tiny_llama), "device": "cpu"},
        "data": {"dataset": [str(rows_file)]},
        "tune": {**changed, "output_dir": str(tmp_path / "two"), "distributed": distributed},
        "holdings": str(tmp_path / "holdings"),
    }
    command = [sys.executable, str(Path(__file__).with_name("rank.py")), json.dumps(job)]
    launch(command, Layout(2, 0, 2, "127.0.0.1", free_port()))
    one, two = (tensors(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)
    holdings = json.loads((tmp_path / "holdings").read_text())
    assert all(held < 0.51 * whole for _, held, whole in holdings)
