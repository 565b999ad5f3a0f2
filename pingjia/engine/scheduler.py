"""Who runs in the next step, and how many tokens of each. Pure: knows neither torch nor text nor time.

Guarantees, each asserted by tests/engine/test_simulation.py:
- A new request joins at the next step; all running answers get one token per step, whatever prompts arrive.
- The oldest unfinished request is part of every step, so every request ends after finitely many.
- Pages are claimed by age: when they run out, the youngest is put back to wait. It loses time, never tokens.
- A prompt that is being computed is computed once, however many equal ones arrive meanwhile: they follow it, and go
  on from its pages with first tokens of their own (`fork`).
- A short prompt does not queue behind a flood of long ones (`_overtake`), and costs those at most half of each step.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from pingjia.engine.pages import PageAllocator
from pingjia.engine.sequence import Sequence, Slice

_BY_AGE = attrgetter("arrival")


@dataclass(frozen=True, slots=True)
class Seats:
    """What one step may hold. `causal_prompt` False: a prompt is computed whole, or not at all."""

    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    causal_prompt: bool = True


class Scheduler:
    """Two lists, both ordered by arrival: `running` own pages, `waiting` own none. Followers are in neither."""

    def __init__(self, seats: Seats, pages: PageAllocator) -> None:
        self.seats = seats
        self.pages = pages
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self._leading: dict[bytes, Sequence] = {}  # by prompt_key, until the first token of the answer
        self._num_following = 0
        self._plan: dict[Sequence, Slice] = {}
        self._copies: dict[Sequence, tuple[int, int]] = {}

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self._num_following

    def add(self, sequence: Sequence) -> None:
        """Accept a sequence. It must fit the pool alone with all it may generate: the engine has checked that."""
        leader = self._leading.get(sequence.prompt_key) if self.pages.reuse else None
        if leader is None:
            self._lead(sequence)
        else:
            self._follow(leader, sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence (finished, cancelled or failed) and give its pages back. Not between plan and commit."""
        if sequence.leader is not None:
            self._unfollow(sequence)
            return
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)
        self._end_leading(sequence)
        if sequence.followers:
            self._promote(sequence.followers)

    def _lead(self, sequence: Sequence) -> None:
        self._leading[sequence.prompt_key] = sequence
        bisect.insort(self.waiting, sequence, key=_BY_AGE)

    def _end_leading(self, sequence: Sequence) -> None:
        if self._leading.get(sequence.prompt_key) is sequence:
            del self._leading[sequence.prompt_key]

    def _follow(self, leader: Sequence, sequence: Sequence) -> None:
        sequence.leader = leader
        leader.followers.append(sequence)
        self._num_following += 1

    def _unfollow(self, sequence: Sequence) -> None:
        assert sequence.leader is not None
        sequence.leader.followers.remove(sequence)
        sequence.leader = None
        self._num_following -= 1

    def _promote(self, followers: list[Sequence]) -> None:
        """Let the first of those whose leader has gone lead the others."""
        first, *others = followers
        for sequence in (first, *others):
            self._unfollow(sequence)
        self._lead(first)
        for sequence in others:
            self._follow(first, sequence)

    def plan(self) -> list[Slice]:
        """Choose the next step: decodes first, then prompts by age within the token budget. Empty only when idle."""
        self._plan, self._copies = {}, {}
        self._decode()
        budget = max(self.seats.max_num_batched_tokens - sum(p.num_tokens for p in self._plan.values()), 1)
        self._prefill(budget - self._overtake(budget // 2))
        return list(self._plan.values())

    def copies(self) -> list[tuple[int, int]]:
        """Pages to copy, (from, to), before the plan is computed. All are to be read before any is written."""
        return list(self._copies.values())

    def commit(self, done: Iterable[tuple[Slice, list[int]]]) -> None:
        """Record what was computed: slices of the last plan, each with the tokens that follow it, if it samples.

        Of a slice with drafts these are the drafts that were right, and one more. A slice left out has failed. Its
        sequence must be dropped: its keys and values never become findable.
        """
        for piece, tokens in done:
            assert bool(tokens) == piece.samples
            assert len(tokens) <= piece.num_outputs
            if piece.ends_prompt:
                self._end_leading(piece.sequence)
                self._register_tail(piece.sequence)
            piece.sequence.tokens += tokens
            self._advance(piece, piece.stop - piece.num_drafts + max(len(tokens) - 1, 0))

    def fork(self, follower: Sequence, token: int) -> tuple[int, int] | None:
        """Let a follower go on from its leader's prompt with its own first token, right after that was committed.

        Full pages of the prompt are shared. Returns the page to copy, from and to, when the prompt ends inside one and
        there is room now; without room the follower waits like one that was put back.
        """
        leader, size = follower.leader, self.seats.page_size
        assert leader is not None
        self._unfollow(follower)
        follower.tokens.append(token)
        follower.num_cached = follower.num_prompt
        num_full, rest = divmod(follower.num_prompt, size)
        if not leader.pages or not self._has_spare_seat(follower, pages=bool(rest)):
            bisect.insort(self.waiting, follower, key=_BY_AGE)
            return None
        shared, fresh = leader.pages[:num_full], self.pages.allocate(bool(rest))
        self.pages.take(shared)
        follower.pages, follower.num_computed = shared + fresh, follower.num_prompt
        bisect.insort(self.running, follower, key=_BY_AGE)
        return (leader.pages[num_full], fresh[0]) if rest else None

    def _has_spare_seat(self, sequence: Sequence, pages: int) -> bool:
        """Whether a seat and pages are free that no older one waits for."""
        is_next = not self.waiting or self.waiting[0].arrival > sequence.arrival
        return is_next and len(self.running) < self.seats.max_num_seqs and self.pages.num_free >= pages

    def _advance(self, piece: Slice, stop: int) -> None:
        sequence, size = piece.sequence, self.seats.page_size
        first, last = sequence.num_computed // size, stop // size
        sequence.num_computed = stop
        keys = sequence.keys(last, size)
        for index in range(first, last):
            self.pages.register(sequence.pages[index], keys[index])

    def _register_tail(self, sequence: Sequence) -> None:
        index, count = sequence.tail(self.seats.page_size)
        if count:
            self.pages.register_tail(sequence.pages[index], sequence.tail_key(self.seats.page_size))

    def _find_tail(self, sequence: Sequence, num_shared: int) -> int | None:
        """The page that holds the rest of this prompt but for its last token, when all pages before are shared."""
        index, count = sequence.tail(self.seats.page_size)
        if not count or num_shared != index:
            return None
        return self.pages.find_tail(sequence.tail_key(self.seats.page_size))

    def _decode(self) -> None:
        for sequence in list(self.running):
            if sequence.remaining == 1 and sequence.pages and self._grow(sequence):
                self._give(sequence, 1)
        for sequence in [s for s in self._plan if s.drafts and s.num_tokens > s.num_prompt]:
            self._try_drafts(sequence)

    def _try_drafts(self, sequence: Sequence) -> None:
        """Let the step compute the drafts too, as far as pages are free: nobody makes room for guesses."""
        start, spare = sequence.num_computed, self.pages.num_free * self.seats.page_size
        room = len(sequence.pages) * self.seats.page_size + spare - sequence.num_tokens
        num_drafts = min(len(sequence.drafts), room)
        need = -(-(sequence.num_tokens + num_drafts) // self.seats.page_size) - len(sequence.pages)
        sequence.pages += self.pages.allocate(max(need, 0))
        self._plan[sequence] = Slice(sequence, start, start + 1 + num_drafts, samples=True, num_drafts=num_drafts)

    def _overtake(self, budget: int) -> int:
        """Serve prompts that fit `budget` whole though older ones wait; return the tokens given away.

        Whoever overtakes leaves the first in the queue a seat and its pages, so age still decides who gets those.
        """
        spent = 0
        for sequence in self._prefilling_by_age()[1:]:
            if spent + sequence.remaining > budget:
                continue
            if not sequence.pages and not self._admit_spare(sequence):
                break
            spent += self._give(sequence, sequence.remaining)
        return spent

    def _prefill(self, budget: int) -> None:
        for place, sequence in enumerate(self._prefilling_by_age()):
            if sequence in self._plan:
                continue
            if budget <= 0 or not (sequence.pages or self._admit(sequence)):
                break
            num_tokens = self._piece(sequence, budget, may_exceed=place == 0)
            if num_tokens == 0:
                break
            budget -= self._give(sequence, num_tokens)

    def _prefilling_by_age(self) -> list[Sequence]:
        prefilling = [s for s in self.running if s not in self._plan]
        return sorted(prefilling + self.waiting, key=_BY_AGE) if prefilling else list(self.waiting)

    def _piece(self, sequence: Sequence, budget: int, may_exceed: bool) -> int:
        """Tokens to compute now; 0 when a prompt that must go whole has to wait for a step with more room."""
        # GLM-1 attends both ways inside the prompt: keys depend on *later* prompt tokens too, so no part goes alone.
        indivisible = 0 if self.seats.causal_prompt else max(sequence.num_prompt - sequence.num_computed, 0)
        if indivisible > budget:
            return indivisible if may_exceed else 0
        return min(sequence.remaining, budget)

    def _give(self, sequence: Sequence, num_tokens: int) -> int:
        start, stop = sequence.num_computed, sequence.num_computed + num_tokens
        self._plan[sequence] = Slice(sequence, start, stop, samples=stop == sequence.num_tokens)
        return num_tokens

    def _admit_spare(self, sequence: Sequence) -> bool:
        """Admit a sequence out of turn, if the first in the queue could still be admitted after it."""
        first = self.waiting[0]
        if sequence is first:
            return self._admit(sequence)
        seats = self.seats.max_num_seqs - len(self.running)
        pages = self.pages.num_free - self._num_pages(first) - self._num_pages(sequence)
        return seats >= 2 and pages >= 0 and self._admit(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Seat a waiting sequence with pages for all its tokens, cached ones shared. False: it goes on waiting."""
        if len(self.running) >= self.seats.max_num_seqs:
            return False
        shared = self.pages.match(
            sequence.keys((sequence.num_tokens - 1) // self.seats.page_size, self.seats.page_size)
        )
        tail = self._find_tail(sequence, len(shared))
        self.pages.take(shared)
        need = self._num_pages(sequence) - len(shared)
        if not self._make_room(sequence, need):
            self.pages.release(shared)
            return False
        self._seat(sequence, shared, self.pages.allocate(need), tail)
        return True

    def _seat(self, sequence: Sequence, shared: list[int], fresh: list[int], tail: int | None) -> None:
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_BY_AGE)
        sequence.pages = shared + fresh
        sequence.num_computed = len(shared) * self.seats.page_size
        if tail is not None:
            # The allocator may just have given the tail's page away: it is copied before anything is written.
            self._copies[sequence] = (tail, fresh[0])
            sequence.num_computed = sequence.num_prompt - 1
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed

    def _grow(self, sequence: Sequence) -> bool:
        """Own the page of the next token. False: there is none, and the sequence now waits itself."""
        need = max(self._num_pages(sequence) - len(sequence.pages), 0)
        if not self._make_room(sequence, need):
            self._preempt(sequence)
            return False
        sequence.pages += self.pages.allocate(need)
        return True

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Have `count` pages free, preempting sequences younger than this one, youngest first, if that is enough."""
        younger = [s for s in self.running if s.arrival > sequence.arrival]
        if self.pages.num_free + sum(len(s.pages) for s in younger) < count:
            return False
        while self.pages.num_free < count and younger:
            self._preempt(younger.pop())
        return self.pages.num_free >= count

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._plan.pop(sequence, None)
        self._copies.pop(sequence, None)
        self.running.remove(sequence)
        self._release(sequence)
        bisect.insort(self.waiting, sequence, key=_BY_AGE)

    def _release(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages, sequence.num_computed = [], 0

    def _num_pages(self, sequence: Sequence) -> int:
        return -(-sequence.num_tokens // self.seats.page_size)
