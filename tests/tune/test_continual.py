"""A run that continues from an earlier adapter: nothing of the earlier one moves, and the result is one plain LoRA."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel

from pingjia.errors import DataError, TrainingError
from pingjia.models import base_fingerprint, load_model, use_packed_attention
from pingjia.tune import TrainResult
from pingjia.tune.elastic import Loras, loras
from pingjia.tune.journal import read_log

Train = Callable[..., TrainResult]
SECOND = [
    {"prompt": "北京到上海的高铁要多久？", "response": "最快四小时十八分。"},
    {"prompt": "行李能带多重？", "response": "成人二十公斤。"},
    {"prompt": "Can I bring a bike?", "response": "Folded, in a bag."},
    {"prompt": "退票收费吗？", "response": "开车前八天以上不收。"},
    {"prompt": "儿童票怎么买？", "response": "六岁以下免费，六到十四岁半价。"},
]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def second_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("second") / "second.jsonl", SECOND)


@pytest.fixture
def first(tune: Train, tmp_path: Path) -> Path:
    """A finished adapter of the room's rows."""
    tune(output_dir=str(tmp_path / "first"))
    return tmp_path / "first"


@pytest.fixture
def go_on(tune: Train, first: Path, second_file: Path, tmp_path: Path) -> Train:
    """go_on(continual={...}, **TuneSettings): continue from `first` with other rows, into tmp_path / "second"."""

    def run(**changed: Any) -> TrainResult:
        return tune(
            **{"dataset": second_file, "continue_from": str(first), "output_dir": str(tmp_path / "second")} | changed
        )

    return run


def read(folder: Path) -> Loras:
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return loras(tensors, LoraConfig.from_pretrained(str(folder)))


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pingjia.json").read_text(encoding="utf-8"))


def sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(5, 45).unsqueeze(0)).logits


# ---- grow


def test_old_ranks_keep_every_byte_beside_new_ones(go_on: Train, first: Path) -> None:
    before = sha(first / "adapter_model.safetensors")
    result = go_on(lora_rank=3)
    old, both = read(first), read(result.output_dir)
    assert both.keys() == old.keys()
    for module, lora in both.items():
        assert (lora.rank, lora.scale) == (7, old[module].scale)
        assert torch.equal(lora.a_RI[:4], old[module].a_RI)
        assert torch.equal(lora.b_OR[:, :4], old[module].b_OR)
        assert lora.b_OR[:, 4:].any()
    assert sha(first / "adapter_model.safetensors") == before
    assert about(result.output_dir)["continual"]["ranks"] == {"old": 4, "new": 3, "kept": 7, "lost_share": 0.0}


