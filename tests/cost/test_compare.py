"""The arithmetic of `cost compare`: equal loss, money, estimates that stay apart, claims against what was measured."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.cost import CostSettings, resolve
from pingjia.cost.compare import HEADER, Arm, Point, Serving, common_loss, reached, rows, to_csv
from pingjia.cost.compare_claims import claims
from pingjia.cost.compare_elsewhere import CHATGLM_6B, FORMULAS, GPU_24GB, as_report, estimates
from pingjia.errors import TrainingError

PRICES = resolve(CostSettings(price_per_hour=3.6))


def arm(name: str, losses: list[float], seconds: float = 10.0, stored: int = 100) -> Arm:
    """An arm that looks after every update, of so many seconds and 50 tokens."""
    curve = tuple(Point(i, i * seconds, i * 50, loss) for i, loss in enumerate(losses))
    return Arm(name, 1e-3, curve, 10, 1000, stored, {})


def serving(name: str, answer_s: float, tokens_per_s: float = 10.0) -> Serving:
    return Serving(name, 0.1, 0.02, answer_s, 32, tokens_per_s, 1000)


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=8), st.floats(0, 1))
def test_where_the_curve_goes_through_a_loss(losses: list[float], share: float) -> None:
    found = arm("lora", losses)
    low, high = min(losses), losses[0]
    target = low + share * (high - low)
    point = reached(found.curve, target)
    if target < high:
        assert point is not None
        assert point.seconds == pytest.approx(point.updates * 10)
        assert point.tokens == pytest.approx(point.updates * 50)
        before = [loss for loss in losses[: math.ceil(point.updates)]]
        assert all(loss > target or math.isclose(loss, target) for loss in before)
    else:
        assert point is None or point.loss == target


def test_it_is_interpolated_between_two_looks() -> None:
    assert reached(arm("lora", [4.0, 2.0, 1.0]).curve, 1.5) == Point(1.5, 15.0, 75.0, 1.5)
    assert reached(arm("lora", [4.0, 2.0, 1.0]).curve, 0.5) is None
    assert reached(arm("lora", [4.0, 5.0, 1.0]).curve, 3.0) == Point(1.5, 15.0, 75.0, 3.0)


def test_arms_meet_at_the_lowest_loss_that_all_reached() -> None:
    arms = [arm("full", [4, 2, 1.5]), arm("lora", [4, 1, 2])]
    assert common_loss(arms) == 1.5
    assert common_loss(arms, 1.75) == 1.75


def test_a_loss_that_was_not_reached_is_refused_with_those_that_were() -> None:
    arms = [arm("full", [4, 2, 1.5]), arm("lora", [4, 1, 2])]
    with pytest.raises(TrainingError, match=r"1\.2000 was not reached by full 1\.5000 .*every arm reached 1\.5000"):
        common_loss(arms, 1.2)


def test_an_arm_that_learnt_nothing_is_named() -> None:
    with pytest.raises(TrainingError, match=r"no equal held-out loss: lora 4\.0000 .*before training it was lora 4"):
        common_loss([arm("full", [4, 2]), arm("lora", [4, 5])])
    with pytest.raises(TrainingError, match=r"lora: its held-out loss is no number at rate 0\.001"):
        common_loss([arm("full", [4, 2]), arm("lora", [4, math.nan])])


def test_a_loss_from_before_the_training_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"not below that before training \(lora begins at 3"):
        common_loss([arm("full", [4, 2]), arm("lora", [3, 2])], 3.5)


def test_money_is_the_time_to_the_loss_at_the_price() -> None:
    full, lora = rows([arm("full", [4, 2], 100), arm("lora", [4, 2], 25)], 2.0, PRICES, {})
    assert full.money == Fraction("0.1")
    assert lora.money == Fraction("0.025")
    assert full.serving is None


def test_the_csv_holds_what_was_measured_and_only_that() -> None:
    found = rows([arm("full", [4, 2]), arm("lora", [4, 3])], 2.0, PRICES, {"full": serving("full", 1.0)})
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert tuple(lines[0]) == HEADER
    assert [line["train_hours"] for line in lines] == ["0.002778", ""]
    assert [line["per_token_s"] for line in lines] == ["0.02", ""]


def test_an_arm_survives_json() -> None:
    found = arm("lora", [4, 2])
    assert Arm.of(found.to_dict()) == found


def test_the_estimate_follows_its_formula() -> None:
    arms = [arm(name, [4, 2]) for name in ("full", "lora", "qlora_int8", "qlora_int4")]
    full, lora, int8, int4 = estimates(arms, 2.0, 16, CHATGLM_6B, replace(GPU_24GB, price_per_hour=2.0))
    flop = 50 * CHATGLM_6B.weights * 6
    assert full.train_hours == pytest.approx(flop / (165e12 * 0.35) / 3600)
    assert lora.train_hours == pytest.approx(full.train_hours * 4 / 6)
    assert full.money == pytest.approx(2 * full.train_hours)
    assert full.memory_gb == pytest.approx(98.8, abs=0.1)
    assert (full.fits, lora.fits, int8.fits, int4.fits) == (False, True, True, True)
    assert lora.ms_per_token == full.ms_per_token > int8.ms_per_token > int4.ms_per_token
    assert lora.stored_gb == pytest.approx(16 * 28 * (4096 + 12288 + 2 * 4096 + 2 * (4096 + 16384)) * 2 / 1e9)


def test_what_was_not_reached_is_not_extrapolated() -> None:
    assert estimates([arm("full", [4, 3])], 2.0, 16, CHATGLM_6B, GPU_24GB) == []
    report = as_report([], CHATGLM_6B, GPU_24GB)
    assert report["is_measured"] is False
    assert set(report["formulas"]) == set(FORMULAS)


def test_claims_stand_beside_what_was_measured() -> None:
    found = rows([arm("full", [4, 2], 20, stored=1000), arm("lora", [4, 2], 10, stored=50)], 2.0, PRICES, {})
    ways = [serving("full", 1.0), serving("lora_merged", 1.01), serving("int4", 0.4), serving("cached", 0.01)]
    servings = {way.name: way for way in [*ways, serving("batch_of_8", 3.0, 30.0)]}
    time, storage, latency, speed = claims(found, servings)
    assert time.measured == "50.0% less, to the same held-out loss"
    assert storage.measured == "95.00% less for each further model"
    assert speed.measured == "2.00 times as fast, to the same held-out loss"
    assert latency.measured == (
        "from LoRA, merged none (the same products; they measured 1.0% apart, which is noise); "
        "from INT4 60.0% less; from a kept answer 99.0% less; "
        "from a batch of 8 3.0 times the tokens per second"
    )
    assert all(claim.why for claim in (time, storage, latency, speed))


def test_lora_that_took_longer_is_not_said_to_save() -> None:
    found = rows([arm("full", [4, 2], 10), arm("lora", [4, 2], 20)], 2.0, PRICES, {})
    time, _, latency, speed = claims(found, {"full": serving("full", 1.0), "lora": serving("lora", 1.2)})
    assert time.measured == "100.0% more, to the same held-out loss"
    assert speed.measured == "0.50 times as fast, to the same held-out loss"
    assert latency.measured == "from LoRA beside the base 20.0% more"


def test_a_noisy_machine_makes_no_saving_of_lora() -> None:
    """A busy machine once measured a merged adapter 24 % faster than the network it is alike."""
    ways = [serving("full", 1.0), serving("lora_merged", 0.76), serving("lora", 0.8), serving("int8", 0.2)]
    latency = claims([], {way.name: way for way in ways})[2]
    assert latency.measured == (
        "from LoRA, merged none (the same products; they measured 24.0% apart, which is noise); "
        "from LoRA beside the base none (+20.0%, within noise); from INT8 80.0% less"
    )


def test_what_was_not_run_is_not_claimed() -> None:
    found = claims(rows([arm("lora", [4, 2])], 2.0, PRICES, {}), {})
    assert [claim.measured for claim in found] == [None] * 4
