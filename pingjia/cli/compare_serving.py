"""How long an answer takes, measured in a process of its own: `python -m pingjia.cli.compare_serving JOB`.

JOB is JSON: `model`, `bits`, `adapter`, `dtype`, `device`, `questions`, `num_tokens` and `way`. `one`: one answer at a
time; `batch`: eight at once; `cached`: asked again over HTTP, so that the gateway has the answer. Nothing is guessed at
and no prompt reused while it is timed: what is measured is the network alone. The last line of stdout is the result.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pingjia.cli.trial_server import trial_server

if TYPE_CHECKING:
    from pingjia import Engine

BATCH = 8


@dataclass(frozen=True, slots=True)
class Job:
    """What is loaded, and how it is asked."""

    model: str
    questions: tuple[str, ...]
    num_tokens: int
    bits: int | None = None
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    way: str = "one"

    def to_line(self) -> str:
        """As a word of a command line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def of(cls, line: str) -> Job:
        value = json.loads(line)
        return cls(**{**value, "questions": tuple(value["questions"])})


def main() -> None:
    from pingjia.meter import Meter

    job = Job.of(sys.argv[1])
    with Meter() as meter:
        found = {"one": _one, "batch": _batch, "cached": _cached}[job.way](job)
    print(json.dumps({**found, "num_tokens": job.num_tokens, "peak_bytes": meter.peak_bytes}), flush=True)


def _engine(job: Job) -> Engine:
    from pingjia import Engine
    from pingjia.engine.settings import EngineSettings
    from pingjia.models.device import pick_device

    settings = EngineSettings(max_num_seqs=BATCH, prefix_caching=False, prompt_lookup="off")
    device = str(pick_device(job.device))
    engine = Engine(job.model, adapter=job.adapter, bits=job.bits, dtype=job.dtype, device=device, settings=settings)
    engine.generate(["1"], _sampling(2))  # the first step of a process allocates and compiles
    return engine


def _sampling(num_tokens: int) -> Any:
    from pingjia import Sampling

    return Sampling(max_tokens=num_tokens, ignore_eos=True)


def _one(job: Job) -> dict[str, float]:
    engine = _engine(job)
    found = [_times(engine, question, job.num_tokens) for question in job.questions]
    middle = _medians(found)
    return middle | {"tokens_per_s": job.num_tokens / middle["answer_s"]}


def _times(engine: Engine, question: str, num_tokens: int) -> dict[str, float]:
    """Of one answer: to its first token, between tokens, to its end."""
    from pingjia import Message

    started = time.perf_counter()
    at, count = [], 0
    for chunk in engine.stream([Message("user", question)], _sampling(num_tokens)):
        count += len(chunk.token_ids)
        at.append(time.perf_counter() - started)
    return {"first_token_s": at[0], "per_token_s": (at[-1] - at[0]) / max(1, count - 1), "answer_s": at[-1]}


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def _batch(job: Job) -> dict[str, float]:
    """Eight answers together: every one of them has its token of a step when the step is over."""
    from pingjia import Message

    engine = _engine(job)
    prompts = [[Message("user", job.questions[i % len(job.questions)])] for i in range(BATCH)]
    first = _seconds(engine, prompts, 1)
    whole = _seconds(engine, prompts, job.num_tokens)
    return {
        "first_token_s": first,
        "per_token_s": (whole - first) / max(1, job.num_tokens - 1),
        "answer_s": whole,
        "tokens_per_s": BATCH * job.num_tokens / whole,
    }


def _seconds(engine: Engine, prompts: Any, num_tokens: int) -> float:
    started = time.perf_counter()
    engine.generate(prompts, _sampling(num_tokens))
    return time.perf_counter() - started


def _cached(job: Job) -> dict[str, float]:
    """Every question asked twice over HTTP; the second time is measured, and must have come from the cache."""
    import httpx

    with trial_server(_engine(job), queue_above_rps=1e9) as url, httpx.Client(base_url=url, timeout=600) as client:
        body = {"model": client.get("/v1/models").json()["data"][0]["id"], "max_tokens": job.num_tokens}
        for question in job.questions:
            _ask(client, question, body)
        found = [_ask(client, question, body) for question in job.questions]
    missed = sum(hit != "HIT" for hit, _ in found)
    if missed:
        raise RuntimeError(f"{missed} of {len(found)} equal questions were not answered from the cache")
    seconds = statistics.median(seconds for _, seconds in found)
    # A kept answer comes whole: its first token is its last.
    return {
        "first_token_s": seconds,
        "per_token_s": 0.0,
        "answer_s": seconds,
        "tokens_per_s": job.num_tokens / seconds,
    }


def _ask(client: Any, question: str, body: dict[str, Any]) -> tuple[str, float]:
    """(X-Cache, seconds)."""
    asked = body | {"messages": [{"role": "user", "content": question}], "temperature": 0, "ignore_eos": True}
    started = time.perf_counter()
    response = client.post("/v1/chat/completions", json=asked)
    seconds = time.perf_counter() - started
    response.raise_for_status()
    return response.headers["x-cache"], seconds


if __name__ == "__main__":
    main()
