"""The engine: accepts requests, and in each step moves all of them on. What it is made of is in the files around.

Every accepted request ends exactly once: its last chunk, and only that, has a finish_reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import random
import threading
import time
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from enum import Enum
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pingjia.chat import Tokenizer, load_tokenizer
from pingjia.engine import sequence as sequences
from pingjia.engine.answer import Answer
from pingjia.engine.backend import choose_backend
from pingjia.engine.completions import Completions, OnDone
from pingjia.engine.draft import Drafter, agreed
from pingjia.engine.driver import Box, Driver, News
from pingjia.engine.grammar import DeadEnd, Grammars
from pingjia.engine.kv import LayerShape, free_bytes
from pingjia.engine.likelihood import as_ids, groups, likelihoods_of
from pingjia.engine.limits import Limits, resolve
from pingjia.engine.live import Live, Outcome, Rows, drafts_in_place
from pingjia.engine.pages import PageAllocator
from pingjia.engine.prompts import Prompts, as_requests
from pingjia.engine.runner import probe
from pingjia.engine.sample import Pick, Sampler, pick
from pingjia.engine.scheduler import Scheduler, Seats
from pingjia.engine.sequence import Slice
from pingjia.engine.served import AdapterLimits, Base, Served
from pingjia.engine.settings import EngineSettings
from pingjia.errors import ModelError, PromptTooLong, RequestError
from pingjia.models import Family, family_of, load_model, max_model_len, use_packed_attention
from pingjia.types import Chunk, Completion, EngineStats, Likelihood, ModelCard, Prompt, Request, Sampling, Usage

_log = logging.getLogger(__name__)
# Guesses fill a step up to so many rows, in which reading the weights still takes most of the time; with more answers
# than this the few guesses left for each brought nothing.
_CHEAP_ROWS, _MOST_GUESSING = 16, 4


class Default(Enum):
    """The value of an argument that was not given, where None has a meaning of its own."""

    ADAPTER = "the engine's own adapter, else the base"


class Engine:
    """A model that answers many requests at once (pingjia.types.Generator). Safe to use from several threads.

    model: a directory, .gguf file or packaged name, or a loaded network, which the engine then takes over (its own
    `generate` no longer works); a loaded network needs `tokenizer`. adapter: a PEFT directory that `generate` and
    `stream` use unless told otherwise. bits, dtype, device: as in pingjia.models.load_model.
    Raises ModelError, or RecipeError when the settings cannot be kept.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        adapter: str | Path | None = None,
        bits: int | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        tokenizer: Tokenizer | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        settings = settings or EngineSettings()
        if isinstance(model, PreTrainedModel):
            base = _given(model, tokenizer)
        else:
            base = _loaded(model, tokenizer, dtype=dtype, device=device, bits=bits)
        self.tokenizer = base.tokenizer
        self._family, self._config = family_of(base.model), base.model.config
        use_packed_attention(base.model.eval())
        layers, self._vocab_size = probe(base.model, self._family, self.tokenizer.render_text("1"))
        backend = choose_backend(base.model, self._family, settings, layers)
        self.limits = _limits(settings, base.model, backend.layers)
        num_pages = self.limits.kv_cache_tokens // settings.page_size
        self._page_size = settings.page_size
        self._pages = PageAllocator(num_pages, reuse=settings.prefix_caching)
        self._scheduler = Scheduler(_seats(settings, self._family), self._pages)
        self._pool = backend.pool(num_pages)
        limits = AdapterLimits(settings.max_loras, settings.max_lora_rank)
        self._served = Served(base, self.limits.max_model_len, limits)
        self._grammars = Grammars(self.tokenizer, self._vocab_size)
        self._runner = backend.runner(self._pool, self._served.rows)
        self._seeds = random.Random(settings.seed)  # noqa: S311  not a secret
        self._live: dict[str, Live] = {}
        self._boxes: dict[str, Box] = {}
        self._outbox: list[News] = []
        self._arrivals = itertools.count()
        self._own_ids = map("embedded-{}".format, itertools.count())  # unlike a generator, safe between threads
        self._lock = threading.RLock()
        self._driver = Driver(self)
        self._stats = EngineStats(kv_tokens_total=self.limits.kv_cache_tokens)
        self._last_step_at = time.monotonic()
        self._looks_up = settings.prompt_lookup == "auto"
        self.num_guesses = self.num_right_guesses = 0
        self.step_tokens: dict[str, int] = {}
        """Tokens computed for each request in the latest step."""
        self.default_adapter: str | None = None
        if adapter is not None:
            self.default_adapter = Path(adapter).resolve().name
            self.load_adapter(self.default_adapter, adapter)

    # ---- answering in the caller's own thread

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        on_done: OnDone | None = None,
        adapter: str | Default | None = Default.ADAPTER,
    ) -> list[Completion]:
        """Answer every prompt, in order; `on_done(index, completion)` is called as each one ends.

        prompts: strings (continued as they are) or conversations (through the chat template); a single one of either
        counts as one prompt. With `n` in a sampling its answers come one after the other. adapter: a served name, None
        for the base; by default the engine's own, else the base.
        Raises RequestError before anything is computed, EngineError at the end when an answer failed.
        """
        requests = self._requests(prompts, sampling, adapter)
        answers = Completions(requests, on_done)
        for request_id, chunk in self._follow(requests):
            answers.take(request_id, chunk)
        return answers.all()

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, *, adapter: str | Default | None = Default.ADAPTER
    ) -> Iterator[Chunk]:
        """Yield the answer to one prompt piece by piece; the last chunk has `finish_reason`. Closing it cancels.

        With `n` in the sampling, chunks say by their `index` which answer they belong to, and each has a last one.
        """
        requests = self._requests([prompt], sampling, adapter)
        for request_id, chunk in self._follow(requests):
            yield _placed(request_id, chunk, requests)

    def likelihoods(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        *,
        with_end: bool = True,
        on_done: Callable[[int, Likelihood], None] | None = None,
        adapter: str | Default | None = Default.ADAPTER,
    ) -> list[Likelihood]:
        """How likely each answer is after its prompt (pingjia.types.Scorer); requests that run wait for each of them.

        Raises RequestError for one that is empty or does not fit.
        """
        name = self.default_adapter if isinstance(adapter, Default) else adapter
        asked = [as_ids(p, a, self.tokenizer, with_end=with_end) for p, a in zip(prompts, answers, strict=True)]
        found: list[Likelihood] = []
        for prompt_ids, its_answers in groups(asked):
            for one in self._likelihoods(prompt_ids, its_answers, name):
                found.append(one)
                if on_done is not None:
                    on_done(len(found) - 1, one)
        return found

    def _likelihoods(self, prompt_ids: list[int], answers: list[list[int]], adapter: str | None) -> list[Likelihood]:
        asked = Request("likelihood", tuple(prompt_ids), Sampling(max_tokens=len(answers[0])), adapter)
        num_tokens = len(prompt_ids) + len(answers[0])
        num_pages = -(-num_tokens // self._page_size)
        with self._lock:
            digest = self._check(asked)
            if num_pages > self._pages.num_free:
                raise RequestError(
                    f"{num_tokens} tokens do not fit beside the requests that run; ask when the engine is idle, or "
                    "raise engine.kv_cache_tokens",
                    param="answers",
                )
            pages = self._pages.allocate(num_pages)
            try:
                prefix_len = self._prefix_len(asked.prompt_ids)
                tokens = sequences.Sequence("", 0, list(prompt_ids), prefix_len=prefix_len, adapter=digest, pages=pages)
                return likelihoods_of(self._runner, tokens, answers)
            finally:
                self._pages.release(pages)

    # ---- answering in an event loop

    async def agenerate(
        self,
        prompts: Prompts,
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        on_done: OnDone | None = None,
        adapter: str | Default | None = Default.ADAPTER,
    ) -> list[Completion]:
        """`generate` for an event loop: the same promises; cancelling the task cancels the requests.

        Any number of tasks, loops and threads may ask at a time; one thread computes for all of them.
        """
        requests = await self._prepared(self._requests(prompts, sampling, adapter))
        answers = Completions(requests, on_done)
        async with aclosing(self._driver.follow(requests)) as news:
            async for request_id, chunk in news:
                answers.take(request_id, chunk)
        return answers.all()

    async def astream(
        self, prompt: Prompt, sampling: Sampling | None = None, *, adapter: str | Default | None = Default.ADAPTER
    ) -> AsyncGenerator[Chunk, None]:
        """`stream` for an event loop. Closing it (`contextlib.aclosing`) cancels before the next step."""
        requests = await self._prepared(self._requests([prompt], sampling, adapter))
        async with aclosing(self._driver.follow(requests)) as news:
            async for request_id, chunk in news:
                yield _placed(request_id, chunk, requests)

    async def _prepared(self, requests: list[Request]) -> list[Request]:
        if any(request.sampling.grammar for request in requests):
            await asyncio.to_thread(self.prepare, *(request.sampling for request in requests))
        return requests

    def _requests(
        self, prompts: Prompts, sampling: Sampling | Sequence[Sampling] | None, adapter: str | Default | None
    ) -> list[Request]:
        name = self.default_adapter if isinstance(adapter, Default) else adapter
        return as_requests(prompts, sampling, name, self.tokenizer, self._own_ids)

    def _follow(self, requests: list[Request]) -> Iterator[News]:
        """Add the requests, step until all have ended, yield their chunks on the way. Leaves none behind."""
        self.prepare(*(request.sampling for request in requests))
        box: Box = deque()
        unfinished = {request.id for request in requests}
        try:
            self.enter(requests, box)
            while unfinished:
                for request_id, chunk in self.advance(box):
                    if chunk.finish_reason is not None:
                        unfinished.discard(request_id)
                    yield request_id, chunk
        finally:
            self.leave(requests)

    def enter(self, requests: Sequence[Request], box: Box) -> None:
        """Accept all requests, or none and raise as `add` does; what comes for them goes to `box`."""
        with self._lock:
            for number, request in enumerate(requests):
                try:
                    self.add(request)
                except Exception:
                    self.leave(requests[:number])
                    raise
                self._boxes[request.id] = box

    def advance(self, box: Box) -> list[News]:
        """What is new for the box, after a step if another thread's has brought nothing."""
        with self._lock:
            if not box:
                self._route(self._step())
            news = list(box)
            box.clear()
            return news

    def leave(self, requests: Sequence[Request]) -> None:
        """Forget the requests; those that have not ended are cancelled."""
        with self._lock:
            for request in requests:
                if self._boxes.pop(request.id, None) is not None and request.id in self._live:
                    self._drop(self._live[request.id])

    # ---- requests, one by one

    def prepare(self, *samplings: Sampling) -> None:
        """Compile what `add` will need (grammars), without waiting for the step in progress.

        May be left out: then `add` does it, and the steps wait. Raises RequestError.
        """
        for grammar in {sampling.grammar for sampling in samplings if sampling.grammar}:
            self._grammars.matcher(grammar)

    def add(self, request: Request) -> None:
        """Accept a request; it joins at the next step.

        Raises RequestError (PromptTooLong with both numbers, ModelNotFound); then nothing has been accepted.
        """
        with self._lock:
            digest = self._check(request)
            prompt_ids = request.prompt_ids
            sequence = sequences.Sequence(
                request.id,
                next(self._arrivals),
                list(prompt_ids),
                root=self._root(digest, prompt_ids),
                prefix_len=self._prefix_len(prompt_ids),
                adapter=digest,
            )
            live = Live(request, sequence, *self._sayer(request))
            if self._looks_up and live.sampler.is_argmax and request.sampling.logprobs is None:
                live.drafter = Drafter()
            self._live[request.id] = live
            self._scheduler.add(sequence)

    def _sayer(self, request: Request) -> tuple[Sampler, Answer]:
        """What chooses the tokens of a request, and what makes chunks of them."""
        sampling, stop_ids = request.sampling, self.tokenizer.stop_ids
        seed = sampling.seed if sampling.seed is not None else self._seeds.getrandbits(63)
        matcher = self._grammars.matcher(sampling.grammar) if sampling.grammar else None
        sampler = Sampler(sampling, request.prompt_ids, seed, stop_ids=stop_ids, matcher=matcher)
        decoder = self._grammars.stream() if sampling.grammar else self.tokenizer.stream_answer()
        return sampler, Answer(sampling, stop_ids, decoder, len(request.prompt_ids))

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; that step reports its last chunk. Unknown and ended ids are no error."""
        with self._lock:
            live = self._live.get(request_id)
            if live is not None:
                self._drop(live)
                self._route([(request_id, live.answer.end("cancelled", live.num_cached))])

    def step(self) -> list[tuple[str, Chunk]]:
        """Compute one step; return what is new, by request id. Without work it returns at once.

        When the network fails, the requests of that step end with finish_reason "error" and the others go on.
        """
        with self._lock:
            self._route(self._step())
            news, self._outbox = self._outbox, []
            return news

    def has_work(self) -> bool:
        """Whether `step` would bring anything."""
        return bool(self._live or self._outbox)

    # ---- what is served

    def models(self) -> list[ModelCard]:
        """The base model, then the adapters."""
        return self._served.cards()

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt plus answer that one request may have."""
        return self.limits.max_model_len

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Serve the PEFT adapter in directory `path` as `name`, also while requests run.

        The same files again change nothing. Other files replace the old ones: requests that were accepted before end
        with the weights they began with, whose memory is then freed. Raises ModelError when it cannot be served as it
        is, or there are too many.
        """
        adapter = self._served.read(name, path)  # without the lock: steps go on meanwhile
        with self._lock:
            self._served.put(name, adapter)
            self._runner.adapters_changed()
            self._release_adapters()

    def unload_adapter(self, name: str) -> None:
        """Stop serving an adapter; requests that were accepted before end with it. Raises ModelNotFound."""
        with self._lock:
            self._served.unload(name)
            self._release_adapters()

    def _release_adapters(self) -> None:
        if self._served.release(live.sequence.adapter for live in self._live.values()):
            self._runner.adapters_changed()

    def stats(self) -> EngineStats:
        """A snapshot, taken without waiting for the step in progress."""
        return replace(
            self._stats,
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting,
            kv_tokens_used=self._pages.num_owned * self._page_size,
            seconds_since_step=time.monotonic() - self._last_step_at,
        )

    # ---- the heart

    def _step(self) -> list[tuple[str, Chunk]]:
        started, self.step_tokens = time.monotonic(), {}
        self._guess()
        plan = self._scheduler.plan()  # pure: who runs, how many tokens each
        if not plan:
            return []
        outcome = self._compute(plan)  # the only line that touches the device
        self._scheduler.commit(outcome.done)
        self._fork(outcome)
        self._count(plan, outcome, started)
        return [*self._report(outcome), *(self._fail(live, error) for live, error in outcome.broken)]

    def _guess(self) -> None:
        """Let greedy answers guess at their next tokens, as long as the step stays cheap."""
        decoding = [s for s in self._scheduler.running if s.remaining == 1 and s.num_tokens > s.num_prompt]
        room = _CHEAP_ROWS // len(decoding) - 1 if 0 < len(decoding) <= _MOST_GUESSING else 0
        for sequence in decoding:
            live = self._live[sequence.id]
            if live.drafter is not None:
                left = live.request.sampling.max_tokens - (sequence.num_tokens - sequence.num_prompt) - 1
                sequence.drafts = live.drafter.propose(sequence.tokens, min(room, left))

    @torch.inference_mode()
    def _compute(self, plan: list[Slice]) -> Outcome:
        """Run the plan and choose tokens; tell the slices that went well from those that did not."""
        try:
            self._pool.copy(self._scheduler.copies())
            with drafts_in_place(plan):
                logits = self._runner.run(plan)
            rows = Rows(plan, *self._runner.judge(logits))
            plain = [piece for piece in plan if rows.is_sound(piece) and not piece.num_drafts]
            speakers = [(rows.first[piece], live) for piece in plain for live in self._speakers(piece)]
            indices = [row for row, _ in speakers]
            used = logits if indices == list(range(len(logits))) else logits[indices]
            picks = pick(used, [live.sampler for _, live in speakers], [rows.best[row] for row in indices])
        except Exception as e:  # whatever a network, a kernel or the allocator raises must not end the engine
            _log.exception("a step of %d requests failed", len(plan))
            why = f"the engine failed: {type(e).__name__}: {_first_line(e)}"
            return Outcome(broken=[(self._live[piece.sequence.id], why) for piece in plan])
        return self._sorted_out(plan, rows, [live for _, live in speakers], picks)

    def _speakers(self, piece: Slice) -> list[Live]:
        """Who gets a token after this piece: its sequence, and at the end of a prompt all that follow it."""
        followers = piece.sequence.followers if piece.ends_prompt else []
        return [self._live[s.id] for s in (piece.sequence, *followers)] if piece.samples else []

    def _sorted_out(self, plan: list[Slice], rows: Rows, speakers: list[Live], picks: list[Pick | DeadEnd]) -> Outcome:
        outcome = Outcome()
        for live, picked in zip(speakers, picks, strict=True):
            if isinstance(picked, DeadEnd):
                outcome.broken.append((live, f"the answer cannot go on as its grammar wants: {picked}"))
            else:
                outcome.said.append((live, picked))
        tokens = {live.request.id: [picked.token_id] for live, picked in outcome.said}
        for piece in plan:
            live = self._live[piece.sequence.id]
            if not rows.is_sound(piece):
                outcome.broken.append((live, "the network's output is not a number for this request"))
                continue
            if piece.num_drafts:
                tokens[live.request.id] = self._say_agreed(live, piece, rows.chosen(piece), outcome)
            if live.request.id in tokens or not piece.samples:
                outcome.done.append((piece, tokens.get(live.request.id, [])))
        return outcome

    def _say_agreed(self, live: Live, piece: Slice, chosen: list[int], outcome: Outcome) -> list[int]:
        assert live.drafter is not None
        said = agreed(piece.sequence.drafts[: piece.num_drafts], chosen, live.answer.stop_ids)
        live.drafter.learn(piece.num_drafts, len(said) - 1)
        self.num_guesses += piece.num_drafts
        self.num_right_guesses += len(said) - 1
        outcome.said += [(live, Pick(token, ends=live.sampler.record(token))) for token in said]
        return said

    def _fork(self, outcome: Outcome) -> None:
        """Let followers go on by themselves, while the pages of their leaders are still there."""
        forks = [(live.sequence, picked.token_id) for live, picked in outcome.said if live.sequence.leader is not None]
        copies = [self._scheduler.fork(follower, token) for follower, token in forks]
        if any(copies):
            self._pool.copy([pair for pair in copies if pair])

    def _report(self, outcome: Outcome) -> Iterator[tuple[str, Chunk]]:
        for live, picked in outcome.said:
            if live.request.id not in self._live:
                continue  # it ended with an earlier token of this step
            try:
                chunk = live.answer.push(picked, live.num_cached)
            except Exception as e:  # a token id that the tokenizer cannot decode
                _log.exception("token %d of request %s cannot be decoded", picked.token_id, live.request.id)
                yield self._fail(live, f"token {picked.token_id} cannot be decoded: {e}")
                continue
            if chunk.finish_reason is not None:
                self._drop(live)
            yield live.request.id, chunk

    def _fail(self, live: Live, error: str) -> tuple[str, Chunk]:
        # What this step wrote is on pages of its own, from num_computed on; shared pages lie before.
        broken = live.sequence.pages[live.sequence.num_computed // self._page_size :]
        self._pages.forget(broken)
        self._pool.scrub(broken)
        self._drop(live)
        usage = Usage(live.sequence.num_prompt, live.sequence.num_tokens - live.sequence.num_prompt, live.num_cached)
        return live.request.id, Chunk(finish_reason="error", usage=usage, error=error)

    def _drop(self, live: Live) -> None:
        del self._live[live.request.id]
        self._scheduler.drop(live.sequence)
        adapter = live.sequence.adapter
        if adapter is not None and self._served.is_nameless(adapter):
            self._release_adapters()

    def _route(self, news: list[tuple[str, Chunk]]) -> None:
        for request_id, chunk in news:
            self._boxes.get(request_id, self._outbox).append((request_id, chunk))

    def _check(self, request: Request) -> str | None:
        """Refuse what could never be answered; return the adapter's digest."""
        ids, longest = request.prompt_ids, self.limits.max_model_len
        if request.id in self._live:
            raise RequestError(f"a request with id {request.id!r} is already running", param="id", code="duplicate_id")
        if request.sampling.n > 1:
            raise RequestError("n: a request is one answer; add one for each, with seeds of their own", param="n")
        if not ids:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise RequestError(f"prompt token ids must be 0 to {self._vocab_size - 1}", param="prompt")
        biased = max(dict(request.sampling.logit_bias), default=0)
        if biased >= self._vocab_size:
            raise RequestError(f"logit_bias: token {biased} is outside 0..{self._vocab_size - 1}", param="logit_bias")
        wanted = len(ids) + request.sampling.max_tokens
        if wanted > longest:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens and max_tokens is {request.sampling.max_tokens}: together {wanted}, "
                f"but a request may have {longest} here; shorten the prompt or lower max_tokens"
            )
        return self._served.digest(request.adapter)

    def _prefix_len(self, prompt_ids: tuple[int, ...]) -> int:
        try:
            return self._family.prefix_len(self._config, prompt_ids)
        except ModelError as e:  # ids that were not rendered for this family
            raise RequestError(str(e), param="prompt") from None

    def _root(self, digest: str | None, prompt_ids: tuple[int, ...]) -> bytes:
        """What a KV page depends on besides the tokens up to its end."""
        root = hashlib.sha256((digest or "").encode())
        if not self._family.causal_prompt:  # keys depend on later prompt tokens too: share for equal whole prompts only
            root.update(array("q", prompt_ids).tobytes())
        return root.digest()

    def _count(self, plan: list[Slice], outcome: Outcome, started: float) -> None:
        self.step_tokens = {piece.sequence.id: piece.num_tokens for piece in plan}
        seen = [*(self._live[piece.sequence.id] for piece in plan), *(live for live, _ in outcome.said)]
        fresh = {live.request.id: live for live in seen if not live.is_counted}.values()
        for live in fresh:
            live.is_counted = True
        now, old = time.monotonic(), self._stats
        self._stats = replace(
            old,
            prompt_tokens_total=old.prompt_tokens_total + sum(live.sequence.num_prompt for live in fresh),
            cached_tokens_total=old.cached_tokens_total + sum(live.num_cached for live in fresh),
            generation_tokens_total=old.generation_tokens_total + len(outcome.said),
            num_steps=old.num_steps + 1,
            compute_s_total=old.compute_s_total + now - started,
        )
        self._last_step_at = now


