"""Preparing: every row goes somewhere, with a reason; whatever happens in between, the result is the same."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data import Job, Prepared, Tools, check_files, prepare
from pingjia.data.settings import DataSettings, PrepareSettings
from pingjia.errors import DataError, StorageError
from pingjia.similarity import Vectors

Write = Callable[..., Path]


class Outcome:
    """The report, and what the tests ask of it most."""

    def __init__(self, prepared: Prepared) -> None:
        self.was_finished = prepared.was_finished
        self.report = prepared.report
        self.reasons = {name: rule.count for name, rule in prepared.report.rejects.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.report, name)


Run = Callable[..., Outcome]

GOOD = {"prompt": "你好", "response": "您好，请问有什么可以帮您？", "domain": "a", "id": 7}
LONG = {"prompt": "长" * 300, "response": "好的", "domain": "a"}


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def run(tmp_path: Path, smollm2: Tokenizer) -> Run:
    """run(files..., out=, data={...}, **PrepareSettings): prepare into tmp_path / "out"."""

    def run(
        *files: Path,
        out: Path | None = None,
        data: dict[str, Any] | None = None,
        tools: Tools | None = None,
        **settings: Any,
    ) -> Outcome:
        chosen = DataSettings.model_validate({"dataset": [str(f) for f in files], "cutoff_len": 100, **(data or {})})
        chosen_settings = PrepareSettings.model_validate(settings)
        return Outcome(prepare(Job(chosen, chosen_settings, "smollm2", out or tmp_path / "out", tools or Tools())))

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_every_row_goes_somewhere(write: Write, run: Run, out: Path) -> None:
    half = '{"prompt": "\\ud800", "response": "x"}'
    good = json.dumps(GOOD, ensure_ascii=False)
    text = "\n".join([good, "{broken", json.dumps(LONG), '{"prompt": "q"}', half, "[1]", good])
    path = write(text)
    before = path.read_bytes()
    result = run(path)
    assert (result.num_rows, result.num_kept, result.num_rejected) == (7, 1, 6)
    assert _rows(out / "train.jsonl") == [GOOD]
    rejected = _rows(out / "rejected.jsonl")
    assert [r["where"] for r in rejected] == [f"{path}:{n}" for n in range(2, 8)]
    assert [r["reasons"][0].split(":")[0] for r in rejected] == ["json", "length", "response", "prompt", "json", "row"]
    assert rejected[0]["row"] == "{broken"
    assert rejected[1]["row"] == LONG
    assert rejected[3]["row"] == {"prompt": "\ud800", "response": "x"}
    assert rejected[5]["reasons"] == [f"row: the same conversation as {path}:1"]
    assert path.read_bytes() == before
    names = ["changed.jsonl", "rejected.jsonl", "report.html", "report.json", "train.jsonl"]
    assert sorted(p.name for p in out.iterdir()) == names


def test_what_is_kept_is_clean(write: Write, run: Run, out: Path, smollm2: Tokenizer) -> None:
    run(write([GOOD, LONG, {"prompt": ""}, {"instruction": "请你打个招呼", "output": "大家好呀！"}]))
    report = check_files([out / "train.jsonl"], smollm2, 100)
    assert report.ok
    assert report.num_examples == 2


def test_reasons_are_counted_by_rule(write: Write, run: Run) -> None:
    result = run(write([LONG, {**LONG, "prompt": "长" * 400}, {"prompt": "q"}, GOOD, GOOD]))
    assert result.reasons == {"length": 2, "row": 1, "duplicate": 1}


def test_rows_of_other_domains_are_not_rejected(write: Write, run: Run) -> None:
    rows = [GOOD, {**GOOD, "domain": "b"}, {**GOOD, "domain": None}]
    result = run(write(rows), data={"domains": ["a"]})
    assert (result.num_kept, result.num_rejected, result.num_other_domains) == (1, 0, 2)


def test_gbk_rows_are_written_as_utf8(write: Write, run: Run, out: Path) -> None:
    row = {"prompt": "你好吗，朋友", "response": "我很好，谢谢"}
    run(write(json.dumps(row, ensure_ascii=False).encode("gbk")))
    assert _rows(out / "train.jsonl") == [row]


# ---- what the settings do


def test_masked_rows_are_changed_and_the_original_is_kept(write: Write, run: Run, out: Path) -> None:
    row = {"prompt": "我的手机是13812345678，帮我查", "response": "好的，13812345678已登记。", "facts": ["13812345678"]}
    result = run(write([row]), personal={"action": "mask"})
    (kept,) = _rows(out / "train.jsonl")
    assert kept["prompt"] == "我的手机是【手机号】，帮我查"
    assert kept["facts"] == ["【手机号】"]
    (changed,) = _rows(out / "changed.jsonl")
    assert changed["row"] == row
    assert result.personal == {"phone": 2}


def test_personal_data_is_reported_or_the_row_dropped(write: Write, run: Run, tmp_path: Path) -> None:
    row = {"prompt": "我的邮箱是zhangsan@example.com，请查收", "response": "收到，马上处理。"}
    reported = run(write([row]))
    assert (reported.num_kept, reported.personal) == (1, {"email": 1})
    dropped = run(write([row]), out=tmp_path / "dropped", personal={"action": "drop"})
    assert (dropped.num_kept, dropped.reasons) == (0, {"personal": 1})


def test_long_rows_are_shortened_or_split(write: Write, run: Run, out: Path, tmp_path: Path) -> None:
    history = [[f"第{i}个问题，请你详细说说看", f"这是第{i}个答案，已经说得很清楚了。"] for i in range(8)]
    row = {"prompt": "最后一个问题呢？", "response": "最后一个答案在此。", "history": history}
    assert run(write([row]), length_policy="split-turns").num_changed > 1
    answers = [m for kept in _rows(out / "train.jsonl") for m in [*sum(kept.get("history", []), []), kept["response"]]]  # noqa: RUF017
    assert all(f"这是第{i}个答案，已经说得很清楚了。" in answers for i in range(8))
    short = tmp_path / "short"
    run(write([row]), out=short, length_policy="truncate-prompt", data={"cutoff_len": 180})
    (kept,) = _rows(short / "train.jsonl")
    assert kept["response"] == row["response"]
    assert 0 < len(kept["history"]) < 8
    assert "oldest turns left out" in _rows(short / "changed.jsonl")[0]["changes"][0]


def test_held_out_rows_do_not_leak(write: Write, run: Run, out: Path) -> None:
    held_out = write([{"prompt": "冰箱多少钱？", "response": "两千元整。"}], "held_out.jsonl")
    rows = [
        {"prompt": "冰箱多少钱？", "response": "三千元整。"},
        {"prompt": "洗衣机多少钱？", "response": "一千元整。"},
    ]
    result = run(write(rows), data={"eval_dataset": [str(held_out)]})
    assert result.reasons == {"leak": 1}
    (rejected,) = _rows(out / "rejected.jsonl")
    assert rejected["reasons"] == [f"row: the held-out row {held_out}:1 asks the same question"]


ENGLISH = {"prompt": "How much is the kettle right now?", "response": "The kettle is on sale at the moment."}


def chinese(count: int) -> list[dict[str, str]]:
    things = ["冰箱", "洗衣机", "空调", "水壶", "风扇", "电视", "烤箱", "电饭煲", "吸尘器", "热水器"]
    return [
        {"prompt": f"{things[i % 10]}怎么保养？第{i}问", "response": f"请看第{i}页的说明书。"} for i in range(count)
    ]


def test_too_little_chinese_is_refused_with_what_would_be_dropped(write: Write, run: Run, out: Path) -> None:
    path = write([ENGLISH, *chinese(4)])
    with pytest.raises(
        DataError, match=r"below min_zh_share 70%\. Leaving out the 1 least Chinese of 5 rows would make"
    ):
        run(path, languages={"min_zh_share": 0.7})
    assert not (out / "train.jsonl").exists()


def test_too_little_chinese_is_mended_on_request(write: Write, run: Run, out: Path) -> None:
    result = run(write([ENGLISH, *chinese(4)]), languages={"min_zh_share": 0.7, "action": "drop"})
    assert result.reasons == {"zh_share": 1}
    assert result.zh_before < 0.7
    assert result.zh_after == 1.0
    assert len(_rows(out / "train.jsonl")) == 4


def test_a_share_out_of_reach_is_refused(write: Write, run: Run) -> None:
    with pytest.raises(DataError, match=r"min_zh_share 70% cannot be reached by leaving rows out"):
        run(write([ENGLISH]), languages={"min_zh_share": 0.7, "action": "drop"})


def test_domains_are_balanced_by_rows_and_by_weights(write: Write, run: Run, out: Path, tmp_path: Path) -> None:
    rows = [{**row, "domain": "shop" if i < 6 else "school"} for i, row in enumerate(chinese(8))]
    result = run(write(rows), domains={"target": "balanced"})
    assert result.reasons == {"balance": 4}
    assert sorted(r["domain"] for r in _rows(out / "train.jsonl")) == ["school"] * 2 + ["shop"] * 2
    run(write(rows), out=tmp_path / "w", domains={"target": "balanced", "method": "weights"})
    weights = {r["domain"]: r["weight"] for r in _rows(tmp_path / "w" / "train.jsonl")}
    assert weights == {"shop": pytest.approx(8 / 12), "school": pytest.approx(2.0)}
    run(write(rows), out=tmp_path / "u", domains={"target": "balanced", "method": "up"})
    assert [r["domain"] for r in _rows(tmp_path / "u" / "train.jsonl")].count("school") == 6


def test_domains_by_rules(write: Write, run: Run, out: Path, tmp_path: Path) -> None:
    (tmp_path / "domains.yaml").write_text("kitchen: [水壶, 烤箱, 电饭煲]\n", encoding="utf-8")
    run(write(chinese(10)), domains={"rules": str(tmp_path / "domains.yaml")})
    found = [row["prompt"][:2] for row in _rows(out / "train.jsonl") if row.get("domain") == "kitchen"]
    assert found == ["水壶", "烤箱", "电饭"]


# ---- with an encoder


class Letters:
    """A stand-in for an encoder: a text is the set of its characters; equal characters have equal vectors."""

    def token_vectors(self, texts: Sequence[str]) -> list[Vectors]:
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> Vectors:
        vectors = np.stack([np.random.default_rng(ord(c)).normal(size=64) for c in text or " "]).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Vectors(tuple(map(ord, text or " ")), vectors, np.zeros(len(text or " "), bool))

    def sentence_vectors(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self._one(text).vectors.mean(0) for text in texts])


class WithLetters(Tools):
    def encoder(self, name: str, layer: int | None) -> Letters:
        return Letters()


def test_answers_unlike_their_reference_are_left_out(write: Write, run: Run, out: Path) -> None:
    rows = [
        {"prompt": "冰箱保修多久？", "response": "整机保修三年。", "reference": "整机保修三年！"},
        {"prompt": "洗衣机保修多久？", "response": "今天天气很好啊。", "reference": "整机保修两年。"},
        {"prompt": "空调保修多久？", "response": "保修六年整。"},
    ]
    result = run(write(rows), tools=WithLetters(), quality={"reference": 0.8})
    assert result.reasons == {"quality.reference": 1}
    (rejected,) = _rows(out / "rejected.jsonl")
    assert rejected["where"].endswith(":2")
    assert re.search(
        r"BERTScore F1 0\.\d+ of the answer against the row's reference is below 0\.8", rejected["reasons"][0]
    )
    scores = result.report.quality["reference"]
    assert (scores.histogram.num, scores.num_below) == (2, 1)


@pytest.mark.parametrize("unknown", [0.75, 0.1])
def test_an_encoder_that_does_not_know_the_language_is_named(write: Write, run: Run, unknown: float) -> None:
    class Foreign(Letters):
        def _one(self, text: str) -> Vectors:
            return replace(super()._one(text), unknown=unknown)

    class WithForeign(Tools):
        def encoder(self, name: str, layer: int | None) -> Letters:
            return Foreign()

    row = {"prompt": "冰箱保修多久？", "response": "整机保修三年。", "reference": "整机保修三年！"}
    result = run(write([row]), tools=WithForeign(), quality={"reference": 0.5})
    named = any("minilm does not know 75% of the tokens" in note for note in result.report.notes)
    assert named == (unknown == 0.75)


def test_relevance_says_what_it_is(write: Write, run: Run, out: Path) -> None:
    rows = [
        {"prompt": "冰箱保修多久？", "response": "冰箱保修三年多。"},
        {"prompt": "怎么退货？", "response": "明月几时有，把酒。"},
    ]
    run(write(rows), tools=WithLetters(), quality={"relevance": 0.5})
    (rejected,) = _rows(out / "rejected.jsonl")
    assert "which measures a common subject and not quality" in rejected["reasons"][0]


def test_without_an_encoder_it_says_so(write: Write, run: Run) -> None:
    with pytest.raises(DataError, match="needs the encoder 'minilm', and none can be loaded here"):
        run(write([{**GOOD, "reference": "您好"}]), quality={"reference": 0.8})


def test_made_rows_pass_the_same_checks(write: Write, run: Run, out: Path) -> None:
    """They say where they come from, are never a held-out question, and keep facts and answers."""
    rows = [
        {"prompt": "请问能不能退差价？", "response": "七天内可以。", "facts": ["七天"], "domain": "shop"},
        {"prompt": "请问有没有优惠？", "response": "满一百减十元。", "domain": "shop"},
        {"prompt": "怎么预约上门安装？", "response": "在订单页预约。", "domain": "shop"},
    ]
    settings = {"augment": {"synonyms": {"ratio": 2}}, "quality": {"augmented": None}}
    first = run(write(rows), **settings)
    made = [row for row in _rows(out / "train.jsonl") if row.get("augmented_from")]
    assert len(made) == first.num_made > 0
    originals = {f"{path}": row for path, row in ((row["augmented_from"], row) for row in made)}
    assert all(re.search(r"data\.jsonl:[123]$", where) for where in originals)
    assert all(row["source"] == "synonyms" for row in made)
    assert {row["response"] for row in made} <= {row["response"] for row in rows}
    held_out = write([{"prompt": made[0]["prompt"], "response": "别的答案。"}], "held_out.jsonl")
    again = run(write(rows), out=out.parent / "again", data={"eval_dataset": [str(held_out)]}, **settings)
    prompts = [row["prompt"] for row in _rows(out.parent / "again" / "train.jsonl")]
    assert made[0]["prompt"] not in prompts
    assert again.report.refused["synonyms: held_out"] >= 1


def test_domains_by_meaning(write: Write, run: Run, out: Path) -> None:
    rows = [{"prompt": f"{w}{w}{w}{w}问题{i}", "response": f"第{i}个答案。"} for i in range(12) for w in "天冰"]
    run(write(rows), tools=WithLetters(), domains={"clusters": 2}, duplicates={"near": None})
    groups = {row["prompt"][0]: row["domain"] for row in _rows(out / "train.jsonl")}
    assert len(set(groups.values())) == 2
    assert all(name.startswith("cluster-") for name in groups.values())


# ---- the same result, whatever happens


def synthetic(write: Write, count: int) -> Path:
    """Rows with some of every fault: more than one part's worth."""
    chance = random.Random(1)
    rows: list[Any] = []
    for i in range(count):
        kind = chance.random()
        if kind < 0.05 and rows:
            rows.append(rows[chance.randrange(len(rows))])
        elif kind < 0.1:
            rows.append({"prompt": f"问题{i}"})
        else:
            words = "".join(chance.choice("春夏秋冬山水花鸟风月天地人和") for _ in range(12))
            rows.append({"prompt": f"{words}，第{i}问？", "response": f"{words[::-1]}，第{i}答。"})
    return write(rows)


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("train.jsonl", "rejected.jsonl", "changed.jsonl")}


