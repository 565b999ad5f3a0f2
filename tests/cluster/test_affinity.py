"""Which replica continues a conversation: properties of the ring, and what affinity is worth, simulated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.cluster.affinity import MIN_TOKENS, Beginnings, PrefixAffinity
from pingjia.cluster.plan import Machine
from pingjia.cluster.ring import BoundedRing
from pingjia.cluster.simulate import Affine, Fleet, LeastLoaded, Simulation, Turns, Visit
from pingjia.types import Request, Sampling


@dataclass(frozen=True)
class Server:
    name: str
    weight: float = 1.0
    num_outstanding: int = 0


def asked(ids: list[int], adapter: str | None = None) -> Request:
    return Request("r", tuple(ids), Sampling(), adapter)


def prompt(conversation: int, length: int = 300, shared: int = 0) -> list[int]:
    own = np.random.default_rng(conversation).integers(10, 50_000, length).tolist()
    return ([7] * shared + own)[:length]


# ---- the ring

WEIGHTS = st.dictionaries(st.sampled_from([f"s{i}" for i in range(12)]), st.sampled_from([0.5, 1.0, 2.0]), min_size=1)


@given(weights=WEIGHTS, keys=st.lists(st.binary(max_size=8), max_size=300), spread=st.floats(1.01, 2.0))
@settings(max_examples=40)
def test_nobody_gets_more_than_its_room(weights, keys, spread):
    ring, loads = BoundedRing(weights, spread=spread, points=16), Counter()
    for num, key in enumerate(keys):
        name = ring.pick(key, lambda name: loads[name], num)
        assert loads[name] + 1 <= ring.room(name, num)
        loads[name] += 1
    assert sum(loads.values()) == len(keys)


@given(weights=WEIGHTS.filter(lambda w: len(w) > 1), keys=st.lists(st.binary(max_size=8), max_size=100))
@settings(max_examples=40)
def test_one_that_goes_moves_only_its_own_keys(weights, keys):
    gone = sorted(weights)[0]
    weights = dict.fromkeys(weights, 1.0)
    less = {name: weight for name, weight in weights.items() if name != gone}
    before, after = BoundedRing(weights), BoundedRing(less)
    for key in keys:
        place = before.pick(key, lambda name: 0, 0)
        if place != gone:
            assert after.pick(key, lambda name: 0, 0) == place


def test_the_fast_get_more():
    ring = BoundedRing({"slow": 1.0, "fast": 3.0}, spread=100.0)
    counts = Counter(ring.pick(str(i).encode(), lambda name: 0, 0) for i in range(4000))
    assert 0.6 < counts["fast"] / 4000 < 0.88


def test_a_spread_of_one_cannot_be():
    with pytest.raises(ValueError, match="more than its fair share"):
        BoundedRing({"a": 1.0}, spread=1.0)


# ---- the policy


def test_all_turns_of_a_conversation_go_to_one_place():
    policy, servers = PrefixAffinity(), [Server(f"s{i}") for i in range(8)]
    for conversation in range(20):
        whole = prompt(conversation, 2000)
        places = {policy.choose(servers, asked(whole[:length])).name for length in (150, 300, 700, 2000)}
        assert len(places) == 1
    assert len({policy.choose(servers, asked(prompt(c))).name for c in range(100)}) == 8


def test_short_prompts_and_shared_beginnings_are_balanced():
    policy = PrefixAffinity()
    servers = [Server("a", num_outstanding=3), Server("b", num_outstanding=1), Server("c", 4.0, num_outstanding=6)]
    assert policy.choose(servers, asked([1] * (MIN_TOKENS - 1))).name == "c"  # 7/4 < 2/1 < 4/1
    for _ in range(30):
        policy.choose(servers, asked([7] * (MIN_TOKENS + 20)))
    assert policy.choose(servers, asked([7] * (MIN_TOKENS + 20))).name == "c"  # everybody's beginning: warm everywhere


def test_behind_a_shared_system_prompt_conversations_still_have_a_place():
    beginnings = Beginnings()
    for conversation in range(200):
        beginnings.key_of(asked(prompt(conversation, 600, shared=200)), 4)
    keys = {c: beginnings.key_of(asked(prompt(c, 600, shared=200)), 4) for c in range(50)}
    assert len(set(keys.values())) == 50
    assert None not in keys.values()
    assert keys[3] == beginnings.key_of(asked(prompt(3, 600, shared=200) + [9] * 400), 4)


def test_adapters_do_not_share_what_they_computed():
    beginnings = Beginnings()
    assert beginnings.key_of(asked(prompt(1)), 4) != beginnings.key_of(asked(prompt(1), "shop"), 4)


def test_a_model_that_reads_both_ways_reuses_only_whole_prompts():
    beginnings = Beginnings(is_causal=False)
    key = beginnings.key_of(asked(prompt(1)), 4)
    assert key == beginnings.key_of(asked(prompt(1)), 4)
    assert key != beginnings.key_of(asked([*prompt(1), 5]), 4)


def test_a_place_that_is_full_is_passed_over():
    policy = PrefixAffinity()
    idle = [Server(f"s{i}") for i in range(4)]
    home = policy.choose(idle, asked(prompt(1))).name
    busy = [Server(s.name, num_outstanding=9 if s.name == home else 1) for s in idle]
    assert policy.choose(busy, asked(prompt(1))).name != home


def test_it_is_a_policy_of_the_gateway():
    from pingjia.gateway.replicas import Policy, Replica

    policy: Policy = PrefixAffinity()
    servers = [Replica(f"s{i}", weight=2.0) for i in range(3)]
    assert policy.choose(servers, asked(prompt(1))) in servers


# ---- what it is worth


def conversations(num: int, turns: int, per_s: float, seed: int, shared: int = 0) -> Iterator[Visit]:
    """Turns of conversations in order of arrival: each 400 tokens longer than the one before."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum(rng.exponential(1.0 / per_s, num))
    times = [(start + turn * 20.0, c, turn) for c, start in enumerate(starts.tolist()) for turn in range(turns)]
    for at_s, c, turn in sorted(times):
        length = 400 * (turn + 1)
        ids = tuple(prompt(c, min(length, 600), shared))
        yield Visit(at_s, length, 40.0, c + 1, 400.0 * turn, Request("r", ids, Sampling()))


