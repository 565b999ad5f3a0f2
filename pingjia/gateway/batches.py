"""Batches: a file of requests, answered when there is room, into a file of answers. Each line is answered once.

Every line takes the way of any request (limits, cache, queue in the lowest rank, ledger). The state of a batch and its
answers lie on disk: whichever process holds the batch's lock goes on where the last one stopped. Not here: HTTP.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from pingjia.errors import Overloaded, RequestError
from pingjia.gateway import chat, completions
from pingjia.gateway.bodies import CompletionBody
from pingjia.gateway.errors import AnswerCancelled, JobNotFound, NotReady, QuotaExceeded, RateLimited, describe
from pingjia.gateway.files import FileStore, write_whole
from pingjia.gateway.keys import Key
from pingjia.gateway.service import Caller, Service
from pingjia.queue.protocol import QueueLost

log = logging.getLogger("pingjia.gateway")

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
MAX_LINES = 50_000
_WINDOW_S = 86_400
_AT_ONCE = 32  # lines of one batch in the queue: enough to keep workers busy, few enough to give way
_RESCAN_S = 5.0
_PAUSE_S = 1.0
_ID = re.compile(r"batch_[0-9a-f]{32}")
Status = Literal["validating", "in_progress", "completed", "failed", "expired", "cancelling", "cancelled"]
_OVER = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, slots=True)
class Batch:
    """All that is known of a batch; what is on disk. Times in whole seconds of the epoch."""

    id: str
    owner: str
    key: dict[str, Any]
    endpoint: str
    input_file_id: str
    output_file_id: str
    error_file_id: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    total: int = 0
    completed: int = 0
    failed: int = 0
    error: str = ""
    ended_at: int = 0
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.status in _OVER


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    custom_id: str | None
    body: Mapping[str, Any] | None
    fault: str = ""


class Batches:
    """Takes batches on, runs those that no other process runs, tells how they stand. Lives on the event loop."""

    def __init__(self, service: Service, files: FileStore, root: Path) -> None:
        self._service = service
        self._files = files
        self._root = root / "batches"
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._live: dict[str, Batch] = {}
        self._scanner: asyncio.Task[None] | None = None

    # ---- life

    async def start(self) -> None:
        """Go on with what was left unfinished, now and whenever another process leaves something."""
        self._scanner = asyncio.create_task(self._scan_always())

    async def close(self) -> None:
        """Stop; lines in work are begun again by whoever goes on."""
        tasks = [*self._runs.values(), *([self._scanner] if self._scanner else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- what clients ask

    def create(self, key: Key, input_file_id: str, endpoint: str, metadata: dict[str, str]) -> Batch:
        """Take a batch on. Raises JobNotFound for the file, RequestError, or OSError when the disk refuses."""
        if endpoint not in ENDPOINTS:
            raise RequestError(f"endpoint: {endpoint[:80]!r} takes no batches; use one of {', '.join(ENDPOINTS)}",
                               param="endpoint", code="invalid_value")  # fmt: skip
        record = self._files.find(input_file_id, key.owner)
        now = int(time.time())
        limits = key.model_dump(mode="json", exclude={"salt", "digest"})
        batch = Batch(
            f"batch_{uuid.uuid4().hex}", key.owner, limits, endpoint, record.id, self._files.new_id(),
            self._files.new_id(), now, now + _WINDOW_S, metadata=metadata,
        )  # fmt: skip
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._save(batch)
        self._begin(batch)
        return batch

    def find(self, batch_id: str, owner: str) -> Batch:
        """How it stands. Raises JobNotFound, also for another owner's."""
        batch = self._live.get(batch_id) or self._load(batch_id)
        if batch is None or batch.owner != owner:
            raise JobNotFound(f"no batch {batch_id[:80]!r}")
        return batch

    def of(self, owner: str) -> list[Batch]:
        """An owner's batches, the newest first."""
        found = (self._live.get(path.stem) or self._load(path.stem) for path in self._root.glob("batch_*.json"))
        return sorted((b for b in found if b and b.owner == owner), key=lambda b: (-b.created_at, b.id))

    def cancel(self, batch_id: str, owner: str) -> Batch:
        """Stop it; answers that are there stay. Whoever runs it looks for the mark once a second."""
        batch = self.find(batch_id, owner)
        if batch.is_over:
            return batch
        self._mark(batch_id).touch()
        return self._keep(replace(batch, status="cancelling"))

    # ---- running

    async def _scan_always(self) -> None:
        while True:
            for path in self._root.glob("batch_*.json"):
                batch = self._load(path.stem) if path.stem not in self._runs else None
                if batch is not None and not batch.is_over:
                    self._begin(batch)
            await asyncio.sleep(_RESCAN_S)

    def _begin(self, batch: Batch) -> None:
        if batch.id not in self._runs:
            task = self._runs[batch.id] = asyncio.create_task(self._run_locked(batch.id))
            task.add_done_callback(lambda _: self._runs.pop(batch.id, None))

    async def _run_locked(self, batch_id: str) -> None:
        with open(self._root / f"{batch_id}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another process runs it
            batch = self._load(batch_id)
            if batch is None or batch.is_over:
                return
            self._live[batch_id] = batch
            try:
                self._finish(await self._run(batch))
            except OSError as e:
                self._finish(replace(self._live[batch_id], status="failed", error=_refused(e)))
            except Exception:
                log.exception("batch %s", batch_id)
                self._finish(replace(self._live[batch_id], status="failed", error="the server failed; see its log"))
            finally:
                self._live.pop(batch_id, None)

    async def _run(self, batch: Batch) -> Batch:
        paths = [self._files.path(file_id) for file_id in (batch.output_file_id, batch.error_file_id)]
        done = [_done(path) for path in paths]
        total, fault = _count(self._files.path(batch.input_file_id))
        if fault:
            return replace(batch, status="failed", error=fault)
        batch = self._keep(
            replace(batch, status="in_progress", total=total, completed=len(done[0]), failed=len(done[1]))
        )
        with open(paths[0], "ab", buffering=0) as answers, open(paths[1], "ab", buffering=0) as errors:
            run = _Run(self._service, self, batch, answers, errors)
            status = await run.all_lines(_lines(self._files.path(batch.input_file_id)), done[0] | done[1])
        return replace(self._live[batch.id], status=status)

    def _finish(self, batch: Batch) -> None:
        """Register what was written and say that it is over. A disk that refuses even that is only logged."""
        try:
            for file_id, name, num in (
                (batch.output_file_id, "output", batch.completed),
                (batch.error_file_id, "errors", batch.failed),
            ):
                if num:
                    self._files.register(file_id, batch.owner, f"{batch.id}_{name}.jsonl", "batch_output")
            self._keep(replace(batch, ended_at=int(time.time())))
        except OSError as e:
            log.error("batch %s (%s): its end could not be written: %s", batch.id, batch.status, e)
            self._live[batch.id] = replace(batch, status="failed", error=_refused(e))
        self._mark(batch.id).unlink(missing_ok=True)

    def is_cancelled(self, batch_id: str) -> bool:
        """Whether somebody asked for its end, in whichever process."""
        return self._mark(batch_id).exists()

    def progress(self, batch_id: str, *, ok: bool) -> None:
        """Count a line; on disk it is the line itself that counts."""
        batch = self._live[batch_id]
        self._live[batch_id] = replace(batch, completed=batch.completed + ok, failed=batch.failed + (not ok))

    def _keep(self, batch: Batch) -> Batch:
        self._save(batch)
        if batch.id in self._live:
            self._live[batch.id] = batch
        return batch

    def _save(self, batch: Batch) -> None:
        write_whole(self._root / f"{batch.id}.json", json.dumps(asdict(batch)))

    def _load(self, batch_id: str) -> Batch | None:
        if not _ID.fullmatch(batch_id):
            return None
        try:
            return Batch(**json.loads((self._root / f"{batch_id}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _mark(self, batch_id: str) -> Path:
        return self._root / f"{batch_id}.cancel"


class _Run:
    """One batch in work in this process."""

    def __init__(self, service: Service, batches: Batches, batch: Batch, answers: IO[bytes], errors: IO[bytes]) -> None:
        self._service = service
        self._batches = batches
        self._batch = batch
        self._answers = answers
        self._errors = errors
        self._key = Key(**batch.key)
        self._seen: set[str] = set()

    async def all_lines(self, lines: Iterator[_Line], done: set[int]) -> Status:
        """Answer what is not answered yet; returns how that ended. Raises OSError when the disk refuses."""
        watch = asyncio.create_task(self._until_over())
        tasks: set[asyncio.Task[None]] = set()
        try:
            for line in lines:
                line = self._checked(line)
                if line.number in done:
                    continue
                tasks.add(asyncio.create_task(self._one(line)))
                while len(tasks) >= _AT_ONCE and not watch.done():
                    tasks = await _some(tasks, watch)
                if watch.done():
                    break
            while tasks and not watch.done():
                tasks = await _some(tasks, watch)
            return watch.result() if watch.done() else "completed"
        finally:
            for task in (watch, *tasks):
                task.cancel()
            await asyncio.gather(watch, *tasks, return_exceptions=True)

    async def _until_over(self) -> Status:
        while True:
            if self._batches.is_cancelled(self._batch.id):
                return "cancelled"
            if time.time() >= self._batch.expires_at:
                return "expired"
            await asyncio.sleep(_PAUSE_S)

    def _checked(self, line: _Line) -> _Line:
        if line.custom_id is not None and line.custom_id in self._seen:
            return replace(line, body=None, fault=f"custom_id {line.custom_id[:80]!r} is used by an earlier line")
        self._seen.add(line.custom_id or "")
        return line

    async def _one(self, line: _Line) -> None:
        request_id = f"{self._batch.id}-{line.number}"
        if line.body is None:
            self._write(line, request_id, 400, None, RequestError(line.fault, code="invalid_line"))
            return
        try:
            self._write(line, request_id, 200, await self._answer(line.body, request_id), None)
        except OSError:
            raise
        except Exception as e:
            self._write(line, request_id, describe(e).status, None, e)

    async def _answer(self, body: Mapping[str, Any], request_id: str) -> dict[str, Any]:
        """The response's body; asks again as long as asking again helps."""
        while True:
            left_s = self._batch.expires_at - time.time()
            caller = Caller(request_id, self._key, "low", must_queue=True, deadline_s=max(1.0, left_s))
            try:
                return await self._ask(body, caller)
            except (Overloaded, RateLimited) as e:
                if e.retry_after_s is None:
                    raise
                await asyncio.sleep(e.retry_after_s)
            except (NotReady, AnswerCancelled, QueueLost):
                await asyncio.sleep(_PAUSE_S)

    async def _ask(self, raw: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        service = self._service
        try:
            if self._batch.endpoint == ENDPOINTS[0]:
                body = _unstreamed(service.chat_body.model_validate(raw))
                ask = service.front.apply(chat.understand(body, service), body.model, caller.headers)
                shape: Any = chat.ChatShape(ask, service.tokenizer, include_usage=False)
            else:
                ask = completions.understand(_unstreamed(CompletionBody.model_validate(raw)), service)
                shape = completions.CompletionShape(ask, service.tokenizer, include_usage=False)
        except ValidationError as e:
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in e.errors()]) from None
        async with service.answering(ask, caller) as answer:
            whole = shape.whole(await answer.completions(), answer.usage)
        document: dict[str, Any] = json.loads(whole.dump())
        return document

    def _write(self, line: _Line, request_id: str, status: int, body: Any, error: Exception | None) -> None:
        row = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line.custom_id,
            "line": line.number,
            "response": {
                "status_code": status,
                "request_id": request_id,
                "body": body if error is None else describe(error).envelope(),
            },
            "error": None,
        }
        if isinstance(error, QuotaExceeded) or line.fault:
            assert error is not None
            row["error"] = {"code": describe(error).code, "message": describe(error).message}
        file = self._answers if error is None else self._errors
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        _append(file, data)
        self._batches.progress(self._batch.id, ok=error is None)


def _append(file: IO[bytes], data: bytes) -> None:
    """All of it or nothing. Raises OSError."""
    before = os.fstat(file.fileno()).st_size
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(file.fileno(), before)
        raise


async def _some(tasks: set[asyncio.Task[None]], watch: asyncio.Task[Status]) -> set[asyncio.Task[None]]:
    """Wait for one of them; returns those that go on. Raises what one raised."""
    done, pending = await asyncio.wait({*tasks, watch}, return_when=asyncio.FIRST_COMPLETED)
    for task in done & tasks:
        task.result()
    return tasks & pending


def _unstreamed(body: Any) -> Any:
    if body.stream:
        raise RequestError("stream: a batch has no streams; leave it out", param="stream", code="invalid_value")
    return body


def _refused(error: OSError) -> str:
    return f"the disk refused ({error.strerror}); answers written so far are kept: make room and send the rest again"


def _count(path: Path) -> tuple[int, str]:
    """Lines of the input that are not blank, and what is wrong with the whole file, if anything."""
    try:
        with open(path, "rb") as file:
            total = sum(1 for line in file if line.strip())
    except FileNotFoundError:
        return 0, "the input file is not there any more"
    if total == 0:
        return 0, "the input file is empty; write one request per line"
    if total > MAX_LINES:
        return total, f"the input file has {total} requests; a batch takes {MAX_LINES}"
    return total, ""


def _lines(path: Path) -> Iterator[_Line]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield _line(number, raw)


def _line(number: int, raw: bytes) -> _Line:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError) as e:
        return _Line(number, None, None, f"line {number} is not valid JSON: {e}")
    if not isinstance(row, dict):
        return _Line(number, None, None, f"line {number} is not a JSON object")
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        return _Line(number, None, None, f"line {number}: custom_id must be a text of 1 to 512 characters")
    if row.get("method", "POST") != "POST":
        return _Line(number, custom_id, None, f"line {number}: method must be POST")
    if not isinstance(row.get("body"), dict):
        return _Line(number, custom_id, None, f"line {number}: body must be an object, the request itself")
    return _Line(number, custom_id, row["body"], "")


def _done(path: Path) -> set[int]:
    """Numbers of the lines that a run before this one answered. A half line at the end (a crash) is cut off."""
    if not path.exists():
        return set()
    with open(path, "r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return {json.loads(line)["line"] for line in content[:whole].splitlines()}