def test_several_processes_come_to_the_same(write: Write, run: Run, out: Path, tmp_path: Path) -> None:
    path = synthetic(write, 2500)
    one = run(path)
    several = run(path, out=tmp_path / "several", processes=2)
    assert contents(out) == contents(tmp_path / "several")
    assert one.reasons == several.reasons
    assert one.reasons["duplicate"] > 50


def test_ray_comes_to_the_same(write: Write, run: Run, out: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'pingjia[ray]'")
    path = synthetic(write, 1500)
    run(path)
    run(path, out=tmp_path / "ray", engine="ray", processes=2)
    assert contents(out) == contents(tmp_path / "ray")


CHILD = """
import json, sys
from pathlib import Path
from pingjia.data import Job, prepare
from pingjia.data.settings import DataSettings, PrepareSettings
prepare(Job(DataSettings(dataset=[sys.argv[1]], cutoff_len=100), PrepareSettings(), "smollm2", Path(sys.argv[2])))
"""


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_killed_preparation_goes_on(write: Write, run: Run, out: Path, tmp_path: Path, seed: int) -> None:
    path, killed, chance = synthetic(write, 6000), tmp_path / "killed", random.Random(seed)
    run(path)
    kills = 0
    while True:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(killed)], stderr=subprocess.PIPE)
        target = kills + chance.randint(1, 2) if kills < 3 else 99  # of the 6 parts on disk
        while child.poll() is None and len(list(killed.glob(".work/rows/part-*.npz"))) < target:
            time.sleep(0.002)
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
            kills += 1
            continue
        _, error = child.communicate()
        assert child.returncode == 0, error
        break
    assert kills >= 1, "nothing was killed: the test has shown nothing"
    assert contents(out) == contents(killed)