def test_the_grown_adapter_is_a_plain_lora_for_peft(go_on: Train, tmp_path: Path, tiny_llama: Path) -> None:
    """Of other scales, ranks and modules than the earlier one: PEFT, reading the files, gets the sum of both parts."""
    result = go_on(lora_rank=3, lora_alpha=15, lora_target="q_proj,down_proj", lora_layers="2-3")
    model = PeftModel.from_pretrained(load_model(tiny_llama), result.output_dir)
    config = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["init_lora_weights"]) == (4, False, True)
    for module, lora in read(result.output_dir).items():
        got = model.base_model.model.get_submodule(module).get_delta_weight("default")
        assert torch.allclose(got, lora.scale * lora.b_OR @ lora.a_RI, atol=1e-7), module
    state = safetensors.torch.load_file(tmp_path / "second" / "checkpoint-000006" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    new = 5 * state[name.format("B")] @ state[name.format("A")]  # 15 / 3
    old = read(tmp_path / "first")["model.layers.1.self_attn.q_proj"]
    got = model.base_model.model.model.layers[1].self_attn.q_proj.get_delta_weight("default")
    assert torch.allclose(got, new + old.scale * old.b_OR @ old.a_RI, atol=1e-6)


def test_a_grown_network_begins_as_the_earlier_one(go_on: Train, first: Path, tiny_llama: Path, monkeypatch) -> None:
    """Before the first update, to the last bit."""
    from pingjia.tune import grow

    seen: list[torch.Tensor] = []
    real = grow.grow_beside

    def look(model: PeftModel, *rest: Any) -> None:
        real(model, *rest)
        network = model.get_base_model()  # set already for packed rows, of which this is none
        network.set_attn_implementation("sdpa")
        seen.append(logits(model))
        use_packed_attention(network)

    monkeypatch.setattr(grow, "grow_beside", look)
    go_on()
    assert torch.equal(seen[0], logits(PeftModel.from_pretrained(load_model(tiny_llama), first)))


def test_orthogonality_is_logged_apart_and_holds_the_overlap_down(go_on: Train, first: Path, tmp_path: Path) -> None:
    def overlap(folder: Path) -> float:
        parts = [(lora.a_RI[:4] @ lora.a_RI[4:].T).square().sum().item() for lora in read(folder).values()]
        return sum(parts)

    go_on(learning_rate=0.02, continual={"orthogonality": 0.0}, output_dir=str(tmp_path / "free"))
    go_on(learning_rate=0.02, continual={"orthogonality": 50.0})
    assert overlap(tmp_path / "second") < 0.6 * overlap(tmp_path / "free")
    with_term = read_log(tmp_path / "second" / "trainer_log.jsonl")
    without = read_log(tmp_path / "free" / "trainer_log.jsonl")
    assert with_term[0].orthogonality == pytest.approx(0, abs=1e-8)  # at right angles from the start
    assert all(log.orthogonality is not None and log.orthogonality > 0 for log in with_term[2:])
    assert {log.orthogonality for log in without} == {None}
    assert with_term[0].loss == pytest.approx(without[0].loss, rel=1e-6)


def test_a_third_task_stands_on_the_second(go_on: Train, tune: Train, rows_file: Path, tmp_path: Path) -> None:
    go_on(lora_rank=2)
    tune(output_dir=str(tmp_path / "third"), continue_from=str(tmp_path / "second"), lora_rank=2)
    third, second = read(tmp_path / "third"), read(tmp_path / "second")
    assert {lora.rank for lora in third.values()} == {8}
    assert all(torch.equal(third[m].a_RI[:6], second[m].a_RI) for m in third)
    lineage = about(tmp_path / "third")["lineage"]
    assert [(stage["name"], stage["method"]) for stage in lineage] == [("first", "new"), ("second", "grow")]
    assert lineage[0]["run_fingerprint"] == about(tmp_path / "first")["run_fingerprint"]
    assert lineage[1]["data_fingerprint"] == about(tmp_path / "second")["data"]["fingerprint"]
    assert lineage[1]["metrics"]["num_steps"] == 6


def test_a_rank_budget_is_kept_and_its_price_named(go_on: Train, first: Path, tmp_path: Path) -> None:
    go_on(output_dir=str(tmp_path / "whole"))
    go_on(continual={"max_rank": 5})
    whole, cut = read(tmp_path / "whole"), read(tmp_path / "second")
    assert {lora.rank for lora in cut.values()} == {5}
    lost = total = 0.0
    for module, lora in whole.items():
        full = lora.scale * lora.b_OR.double() @ lora.a_RI.double()
        values = torch.linalg.svdvals(full)
        got = cut[module].scale * cut[module].b_OR.double() @ cut[module].a_RI.double()
        assert float((full - got).square().sum()) == pytest.approx(
            float(values[5:].square().sum()), rel=1e-3, abs=1e-12
        )
        lost, total = lost + float(values[5:].square().sum()), total + float(values.square().sum())
    ranks = about(tmp_path / "second")["continual"]["ranks"]
    assert (ranks["old"], ranks["new"], ranks["kept"]) == (4, 4, 5)
    assert ranks["lost_share"] == pytest.approx(lost / total, rel=1e-4)
    assert 0 < ranks["lost_share"] < 0.5


def test_old_ranks_that_change_stop_the_run(go_on: Train, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pingjia.tune import grow

    digests = iter(["a", "b"])
    monkeypatch.setattr(grow, "old_digest", lambda model: next(digests))
    with pytest.raises(TrainingError, match="frozen ranks of the earlier adapter have changed"):
        go_on()


PHASES = [{"target": "attention"}, {"target": "ffn", "max_steps": 2}]


@pytest.mark.parametrize(
    "changed",
    [
        {"lora_target": "embedding,q_proj"},
        {"lora_target": [], "phases": PHASES},
        {"quantization_bit": 8},
        {"use_rslora": True, "lora_l2": 1e-3},
    ],
    ids=["embedding", "phases", "packed", "rslora"],
)
def test_every_kind_of_run_grows(go_on: Train, first: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    result = go_on(**changed)
    old, both = read(first), read(result.output_dir)
    for module, lora in old.items():
        assert torch.equal(both[module].a_RI[: lora.rank], lora.a_RI)
        assert torch.equal(both[module].b_OR[:, : lora.rank], lora.b_OR)
    assert max(lora.rank for lora in both.values()) == 8
    if "embedding" in changed.get("lora_target", []):
        assert both["model.embed_tokens"].rank == 4


def test_only_new_ranks_shrink(go_on: Train, first: Path, over_fitting: dict[str, Any]) -> None:
    result = go_on(**over_fitting | {"shrink_lora_rank_to": 2, "eval_steps": 1})
    old, both = read(first), read(result.output_dir)
    assert {lora.rank for lora in both.values()} == {6}
    assert all(torch.equal(both[m].a_RI[:4], old[m].a_RI) for m in old)


def test_a_grown_adapter_is_exported(go_on: Train, tmp_path: Path, tiny_llama: Path) -> None:
    from pingjia.chat import load_tokenizer
    from pingjia.export.merge import merge_adapter

    result = go_on(lora_target="q_proj", lora_rank=2)
    report = merge_adapter(
        result.output_dir, tmp_path / "merged", base=tiny_llama, save_tokenizer=load_tokenizer(tiny_llama).save
    )
    assert report.num_merged_modules == 21
    adapted = PeftModel.from_pretrained(load_model(tiny_llama), result.output_dir)
    assert torch.allclose(logits(load_model(tmp_path / "merged")), logits(adapted), atol=1e-4)


# ---- ewc


def test_ewc_trains_the_same_matrices_and_holds_them(go_on: Train, first: Path, tmp_path: Path) -> None:
    def drift(folder: Path) -> float:
        now, start = read(folder), read(first)
        return sum(float((now[m].b_OR - start[m].b_OR).square().sum()) for m in now)

    free = {"lora_dropout": 0.0, "learning_rate": 0.01}
    go_on(**free, continual={"method": "ewc", "ewc": 0.0}, output_dir=str(tmp_path / "free"))
    go_on(**free, continual={"method": "ewc", "ewc": 1e5})
    assert {lora.rank for lora in read(tmp_path / "second").values()} == {4}
    assert not (tmp_path / "second" / "springs").exists()
    assert drift(tmp_path / "second") < 0.5 * drift(tmp_path / "free")
    logs = read_log(tmp_path / "second" / "trainer_log.jsonl")
    assert logs[0].ewc == 0.0  # nothing has moved yet
    assert all(log.ewc is not None and log.ewc > 0 for log in logs[1:])
    assert about(tmp_path / "second")["continual"]["method"] == "ewc"


def test_a_kept_fisher_is_used_and_added_to(tune: Train, second_file: Path, tmp_path: Path) -> None:
    tune(output_dir=str(tmp_path / "a"), continual={"keep_fisher": True})
    tune(
        dataset=second_file,
        output_dir=str(tmp_path / "b"),
        continue_from=str(tmp_path / "a"),
        continual={"method": "ewc", "keep_fisher": True},
    )
    a, b = (safetensors.torch.load_file(tmp_path / n / "fisher.safetensors") for n in "ab")
    assert a.keys() == safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert all((b[name] >= a[name]).all() for name in a)
    assert any((b[name] > a[name]).any() for name in a)


# ---- what is refused


def test_another_base_or_template_is_refused(go_on: Train, first: Path, make_llama: Callable[..., Path]) -> None:
    with pytest.raises(TrainingError, match="trained with another base model"):
        go_on(model=make_llama(1))
    changed = about(first)
    changed["chat"]["template_digest"] = "0" * 64
    (first / "pingjia.json").write_text(json.dumps(changed))
    with pytest.raises(TrainingError, match="trained with another chat template"):
        go_on()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"continual": {"max_rank": 3}}, "max_rank 3 is below lora_rank 4"),
        ({"use_dora": True}, "leave out use_dora"),
        ({"init_lora_weights": "pissa"}, "PiSSA changes it"),
        ({"continual": {"method": "ewc"}, "shrink_lora_rank_to": 2}, "leave out shrink_lora_rank_to"),
        ({"continue_from": None, "continual": {"replay_ratio": 0.5}}, "only with continue_from"),
    ],
)
def test_settings_that_do_not_fit_are_refused(go_on: Train, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        go_on(**changed)


def test_ewc_refuses_another_shape(go_on: Train) -> None:
    with pytest.raises(TrainingError, match=r"lora_rank is 2, but .*ewc trains the matrices of .*, which have 4"):
        go_on(continual={"method": "ewc"}, lora_rank=2)
    with pytest.raises(TrainingError, match=r"the 21 modules that .* adapts, and the recipe names 6"):
        go_on(continual={"method": "ewc"}, lora_target="q_proj,v_proj")


def test_what_is_no_finished_adapter_is_refused(go_on: Train, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no finished adapter of pingjia there"):
        go_on(continue_from=str(tmp_path))


def test_earlier_rows_that_have_moved_are_named(go_on: Train, first: Path, tmp_path: Path) -> None:
    changed = about(first)
    changed["data"]["files"] = [str(tmp_path / "gone.jsonl")]
    (first / "pingjia.json").write_text(json.dumps(changed))
    go_on()  # not needed
    with pytest.raises(DataError, match=r"continual\.replay if they have moved.*gone\.jsonl"):
        go_on(continual={"replay_ratio": 0.5}, output_dir=str(tmp_path / "third"))


# ---- plain runs stay as they were


def test_a_run_without_a_past_writes_no_word_of_it(first: Path) -> None:
    assert not {"continual", "lineage", "probes", "accuracy", "retention"} & about(first).keys()
    assert not (first / "candidate").exists()


def test_the_ancestor_is_part_of_the_run(go_on: Train, first: Path, tmp_path: Path, tiny_llama: Path) -> None:
    go_on()
    assert go_on().was_finished
    shutil.copytree(first, tmp_path / "copy")
    assert go_on(continue_from=str(tmp_path / "copy")).was_finished  # where it is does not matter
    tensors = safetensors.torch.load_file(first / "adapter_model.safetensors")
    name = next(iter(tensors))
    safetensors.torch.save_file({**tensors, name: tensors[name] + 1e-3}, first / "adapter_model.safetensors")
    with pytest.raises(TrainingError, match="holds a finished adapter of a run with other"):
        go_on()
    assert base_fingerprint(load_model(tiny_llama)) == about(tmp_path / "copy")["base"]["fingerprint"]