def test_affinity_finds_what_was_computed_and_balance_does_not():
    machine, num = Machine(400.0, 8, 2000.0), 20
    outcomes = {}
    policies = {"turns": Turns([1] * num), "least": LeastLoaded([1.0] * num), "affine": Affine([1.0] * num)}
    for name, policy in policies.items():
        visits = conversations(1500, 5, per_s=7.0, seed=1)
        outcomes[name] = Simulation(Fleet(machine, [1.0] * num), policy).run(visits)
    possible = 1500 * 4
    known = {name: outcome.num_known / possible for name, outcome in outcomes.items()}
    first = {name: float(np.mean(outcome.first_s)) for name, outcome in outcomes.items()}
    assert known["affine"] > 0.85
    assert known["turns"] < 0.2
    assert known["least"] < 0.2
    assert first["affine"] < 0.6 * min(first["turns"], first["least"])
    served = outcomes["affine"].num_served
    assert served.max() < 1.6 * served.mean()  # the ring's unevenness, bounded


def test_one_popular_beginning_does_not_drown_a_replica():
    machine, num = Machine(400.0, 8, 2000.0), 20
    visits = [Visit(i / 15.0, 600.0, 40.0, 0, 0.0, asked([7] * 600)) for i in range(6000)]
    affine = Simulation(Fleet(machine, [1.0] * num), Affine([1.0] * num)).run(visits)
    least = Simulation(Fleet(machine, [1.0] * num), LeastLoaded([1.0] * num)).run(visits)
    assert affine.waits_s.mean() <= least.waits_s.mean() + 0.05
    assert affine.num_served.max() < 2 * affine.num_served.mean()
