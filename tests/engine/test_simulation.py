"""The scheduler and the page allocator under random load, before a fake network that checks what it is fed.

The fake stores in every slot a value that depends on all that a real key would depend on, and compares every slot a
sequence reads with what that sequence should find there: a page owned twice, reused stale or computed from half a
prompt is seen at once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import pytest

from pingjia.engine.draft import agreed
from pingjia.engine.pages import PageAllocator
from pingjia.engine.scheduler import Scheduler, Seats
from pingjia.engine.sequence import Sequence, Slice

STOP = 0
NUM_STEPS = 7_200  # of each of the 14 scenes: 100,800 in all
ADAPTERS = {None: 101, "a": 102, "b": 103}  # numbers, because the hash of a string differs from run to run


def causal_values(sequence: Sequence, stop: int) -> list[int]:
    """A key depends on the tokens up to its own, and on the adapter."""
    values, value = [], hash((ADAPTERS[sequence.adapter],))
    for token in sequence.tokens[:stop]:
        value = hash((value, token))
        values.append(value)
    return values


def two_way_values(sequence: Sequence, stop: int) -> list[int]:
    """A key of the prompt depends on all of the prompt that is there; later ones on the tokens up to their own."""
    seen = min(stop, sequence.num_prompt)
    value = hash((ADAPTERS[sequence.adapter], tuple(sequence.tokens[:seen])))
    values = [hash((value, i)) for i in range(seen)]
    for token in sequence.tokens[seen:stop]:
        value = hash((value, token))
        values.append(value)
    return values


def next_token(values: Seq[int], seed: int = 0) -> int:
    return hash((values[-1], seed)) % 23


def true_answer(prompt: Seq[int], adapter: str | None, max_tokens: int, values_of, seed: int = 0) -> list[int]:
    """What a request must get whatever else happens."""
    alone = Sequence("alone", 0, list(prompt), adapter=adapter)
    while len(alone.tokens) - len(prompt) < max_tokens and (
        len(alone.tokens) == len(prompt) or alone.tokens[-1] != STOP
    ):
        alone.tokens.append(next_token(values_of(alone, len(alone.tokens)), seed))
    return alone.tokens[len(prompt) :]


@dataclass
class House:
    """One simulated engine: load comes in, steps are taken, everything is checked after each."""

    seats: Seats
    num_pages: int
    rng: random.Random
    reuse: bool = True
    fail_rate: float = 0.0
    slots: dict[int, int] = field(default_factory=dict)
    live: dict[str, tuple[Sequence, int]] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    ends: Counter = field(default_factory=Counter)
    num_accepted: int = 0
    num_steps: int = 0
    num_cached: int = 0
    num_split: int = 0
    num_forks: int = 0
    num_right: int = 0
    num_wrong: int = 0
    guess_rate: float = 0.0
    num_copies: int = 0
    num_tails: int = 0

    def __post_init__(self) -> None:
        self.pages = PageAllocator(self.num_pages, reuse=self.reuse)
        self.scheduler = Scheduler(self.seats, self.pages)
        self.values_of = causal_values if self.seats.causal_prompt else two_way_values
        self.beginnings = [[self.rng.randrange(1, 23) for _ in range(40)] for _ in range(3)]

    @property
    def capacity(self) -> int:
        return self.num_pages * self.seats.page_size

    def arrive(self, num_prompt: int, max_tokens: int) -> None:
        prompt = [self.rng.randrange(1, 23) for _ in range(num_prompt)]
        if self.rng.random() < 0.7:  # most share a beginning with others, some are equal as a whole
            beginning = self.rng.choice(self.beginnings)
            prompt[: len(beginning)] = beginning[:num_prompt]
        adapter = self.rng.choice([None, *ADAPTERS])
        for seed in range(self.rng.choice([1, 1, 1, 1, 2, 5])):  # several answers to one prompt
            self.admit(prompt, adapter, max_tokens, seed)

    def admit(self, prompt: list[int], adapter: str | None, max_tokens: int, seed: int = 0) -> str:
        name = f"r{self.num_accepted}"
        self.seeds[name] = seed
        root = str((adapter, None if self.seats.causal_prompt else prompt)).encode()
        sequence = Sequence(name, self.num_accepted, list(prompt), root=root, adapter=adapter)
        self.num_accepted += 1
        self.live[name] = (sequence, max_tokens)
        self.scheduler.add(sequence)
        return name

    def cancel_one(self) -> None:
        if self.live:
            self.end(self.rng.choice(list(self.live)))

    def end(self, name: str) -> None:
        sequence, _ = self.live.pop(name)
        self.scheduler.drop(sequence)
        self.ends[name] += 1

    def step(self) -> list[Slice]:
        before = [(s, s.pages) for s in self.scheduler.running]
        self.guess()
        plan = self.scheduler.plan()
        self.check_preempted(before)
        self.num_steps += bool(plan)
        self.check_plan(plan)
        self.copy(self.scheduler.copies())
        done: list[tuple[Slice, list[int]]] = []
        for piece in plan:
            tokens = self.compute(piece)
            if self.rng.random() >= self.fail_rate:
                done.append((piece, tokens))
        self.scheduler.commit(done)
        said = [piece.sequence for piece, tokens in done if tokens]
        for piece, _ in done:
            said += self.fork(piece) if piece.ends_prompt else []
        self.check_ownership()
        succeeded = {piece for piece, _ in done}
        for piece in plan:
            if piece not in succeeded:
                self.end(piece.sequence.id)
        for sequence in said:
            self.maybe_finish(sequence)
        return plan

    def copy(self, pages: list[tuple[int, int]]) -> None:
        """The ends of prompts that are had again, read before any is written."""
        size = self.seats.page_size
        read = {target: [self.slots.get(source * size + i, -1) for i in range(size)] for source, target in pages}
        assert len(read) == len(pages), "two copies into one page"
        for target, values in read.items():
            self.slots |= {target * size + i: value for i, value in enumerate(values)}
        self.num_tails += len(pages)

    def guess(self) -> None:
        """Some answers guess at their next tokens, rightly up to a point."""
        for sequence in self.scheduler.running:
            sequence.drafts = []
            if sequence.num_tokens > sequence.num_prompt and self.rng.random() < self.guess_rate:
                _, max_tokens = self.live[sequence.id]
                left = max_tokens - (sequence.num_tokens - sequence.num_prompt) - 1
                self.draft(sequence, self.rng.randint(0, max(left, 0)))

    def draft(self, sequence: Sequence, count: int) -> None:
        ahead = Sequence("ahead", 0, sequence.tokens[: sequence.num_prompt], adapter=sequence.adapter)
        ahead.tokens = list(sequence.tokens)
        for _ in range(count):
            token = next_token(self.values_of(ahead, ahead.num_tokens), self.seeds[sequence.id])
            ahead.tokens.append(token if self.rng.random() < 0.8 else (token + 1) % 23)
        sequence.drafts = ahead.tokens[sequence.num_tokens :]

    def fork(self, piece: Slice) -> list[Sequence]:
        """Let all that follow this sequence go on, each with a token of its own; some fail instead."""
        values = self.values_of(piece.sequence, piece.stop)
        forked, size = [], self.seats.page_size
        for follower in list(piece.sequence.followers):
            if self.rng.random() < self.fail_rate:
                self.end(follower.id)
                continue
            copied = self.scheduler.fork(follower, next_token(values, self.seeds[follower.id]))
            for i in range(size) if copied else ():
                source, target = (page * size + i for page in copied)
                self.slots[target] = self.slots.get(source, -1)
            forked.append(follower)
            self.num_copies += copied is not None
        self.num_forks += len(forked)
        assert not piece.sequence.followers
        return forked

    def compute(self, piece: Slice) -> list[int]:
        """The fake network: check what is read, write what is computed, return the tokens that follow."""
        sequence, size = piece.sequence, self.seats.page_size
        drafts = sequence.drafts[: piece.num_drafts]
        slots = [sequence.pages[i // size] * size + i % size for i in range(piece.stop)]
        sequence.tokens += drafts
        truth = self.values_of(sequence, len(sequence.tokens))
        values = self.values_of(sequence, piece.stop)
        del sequence.tokens[len(sequence.tokens) - len(drafts) :]
        assert [self.slots.get(s) for s in slots[: piece.start]] == truth[: piece.start], "read stale or foreign keys"
        self.num_split += piece.start < sequence.num_prompt and piece.stop < sequence.num_prompt
        for i in range(piece.start, piece.stop):
            self.slots[slots[i]] = values[i]
        assert values == truth[: piece.stop], "computed from half a prompt"
        seed = self.seeds[sequence.id]
        chosen = [next_token(values[:stop], seed) for stop in range(piece.stop - len(drafts), piece.stop + 1)]
        tokens = agreed(drafts, chosen, frozenset({STOP})) if piece.samples else []
        self.num_right += max(len(tokens) - 1, 0)
        self.num_wrong += piece.num_drafts - max(len(tokens) - 1, 0)
        return tokens

    def maybe_finish(self, sequence: Sequence) -> None:
        _, max_tokens = self.live[sequence.id]
        answer = sequence.tokens[sequence.num_prompt :]
        if answer[-1] == STOP or len(answer) == max_tokens:
            prompt = sequence.tokens[: sequence.num_prompt]
            seed = self.seeds[sequence.id]
            assert answer == true_answer(prompt, sequence.adapter, max_tokens, self.values_of, seed)
            self.num_cached += sequence.num_cached or 0
            self.end(sequence.id)

    def check_preempted(self, before: list[tuple[Sequence, list[int]]]) -> None:
        """Whoever was put back has another list of pages, also when it overtook its way back in the same step."""
        stayed = [s.arrival for s, pages in before if s.pages is pages]
        put_back = [s.arrival for s, pages in before if s.pages is not pages]
        assert not stayed or not put_back or min(put_back) > max(stayed), "an older one had to make room"

    def check_plan(self, plan: list[Slice]) -> None:
        assert bool(plan) == bool(self.live)
        self.check_followers()
        if not plan:
            return
        sequences = [piece.sequence for piece in plan]
        assert len(set(sequences)) == len(plan) <= self.seats.max_num_seqs
        assert set(sequences) <= set(self.scheduler.running)
        oldest = min((s for s, _ in self.live.values()), key=lambda s: s.arrival)
        assert oldest in sequences, "the oldest request was left out of a step"
        decoding = [s for s in self.scheduler.running if s.remaining == 1]
        assert set(decoding) <= set(sequences), "an answer did not get its token"
        prefills = [piece for piece in plan if piece.sequence not in decoding]
        self.check_budget(prefills, sum(piece.num_tokens for piece in plan) - sum(p.num_tokens for p in prefills))
        for piece in plan:
            answered = piece.stop - piece.sequence.num_prompt
            assert piece.num_drafts == 0 or answered < self.live[piece.sequence.id][1], "guesses beyond the answer"

    def check_followers(self) -> None:
        """Who follows is nowhere else, and is led by an older one with an equal prompt that is not computed yet."""
        seated = {*self.scheduler.running, *self.scheduler.waiting}
        following = {s for s, _ in self.live.values() if s.leader is not None}
        assert self.scheduler.num_waiting == len(self.scheduler.waiting) + len(following)
        assert {s for s, _ in self.live.values()} == seated | following
        assert not seated & following
        for s in following:
            assert s in s.leader.followers
            assert s.leader in seated
            assert s.leader.arrival < s.arrival
            assert (s.leader.tokens, s.leader.adapter) == (s.tokens, s.adapter)
        assert set(self.scheduler._leading.values()) <= seated

    def check_budget(self, prefills: list[Slice], num_decoded: int) -> None:
        room = max(self.seats.max_num_batched_tokens - num_decoded, 1)
        if not self.seats.causal_prompt:
            for piece in prefills:
                whole = piece.stop >= piece.sequence.num_prompt or piece.start >= piece.sequence.num_prompt
                assert whole, "a two-way prompt was cut"
            # The oldest prompt may exceed the budget, since it cannot be cut.
            prefills = sorted(prefills, key=lambda piece: piece.sequence.arrival)[1:]
        assert sum(piece.num_tokens for piece in prefills) <= room

    def check_ownership(self) -> None:
        owners = Counter(page for s in self.scheduler.running for page in s.pages)
        assert {p: n for p, n in enumerate(self.pages._owners) if n} == dict(owners), (
            "a page leaked or is owned in error"
        )
        free, idle = self.pages._free, list(self.pages._idle)
        assert sorted([*free, *idle, *owners]) == list(range(self.num_pages)), "a page is lost or is in two places"
        assert not any(s.pages for s in self.scheduler.waiting)
        assert self.pages._page_of == {key: page for page, key in self.pages._key_of.items()}
        assert self.pages._page_of_tail == {key: page for page, key in self.pages._tail_of.items()}
        for sequence in self.scheduler.running:
            for page in sequence.pages[sequence.num_computed // self.seats.page_size :]:
                assert owners[page] == 1, "a page that is still written to is shared"

    def drain(self) -> None:
        while self.live:
            self.step()
        assert self.pages.num_free == self.num_pages
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert set(self.ends.values()) <= {1}
        assert len(self.ends) == self.num_accepted
        assert not self.scheduler._leading
        assert self.scheduler.num_waiting == 0


SCENES = [
    Seats(max_num_seqs=8, max_num_batched_tokens=32, page_size=4),
    Seats(max_num_seqs=4, max_num_batched_tokens=7, page_size=4),
    Seats(max_num_seqs=12, max_num_batched_tokens=6, page_size=1),
    Seats(max_num_seqs=1, max_num_batched_tokens=16, page_size=8),
    Seats(max_num_seqs=8, max_num_batched_tokens=512, page_size=16),
    Seats(max_num_seqs=8, max_num_batched_tokens=24, page_size=4, causal_prompt=False),
    Seats(max_num_seqs=3, max_num_batched_tokens=90, page_size=8, causal_prompt=False),
]


def run_random_load(house: House, num_steps: int) -> None:
    """Busy and quiet phases, short and long prompts, cancels and failures, until `num_steps` have been taken."""
    rng, longest = house.rng, house.capacity
    rate, max_prompt = 0.3, 30
    while house.num_steps < num_steps:
        if rng.random() < 0.01:
            rate, max_prompt = rng.choice([0.05, 0.3, 1.5]), rng.choice([10, 30, 75])
        if rng.random() < rate and len(house.live) < 40:
            num_prompt = rng.randint(1, min(max_prompt, longest - 2))
            house.arrive(num_prompt, rng.randint(1, min(25, longest - num_prompt)))
        if rng.random() < 0.02:
            house.cancel_one()
        house.step()
    house.drain()


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_nothing_leaks_and_every_answer_is_right_under_random_load(scene: Seats, reuse: bool) -> None:
    house = House(
        scene, num_pages=100 // scene.page_size, rng=random.Random(repr(scene)), reuse=reuse, fail_rate=0.001,
        guess_rate=0.3,
    )  # fmt: skip
    run_random_load(house, NUM_STEPS)
    assert house.num_accepted > 50
    assert house.num_right > 100
    assert house.num_wrong > 100
    assert (house.num_cached > 0) == reuse
    assert (house.num_forks > 100) == reuse
    if scene.max_num_seqs > 1 and scene.page_size > 1:
        assert (house.num_copies > 10) == reuse
    if scene.page_size > 1:
        assert (house.num_tails > 10) == reuse
    if scene.max_num_seqs > 1 and scene.page_size < 16:
        assert house.scheduler.num_preemptions > 10, "the scene was meant to run out of pages"
    if scene.causal_prompt and scene.max_num_batched_tokens < 75:
        assert house.num_split > 10, "the scene was meant to cut prompts"


def test_naive_prefix_reuse_on_a_two_way_prompt_is_caught() -> None:
    """Planted: pages keyed without the whole prompt. The fake network must notice."""
    house = House(SCENES[5], num_pages=40, rng=random.Random(1))
    shared = [5] * 12
    house.admit([*shared, 1, 2], None, 2)
    house.drain()
    sequence = Sequence("naive", 99, [*shared, 3, 4], root=str((None, [*shared, 1, 2])).encode())
    house.live["naive"], house.seeds["naive"] = (sequence, 2), 0
    house.scheduler.add(sequence)
    with pytest.raises(AssertionError, match="stale or foreign"):
        house.step()


def test_cutting_a_two_way_prompt_is_caught() -> None:
    """Planted: a scheduler that takes the two-way family for a causal one."""
    house = House(Seats(4, 8, 4, causal_prompt=True), num_pages=40, rng=random.Random(1))
    house.values_of = two_way_values
    house.admit(list(range(1, 20)), None, 2)
    with pytest.raises(AssertionError, match="half a prompt"):
        house.step()


def test_a_short_prompt_does_not_queue_behind_a_flood_of_long_ones() -> None:
    house = House(Seats(8, 32, 4), num_pages=1000, rng=random.Random(3))
    for _ in range(20):
        house.admit([house.rng.randrange(1, 23) for _ in range(150)], None, 5)
    house.step()
    name = house.admit([1, 2, 3, 4, 5], None, 50)
    assert name in {piece.sequence.id for piece in house.step()}


def test_a_flood_of_short_prompts_costs_a_long_one_at_most_half_its_speed() -> None:
    house = House(Seats(8, 32, 4), num_pages=1000, rng=random.Random(3))
    long = house.admit([house.rng.randrange(1, 23) for _ in range(160)], None, 1)
    steps = 0
    while long in house.live:
        for _ in range(5):
            house.admit([house.rng.randrange(1, 23) for _ in range(9)], None, 1)
        house.step()
        steps += 1
    assert steps <= 160 / 16


def test_the_last_seat_is_kept_for_the_first_in_the_queue() -> None:
    house = House(Seats(2, 16, 4), num_pages=1000, rng=random.Random(3))
    first, second = (house.admit([house.rng.randrange(1, 23) for _ in range(100)], None, 3) for _ in range(2))
    house.step()
    short = house.admit([1, 2, 3], None, 3)
    while first in house.live:
        ids = {piece.sequence.id for piece in house.step()}
        assert short not in ids
    assert second in {s.id for s in house.scheduler.running}


def test_pages_that_the_first_in_the_queue_needs_are_not_given_away() -> None:
    house = House(Seats(8, 32, 4), num_pages=60, rng=random.Random(3))
    house.admit([house.rng.randrange(1, 23) for _ in range(150)], None, 3)
    first = house.admit([house.rng.randrange(1, 23) for _ in range(80)], None, 3)
    house.step()
    short = house.admit([house.rng.randrange(1, 23) for _ in range(12)], None, 3)
    assert house.pages.num_free == 22  # enough for either, not for both
    while house.live[first][0] in house.scheduler.waiting:
        ids = {piece.sequence.id for piece in house.step()}
        assert short not in ids or first in ids
    house.drain()


def test_preemption_takes_the_youngest_and_keeps_its_tokens() -> None:
    house = House(Seats(4, 64, 4), num_pages=8, rng=random.Random(7), reuse=False)
    prompts = [[token] * 11 for token in range(1, 23)]
    endless = [p for p in prompts if len(true_answer(p, None, 20, causal_values)) == 20]
    old, young = (house.admit(prompt, None, 20) for prompt in endless[:2])
    while not house.scheduler.num_preemptions:
        house.step()
    victim = house.live[young][0]
    assert victim in house.scheduler.waiting
    assert len(victim.tokens) > 11
    assert house.live[old][0] in house.scheduler.running
    house.drain()


def test_a_whole_prompt_that_is_equal_is_reused_in_a_two_way_family() -> None:
    house = House(SCENES[5], num_pages=40, rng=random.Random(1))
    for _ in range(2):
        house.admit(list(range(1, 20)), None, 2)
        house.drain()
    assert (house.num_cached, house.num_tails) == (18, 1)
    house.admit([*range(1, 19), 7], None, 2)
    house.drain()
    assert house.num_cached == 18


def test_of_an_equal_prompt_only_the_last_token_is_computed_again() -> None:
    for length in (1, 4, 5, 16, 17, 19):
        house = House(Seats(8, 64, 4), num_pages=40, rng=random.Random(1))
        prompt = [token + 1 for token in range(length)]
        house.admit(prompt, None, 3)
        house.drain()
        house.admit(prompt, None, 3)
        assert [(piece.start, piece.stop) for piece in house.step()] == [(length - 1, length)]
        house.drain()


def test_the_end_of_a_prompt_is_found_while_its_answer_goes_on_and_after_the_page_is_full() -> None:
    house = House(Seats(8, 64, 4), num_pages=40, rng=random.Random(1))
    prompt = next(p for t in range(1, 23) if len(true_answer(p := [t] * 6, None, 30, causal_values)) == 30)
    first = house.admit(prompt, None, 30)
    for num_steps in (2, 5):
        for _ in range(num_steps):
            house.step()
        assert first in house.live
        house.admit(prompt, None, 2)
        assert min(piece.stop - piece.start for piece in house.step()) == 1
    assert house.num_tails == 2
    house.drain()


def test_what_a_failed_request_wrote_is_not_found_again() -> None:
    house = House(Seats(8, 64, 4), num_pages=40, rng=random.Random(1))
    name = house.admit([1, 2, 3, 4, 5, 6], None, 20)
    house.step()
    house.pages.forget(house.live[name][0].pages)
    house.end(name)
    house.admit([1, 2, 3, 4, 5, 6], None, 2)
    assert [(piece.start, piece.stop) for piece in house.step()] == [(0, 6)]
    house.drain()


# ---- several answers to one prompt


def test_equal_prompts_that_meet_are_computed_once() -> None:
    house = House(Seats(8, 64, 4), num_pages=60, rng=random.Random(2))
    prompt = [token + 1 for token in range(18)]
    names = [house.admit(prompt, None, 12, seed) for seed in range(5)]
    first = house.step()
    assert [(piece.start, piece.stop) for piece in first] == [(0, 18)]
    assert (house.num_forks, house.num_copies) == (4, 4)
    second = house.step()
    assert {(piece.sequence.id, piece.num_tokens) for piece in second} == {(n, 1) for n in names if n in house.live}
    running = house.scheduler.running
    assert len({tuple(s.pages[:4]) for s in running}) == 1
    assert len({s.pages[4] for s in running}) == len(running)
    house.drain()


def test_a_prompt_that_ends_with_a_page_needs_no_copy() -> None:
    house = House(Seats(8, 64, 4), num_pages=60, rng=random.Random(2))
    for seed in range(3):
        house.admit([token + 1 for token in range(16)], None, 12, seed)
    house.step()
    assert (house.num_forks, house.num_copies) == (2, 0)
    house.drain()


def test_followers_without_a_seat_wait_and_lose_nothing() -> None:
    house = House(Seats(2, 64, 4), num_pages=60, rng=random.Random(2))
    for seed in range(5):
        house.admit([token + 1 for token in range(18)], None, 12, seed)
    house.step()
    assert len(house.scheduler.running) <= 2
    assert all(len(s.tokens) == 19 for s in house.scheduler.waiting)
    house.drain()


def test_an_older_request_gets_the_seat_that_a_follower_would_take() -> None:
    house = House(Seats(2, 16, 4), num_pages=60, rng=random.Random(2))
    prompt = [token + 1 for token in range(30)]
    house.admit(prompt, None, 12)
    long = house.admit([7] * 60, None, 12)
    follower = house.admit(prompt, None, 12, seed=1)
    while long in house.live and house.live[long][0] in house.scheduler.waiting:
        house.step()
        assert follower not in {s.id for s in house.scheduler.running}
    house.drain()


@pytest.mark.parametrize("num_steps", [0, 1])
def test_when_the_leader_leaves_another_leads(num_steps: int) -> None:
    house = House(Seats(4, 8, 4), num_pages=60, rng=random.Random(2))
    prompt = [token + 1 for token in range(18)]
    leader, heir, other = (house.admit(prompt, None, 6, seed) for seed in range(3))
    for _ in range(num_steps):
        house.step()
    house.end(leader)
    assert house.live[heir][0].followers == [house.live[other][0]]
    first = house.step()
    assert {piece.sequence.id for piece in first} == {heir}
    assert first[0].start == 8 * num_steps  # what was computed is found again
    house.drain()


def test_a_fork_that_shares_a_page_still_written_to_is_caught() -> None:
    """Planted: a fork that takes its leader's last page instead of a copy."""
    house = House(Seats(8, 64, 4), num_pages=60, rng=random.Random(2))
    for seed in range(3):
        house.admit([token + 1 for token in range(18)], None, 12, seed)
    fork = house.scheduler.fork

    def sharing(follower: Sequence, token: int) -> tuple[int, int] | None:
        source, target = fork(follower, token) or (0, 0)
        follower.pages[-1] = source
        house.pages.release([target])
        house.pages.take([source])
        return None

    house.scheduler.fork = sharing  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="still written to"):
        house.step()


