"""A tokenizer whose tokens are bytes and a backend that says what it is told, for tests of the gateway alone."""

from __future__ import annotations

import asyncio
import codecs
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pingjia.chat.tokenizer import as_messages, check_text
from pingjia.types import Chunk, Encoded, EngineStats, Example, Message, ModelCard, Request, TokenLogprob, Usage

BOS, EOS, FIRST_BYTE = 1, 2, 3


class ByteTokenizer:
    """Token id = byte + 3. `render_s` makes rendering slow; `threads` records where it happened."""

    family = "hf"
    vocab_size = 256 + FIRST_BYTE
    pad_id = 0
    stop_ids = frozenset({EOS})
    template_digest = "0" * 64

    def __init__(self) -> None:
        self.render_s = 0.0
        self.threads: list[str] = []

    def encode(self, text: str) -> list[int]:
        check_text(text, "text")
        return [b + FIRST_BYTE for b in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - FIRST_BYTE for i in ids if i >= FIRST_BYTE).decode("utf-8", "replace")

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[str | Mapping[str, Any]] = (),
    ) -> list[int]:
        self.threads.append(threading.current_thread().name)
        time.sleep(self.render_s)
        turns = "".join(f"{m.role}: {m.text}\n" for m in as_messages(messages))
        listed = "".join(f"tool: {tool}\n" for tool in tools)
        return [BOS, *self.encode(listed + turns + "assistant: " * add_generation_prompt)]

    def render_text(self, text: str) -> list[int]:
        check_text(text, "prompt", "prompt")
        return [BOS, *self.encode(text)]

    def encode_example(self, example: Example) -> Encoded:
        raise AssertionError("the gateway never trains")

    def save(self, directory: Path) -> None:
        raise AssertionError("the gateway never saves")

    def stream(self) -> ByteDecoder:
        return ByteDecoder()

    def special_text(self, token: int) -> str | None:
        return {BOS: "<s>", EOS: "</s>"}.get(token)


class ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(bytes(i - FIRST_BYTE for i in ids if i >= FIRST_BYTE))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


@dataclass
class Script:
    """What the backend does with every request. `*_after` counts tokens; None: never."""

    text: str | Callable[[Request], str] = "你好, world"
    held: bool = False  # nothing comes until a test sets this back
    first_s: float = 0.0
    token_s: float = 0.0
    raise_after: int | None = None
    error: Exception | None = None
    freeze_after: int | None = None
    end_after: int | None = None  # the iterator simply stops
    finish: str | None = None  # instead of "stop" or "length"
    error_text: str | None = None


@dataclass
class FakeBackend:
    """Streams the script's text byte by byte and remembers what happened to each request."""

    script: Script = field(default_factory=Script)
    cards: list[ModelCard] = field(
        default_factory=lambda: [
            ModelCard("base", "/models/base", None, 4096, 1_700_000_000),
            ModelCard("shop", "/adapters/shop", "base", 4096, 1_700_000_001),
        ]
    )
    ready: bool = True
    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    running: int = 0
    max_running: int = 0
    num_tokens: int = 0

    def reset(self) -> None:
        self.script, self.ready = Script(), True
        self.requests, self.cancelled = [], []
        self.max_running = self.num_tokens = 0

    def models(self) -> list[ModelCard]:
        return self.cards

    def is_ready(self) -> bool:
        return self.ready

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self.running, kv_tokens_used=25, kv_tokens_total=100, generation_tokens_total=self.num_tokens
        )

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        self.requests.append(request)
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        ended = False  # closing the iterator at its last chunk cancels nothing
        try:
            async for chunk in self._play(self.script, request):
                ended = chunk.finish_reason is not None
                yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += [] if ended else [request.id]
            raise
        finally:
            self.running -= 1

    async def _play(self, script: Script, request: Request) -> AsyncIterator[Chunk]:
        text = script.text if isinstance(script.text, str) else script.text(request)
        cut = min((i for stop in request.sampling.stop if (i := text.find(stop)) >= 0), default=len(text))
        ids = [b + FIRST_BYTE for b in text[:cut].encode()]
        finish = "stop" if len(ids) < request.sampling.max_tokens else "length"
        ids = ids[: request.sampling.max_tokens]
        decoder = ByteDecoder()
        while script.held:
            await asyncio.sleep(0.005)
        await asyncio.sleep(script.first_s)
        for i, token in enumerate(ids):
            if i == script.raise_after:
                raise script.error or RuntimeError("secret detail of the backend")
            if i == script.freeze_after:
                await asyncio.Event().wait()
            if i == script.end_after:
                return
            await asyncio.sleep(script.token_s)
            self.num_tokens += 1
            yield Chunk(decoder.feed([token]), (token,), self._logprobs(request, token))
        usage = Usage(len(request.prompt_ids), len(ids), cached_tokens=1)
        yield Chunk(decoder.flush(), finish_reason=script.finish or finish, usage=usage, error=script.error_text)

    @staticmethod
    def _logprobs(request: Request, token: int) -> tuple[TokenLogprob, ...]:
        if request.sampling.logprobs is None:
            return ()
        top = [(token, -0.5), (FIRST_BYTE + ord("z"), float("-inf"))][: request.sampling.logprobs]
        return (TokenLogprob(token, -0.5, tuple(top)),)
