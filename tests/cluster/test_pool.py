"""Who gets requests: failures, forgetting registries, doubles, strangers."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pingjia.cluster.pool import Selection, has_forgotten, select
from pingjia.cluster.replica import Replica, State


def names(selection: Selection) -> list[str]:
    return [member.name for member in selection.members]


def test_only_passing_ones(replica):
    seen = [replica("a"), replica("b", state=State.FAILED), replica("c", state=State.DRAINING)]
    assert names(select(seen, seen)) == ["a"]


def test_when_nobody_is_heard_of_all_stay_but_those_told_to_leave(replica):
    before = [replica("a"), replica("b"), replica("c")]
    seen = [replace(before[0], state=State.FAILED), replace(before[1], state=State.FAILED),
            replace(before[2], state=State.DRAINING)]  # fmt: skip
    selection = select(seen, before)
    assert names(selection) == ["a", "b"]
    assert "none of 2 replicas is heard of" in selection.remarks[0]
    assert names(select(seen, [])) == []  # who never passed is not begun with


def test_one_that_leaves_is_gone_and_one_that_is_forgotten_is_held(replica):
    before = [replica("a"), replica("b")]
    assert names(select(before[:1], before)) == ["a"]
    assert names(select([], before[:1])) == []
    assert names(select(before[:1], before, is_holding=True)) == ["a", "b"]
    failed = replace(before[1], state=State.FAILED)
    assert names(select([before[0], failed], before, is_holding=True)) == ["a"]  # known again, and it fails


def test_what_forgetting_looks_like(replica):
    two = [replica("a"), replica("b")]
    assert has_forgotten(two, two, index=5, last_index=900)
    assert has_forgotten([], two, index=901, last_index=900)
    assert not has_forgotten([], two[:1], index=901, last_index=900)  # the last one left
    assert not has_forgotten(two, two, index=901, last_index=900)


def test_of_two_with_one_name_the_first_stays(replica):
    old, new = replica("a", address="10.0.0.9"), replica("a", address="10.0.0.1")
    selection = select([new, old], [old])
    assert [m.address for m in selection.members] == ["10.0.0.9"]
    assert "two replicas are called a" in selection.remarks[0]
    assert "10.0.0.1" in selection.remarks[0]


def test_another_model_is_left_out_also_when_it_is_faster(replica):
    a, b, c = replica("a", digest="x"), replica("b", digest="x"), replica("c", digest="y", weight=1000)
    selection = select([a, b, c], [a, b])
    assert names(selection) == ["a", "b"]
    assert "c at 10.0.0.1:8099 serves another model (y) than the pool (x)" in selection.remarks[0]
    assert names(select([a, b, c], [])) == ["c"]  # nobody was there before: what can answer most
    assert names(select([a, replica("d", digest="")], [a])) == ["a", "d"]  # not ours to judge


def test_weight_zero_is_left_out_and_named(replica):
    selection = select([replica("a"), replica("b", weight=0)], [])
    assert names(selection) == ["a"]
    assert "b at 10.0.0.1:8098 has weight 0" in selection.remarks[0]


REPLICA = st.builds(
    Replica,
    name=st.sampled_from("abcd"),
    address=st.just("10.0.0.1"),
    port=st.integers(1, 6),
    weight=st.integers(0, 3),
    state=st.sampled_from(State),
    model_digest=st.sampled_from(["", "x", "y"]),
)


@given(seen=st.lists(REPLICA, max_size=8), before=st.lists(REPLICA.filter(lambda r: r.weight > 0), max_size=5))
def test_whatever_comes_the_pool_is_sound(seen, before):
    chosen = select(seen, before).members
    authorities = [m.authority for m in chosen]
    assert len(set(authorities)) == len(authorities) or not any(r.state is State.PASSING for r in seen)
    assert len({m.model_digest for m in chosen if m.model_digest}) <= 1
    assert all(m.weight > 0 for m in chosen)
    if any(r.state is State.PASSING and r.weight > 0 for r in seen):
        assert chosen
        assert all(m.state is State.PASSING for m in chosen)