def _limits(settings: EngineSettings, model: PreTrainedModel, layers: dict[int, LayerShape]) -> Limits:
    return resolve(
        settings,
        model_len=max_model_len(model.config),
        bytes_per_token=sum(shape.bytes_per_token for shape in layers.values()),
        free_bytes=free_bytes(model.device),
    )


def _seats(settings: EngineSettings, family: Family) -> Seats:
    return Seats(settings.max_num_seqs, settings.max_num_batched_tokens, settings.page_size, family.causal_prompt)


def _given(model: PreTrainedModel, tokenizer: Tokenizer | None) -> Base:
    if tokenizer is None:
        raise ModelError("a loaded network needs its tokenizer: Engine(model, tokenizer=load_tokenizer(path))")
    root = model.config.name_or_path or model.config.model_type
    return Base(Path(root).name, root, model, tokenizer)


def _loaded(path: str | Path, tokenizer: Tokenizer | None, *, dtype: str, device: str, bits: int | None) -> Base:
    if not isinstance(path, str | Path):
        raise ModelError(
            f"a model is a path, a packaged name or a PreTrainedModel, not {type(path).__name__}; for a PEFT model "
            "give the base, and its directory as adapter=..."
        )
    model = load_model(path, dtype=dtype, device=device, bits=bits)
    name = Path(path).resolve().name if Path(path).exists() else str(path)
    return Base(name.removesuffix(".gguf"), str(path), model, tokenizer or load_tokenizer(path))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _placed(request_id: str, chunk: Chunk, requests: Sequence[Request]) -> Chunk:
    """The chunk with its place among the answers to one prompt."""
    if len(requests) == 1:
        return chunk
    return replace(chunk, index=[request.id for request in requests].index(request_id))