# ---- guesses


def test_guesses_never_make_anybody_give_up_pages() -> None:
    house = House(Seats(4, 64, 4), num_pages=12, rng=random.Random(7), reuse=False)
    endless = [p for p in ([token] * 7 for token in range(1, 23)) if len(true_answer(p, None, 16, causal_values)) == 16]
    for prompt in endless[:2]:
        house.admit(prompt, None, 16)
    house.step()
    house.step()
    before = {s: list(s.pages) for s in house.scheduler.running}
    for sequence in house.scheduler.running:
        sequence.drafts = [1] * 6
    house.scheduler.plan()
    assert house.scheduler.num_preemptions == 0
    assert all(s.pages[: len(pages)] == pages for s, pages in before.items())
    assert house.pages.num_free >= 0


def test_right_guesses_save_steps() -> None:
    counts = []
    for guesses in (False, True):
        house = House(Seats(4, 64, 4), num_pages=60, rng=random.Random(3))
        prompt = next(p for p in ([t] * 9 for t in range(1, 23)) if len(true_answer(p, None, 20, causal_values)) == 20)
        house.admit(prompt, None, 20)
        while house.live:
            if guesses and house.scheduler.running:
                (sequence,) = house.scheduler.running
                answer = true_answer(prompt, None, 20, causal_values)
                sequence.drafts = answer[sequence.num_tokens - 9 :][:4]
                sequence.drafts = sequence.drafts[: 20 - (sequence.num_tokens - 9) - 1]
                house.guess = lambda: None  # type: ignore[method-assign]
            house.step()
        counts.append(house.num_steps)
    assert counts == [20, 5]
