"""What clients get: the response bodies, in OpenAI's shapes. They are written with `dump`, never by hand."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from pingjia import types


class Out(BaseModel):
    def dump(self) -> bytes:
        """JSON of the fields that were set: null where set to None, absent where not set."""
        return self.model_dump_json(exclude_unset=True).encode()


class PromptDetails(Out):
    cached_tokens: int


class UsageOut(Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, usage: types.Usage) -> UsageOut:
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=usage.cached_tokens),
        )


class TopLogprob(Out):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobOut(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Out):
    content: list[TokenLogprobOut]


class CalledFunction(Out):
    name: str
    arguments: str


class CallOut(Out):
    """A call of a tool. `arguments` is the JSON text of an object."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Out):
    """`content` is null where the answer is nothing but calls."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[CallOut] = []


class ChatChoice(Out):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Out):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageOut


class CallDelta(CallOut):
    """A call in a stream comes whole. `index` is its place among the calls of its choice."""

    index: int


class Delta(Out):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    tool_calls: list[CallDelta] = []


class ChatChunkChoice(Out):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(Out):
    """One event of a streamed chat answer. `usage` is there only with stream_options.include_usage."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageOut | None = None


class CompletionLogprobs(Out):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Out):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(Out):
    """A whole completion, or one event of a streamed one (then finish_reason may be null and usage absent)."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageOut | None = None


class DemoAnswer(Out):
    response: str
    history: list[list[str]]
    status: Literal[200]
    time: str


class ModelOut(Out):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Out):
    object: Literal["list"]
    data: list[ModelOut]


class Health(Out):
    status: Literal["ok", "not ready"]
    num_running: int
    num_waiting: int
    seconds_since_step: float


class ErrorBody(Out):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Out):
    error: ErrorBody


class JobOut(Out):
    """An asynchronous request. `result` is what its endpoint would have answered."""

    id: str
    object: Literal["job"]
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    created_at: int
    model: str
    result: dict[str, Any] | None = None
    error: ErrorBody | None = None
