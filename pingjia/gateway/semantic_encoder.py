"""Sentence vectors from a child process, so that this one never loads torch and its event loop never waits for it.

A child and not onnxruntime: any encoder directory works as it is, without an export, and a child that dies or swells
takes nothing with it. Not here: what the vectors are compared for (`semantic.py`).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np  # only an encoder in use needs it

log = logging.getLogger("pingjia.gateway")

_ANSWER_S = 2.0
_START_S = 120.0
_AGAIN_S = 30.0
_LINE_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Meanings:
    """vectors_NH: one of unit length per text. unknown_N: the share of each text that the encoder does not know."""

    vectors_NH: np.ndarray
    unknown_N: tuple[float, ...]


class MeaningEncoder(Protocol):
    """Texts -> vectors, without holding up the event loop."""

    async def encode(self, texts: Sequence[str]) -> Meanings | None:
        """None when there is no answer now; whoever asked goes on without."""
        ...

    async def close(self) -> None: ...


class ChildEncoder:
    """`python -m pingjia.models.vectors DIRECTORY`, started with the first question and again after it died."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._starting: asyncio.Task[None] | None = None
        self._not_before = 0.0

    async def encode(self, texts: Sequence[str]) -> Meanings | None:
        if self._process is None:
            self._begin()
            return None
        try:
            async with asyncio.timeout(_ANSWER_S), self._turn:
                return await self._ask(self._process, texts)
        except (OSError, TimeoutError, ValueError, KeyError, AttributeError) as e:
            log.warning("the encoder of the semantic cache fails (%s); it is started again", e or type(e).__name__)
            await self._end()
            return None

    async def wait_ready(self) -> bool:
        """Start it if need be and wait until it answers; False when it cannot be had."""
        self._begin()
        if self._starting is not None:
            await self._starting
        return self._process is not None

    async def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._end()

    def _begin(self) -> None:
        is_starting = self._starting is not None and not self._starting.done()
        if self._process is None and not is_starting and time.monotonic() >= self._not_before:
            self._not_before = time.monotonic() + _AGAIN_S
            self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pingjia.models.vectors", self._directory,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_LINE_BYTES,
        )  # fmt: skip
        try:
            async with asyncio.timeout(_START_S):
                told = await _read(process)
            if "error" in told:
                raise ValueError(told["error"])
        except (OSError, TimeoutError, ValueError) as e:
            log.error("the semantic cache has no encoder: %s", e or f"nothing came within {_START_S:g} s")
            await _kill(process)
        except BaseException:
            await _kill(process)
            raise
        else:
            self._process = process

    async def _ask(self, process: asyncio.subprocess.Process, texts: Sequence[str]) -> Meanings:
        assert process.stdin is not None
        process.stdin.write(json.dumps(list(texts)).encode() + b"\n")
        await process.stdin.drain()
        told = await _read(process)
        import numpy as np

        flat = np.frombuffer(base64.b64decode(told["vectors"]), np.float32)
        return Meanings(flat.reshape(len(texts), told["size"]), tuple(told["unknown"]))

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await _kill(process)


async def _read(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise ValueError("the process ended")
    document: dict[str, Any] = json.loads(line)
    return document


async def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
