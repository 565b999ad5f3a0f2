"""A Generator behind HTTP: any server that speaks the OpenAI API (ours, vLLM, SGLang, llama.cpp, a provider).

Knows requests, retries and what servers answer; nothing about questions or scores.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.from_thread
import httpx

from pingjia.chat.tools import as_row, linked
from pingjia.errors import RequestError, UserError
from pingjia.remote import complaint, is_loopback, parse_url, retry_after_s, shorten
from pingjia.types import Completion, FinishReason, Prompt, Sampling, Usage

RETRIED = (429, 502, 503, 504)
MAX_WAIT_S = 60.0  # a server that asks for more is not worth waiting for
_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "tool_calls": "stop",
    "length": "length",
    "cancelled": "cancelled",
    "abort": "cancelled",
}
# OpenAI's own fields are always sent; the others only where a caller set them, as providers refuse unknown fields.
_EXTENSIONS = (
    "top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids", "min_tokens", "include_stop_str_in_output",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Job:
    path: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Retry:
    """A failure worth another try: why, and how long the server asked to wait (None: it did not say)."""

    reason: str
    wait_s: float | None = None


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server. `base_url` is what its clients use, usually ending in /v1.

    At most `max_concurrency` requests run at once. 429, 502, 503, 504 and broken connections are tried again up to
    `max_retries` times, after Retry-After or an exponential backoff from `backoff_s`. `api_key` is sent as a bearer
    token and never printed. Raises UserError for a URL that is not http(s).
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    max_concurrency: int = 4
    max_retries: int = 4
    backoff_s: float = 0.5
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        parse_url(self.base_url)
        if self.max_concurrency < 1 or self.max_retries < 0:
            raise UserError("an endpoint needs max_concurrency of at least 1 and max_retries of at least 0")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("the API key holds characters that no HTTP header can carry; copy it again")

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answer every prompt, in order; `on_done` is called in the caller's thread.

        Token ids are not known over this API, so `Completion.token_ids` is empty. Raises UserError when the server
        cannot be reached or refuses; the requests still running are then dropped. RequestError for logprobs.
        """
        jobs = [self._job(prompt, one) for prompt, one in _paired(prompts, sampling)]
        if not jobs:
            return []
        # The event loop runs in a thread of its own, so this works inside a notebook's running loop too.
        with (
            anyio.from_thread.start_blocking_portal() as portal,
            portal.wrap_async_context_manager(self._client()) as client,
        ):
            gate = portal.call(anyio.Semaphore, self.max_concurrency)
            futures = {portal.start_task_soon(self._ask, client, gate, job): i for i, job in enumerate(jobs)}
            return _collect(futures, on_done)

    def _client(self) -> httpx.AsyncClient:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return httpx.AsyncClient(
            base_url=self.base_url.rstrip("/") + "/",
            headers=headers,
            timeout=httpx.Timeout(self.timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=self.max_concurrency),
            # A proxy for the internet must not be asked for a server on this machine.
            trust_env=not is_loopback(httpx.URL(self.base_url).host),
        )

    def _job(self, prompt: Prompt, sampling: Sampling) -> _Job:
        body = {"model": self.model, "stream": False, **_sampling_fields(sampling)}
        if isinstance(prompt, str):
            return _Job("completions", {**body, "prompt": prompt})
        messages = [as_row(message) for message in linked(prompt)]
        return _Job("chat/completions", {**body, "messages": messages})

    async def _ask(self, client: httpx.AsyncClient, gate: anyio.Semaphore, job: _Job) -> Completion:
        async with gate:
            for attempt in range(self.max_retries):
                found = await self._try(client, job)
                if isinstance(found, Completion):
                    return found
                await anyio.sleep(self._wait_s(found, attempt))
            last = await self._try(client, job)
        if isinstance(last, Completion):
            return last
        tries = "1 try" if not self.max_retries else f"{self.max_retries + 1} tries"
        raise UserError(f"{self.base_url}: {last.reason} ({tries}); is the server up, and is this its address?")

    async def _try(self, client: httpx.AsyncClient, job: _Job) -> Completion | _Retry:
        try:
            response = await client.post(job.path, content=json.dumps(job.body))  # ASCII: any text can be sent
        except httpx.TimeoutException as e:
            return _Retry(f"no answer within {self.timeout_s:g} s ({type(e).__name__})")
        except httpx.RequestError as e:
            return _Retry(f"not reachable ({e or type(e).__name__})")
        if response.status_code in RETRIED:
            reason = f"answers {response.status_code}: {complaint(response, self.api_key)}"
            return _Retry(reason, retry_after_s(response))
        if response.status_code != 200:
            raise UserError(self._refusal(response))
        return self._completion(response, job)

    def _wait_s(self, retry: _Retry, attempt: int) -> float:
        if retry.wait_s is None:
            backoff = min(self.backoff_s * 2**attempt, MAX_WAIT_S)
            return backoff * random.uniform(0.5, 1.0)  # noqa: S311  spreads clients; not a secret
        if retry.wait_s > MAX_WAIT_S:
            raise UserError(
                f"{self.base_url}: {retry.reason}; it asks to wait {retry.wait_s:.0f} s, more than {MAX_WAIT_S:.0f}: "
                "try later or lower max_concurrency"
            )
        return retry.wait_s

    def _refusal(self, response: httpx.Response) -> str:
        status = response.status_code
        hints = {
            401: "check the API key",
            403: "check the API key",
            404: f"check that model {self.model!r} is served there and that the URL ends as its clients use it (/v1)",
        }
        hint = hints.get(status, "the server did not accept the request")
        return f"{self.base_url}: answers {status}: {complaint(response, self.api_key)}; {hint}"

    def _completion(self, response: httpx.Response, job: _Job) -> Completion:
        try:
            data = response.json()
            choice = data["choices"][0]
            text = choice["message"]["content"] if "messages" in job.body else choice["text"]
            return Completion(
                text=text or "",  # null where the model only called a tool
                token_ids=(),
                finish_reason=_FINISH.get(choice.get("finish_reason") or "stop", "error"),
                usage=_usage(data.get("usage") or {}),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
            raise UserError(
                f"{self.base_url}: the answer is not in OpenAI's format ({type(e).__name__}: {e}): "
                f"{shorten(response.text)}; is this the address of a model server?"
            ) from None


def _paired(prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None) -> list[tuple[Prompt, Sampling]]:
    each = [sampling or Sampling()] * len(prompts) if sampling is None or isinstance(sampling, Sampling) else sampling
    if len(each) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts but {len(each)} samplings; give one, or one each", param="sampling")
    return list(zip(prompts, each, strict=True))


def _sampling_fields(sampling: Sampling) -> dict[str, Any]:
    if sampling.logprobs is not None:
        raise RequestError("logprobs need token ids, which an HTTP endpoint does not give; ask the engine itself")
    if sampling.n > 1:
        raise RequestError("n: an HTTP endpoint is asked for one answer at a time here; give the prompt n times")
    if sampling.grammar is not None:
        raise RequestError("grammar: servers name the form of an answer differently; ask the engine itself")
    standard = ("max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty")
    fields: dict[str, Any] = {name: getattr(sampling, name) for name in standard}
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): value for token, value in dict(sampling.logit_bias).items()}
    default = Sampling()
    changed = [name for name in _EXTENSIONS if getattr(sampling, name) != getattr(default, name)]
    return {**fields, **{name: getattr(sampling, name) for name in changed}}


def _collect(
    futures: Mapping[Future[Completion], int], on_done: Callable[[int, Completion], None] | None
) -> list[Completion]:
    done: dict[int, Completion] = {}
    try:
        for future in as_completed(futures):
            index = futures[future]
            done[index] = future.result()
            if on_done is not None:
                on_done(index, done[index])
    except BaseException:
        for future in futures:
            future.cancel()  # closes the connection: the server stops computing an answer nobody reads
        raise
    return [done[i] for i in range(len(futures))]


def _usage(raw: Mapping[str, Any]) -> Usage:
    details = raw.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=int(raw.get("prompt_tokens") or 0),
        completion_tokens=int(raw.get("completion_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
    )