def test_parts_that_are_done_are_not_judged_again(write: Write, run: Run, out: Path, monkeypatch: Any) -> None:
    from pingjia.data import prepared, record

    path = synthetic(write, 2500)
    monkeypatch.setattr(prepared, "assemble", _out_of_power)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    monkeypatch.undo()
    monkeypatch.setattr(record.Inspector, "inspect", _out_of_power)  # every part lies on disk: none is needed
    assert run(path).num_rows == 2500


def _out_of_power(*_: Any) -> None:
    raise KeyboardInterrupt


def test_the_same_command_again_does_nothing(write: Write, run: Run, out: Path) -> None:
    path = write([GOOD])
    run(path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()}
    time.sleep(0.01)
    assert run(path).was_finished
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()} == before


def test_nothing_of_another_job_is_overwritten(write: Write, run: Run, out: Path) -> None:
    out.mkdir()
    (out / "rejected.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"rejected\.jsonl exists already and is not the result of these inputs"):
        run(write([GOOD]))
    assert [p.name for p in out.iterdir()] == ["rejected.jsonl"]
    assert (out / "rejected.jsonl").read_text() == "mine"


def test_changed_settings_are_another_job(write: Write, run: Run) -> None:
    path = write([GOOD])
    run(path)
    with pytest.raises(DataError, match="exists already"):
        run(path, seed=43)
    assert run(path, processes=2).was_finished  # how it is done does not make it another


def test_a_missing_file_leaves_nothing_behind(write: Write, run: Run, tmp_path: Path, out: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: cannot be read: No such file"):
        run(write([GOOD]), tmp_path / "no.jsonl")
    assert not out.exists()


def test_a_disk_that_refuses(write: Write, run: Run, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        run(write([GOOD]), out=tmp_path / "taken" / "out")


def test_public_file_with_lists_for_answers(shared: Path, run: Run, out: Path) -> None:
    result = run(shared / "d2q_1.jsonl")
    assert (result.num_kept, result.num_rejected) == (0, 20)
    assert isinstance(_rows(out / "rejected.jsonl")[0]["row"]["output"], list)


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [("alpaca_zh_demo.json", 1000), ("alpaca_en_demo.json", 999), ("glaive_toolcall_zh_demo.json", 300)],
)
def test_public_files_end_to_end(shared: Path, run: Run, out: Path, name: str, num_rows: int) -> None:
    result = run(shared / name, data={"cutoff_len": 1024})
    assert result.num_rows == num_rows
    assert result.num_kept + result.num_rejected == num_rows
    assert len(_rows(out / "train.jsonl")) == result.num_kept > 0.5 * num_rows
    print(name, result.num_rows, result.num_kept, result.reasons)
