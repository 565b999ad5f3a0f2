"""What clients may send: the request bodies and their types. Nothing is coerced; what we cannot honour is refused.

Ranges of sampling values are not here but in `types.Sampling`, which every way into the engine shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pingjia.errors import RequestError

_INT64 = 2**63
_INT32 = 2**31


class Body(BaseModel):
    """Strict types (an int is a fine float, "0.5" and true are not); unknown fields are kept aside for `refuse`."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="send a last chunk with the token counts")


class JsonSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="accepted; the schema is always obeyed to the letter")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON schema")
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None


class SamplingBody(Body):
    """The fields that /v1/chat/completions and /v1/completions share. null is the same as leaving a field out."""

    model: str | None = Field(None, description="an id of /v1/models; may be left out when only one model is served")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, description="0 is greedy")
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1: no limit")
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: str | list[str] | None = Field(None, description="at most 16 strings")
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=_INT32)]] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, description="no end before that many tokens")
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = Field(None, description="token id -> -100 to 100, added to its logit")
    n: int | None = Field(None, ge=1, le=16, description="answers to one prompt, which is computed once")
    response_format: ResponseFormat | None = Field(None, description="text, json_object or json_schema")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's json, regex, choice or json_object")
    guided_json: dict[str, Any] | str | None = Field(None, description="vLLM's older name of a JSON schema")
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="accepted and not used")

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_text(cls, value: Any) -> Any:
        if value is None or isinstance(value, str) or _is_list_of(value, str):
            return value
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="developer is system")
    tool_calls: list[dict[str, Any]] | None = Field(None, description="of the assistant")
    tool_call_id: str | None = Field(None, description="of a tool's result")
    name: str | None = Field(None, description="of a tool; not used elsewhere")
    content: str | list[TextPart] | None = Field(None, validate_default=True, description="null only with tool_calls")

    @field_validator("content", mode="before")
    @classmethod
    def _content_is_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) or (value is None and info.data.get("tool_calls")):
            return value
        if not isinstance(value, list):
            raise PydanticCustomError("content_type", "must be a string or a list of text parts")
        for i, part in enumerate(value):
            _check_part(i, part)
        return value

    @property
    def text(self) -> str:
        """The content as one string; text parts are joined as they stand."""
        if isinstance(self.content, str | None):
            return self.content or ""
        return "".join(part.text for part in self.content)


class ToolName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: ToolName


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = Field(None, description="functions that the answer may call")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="required, or one by its name: the answer is a call and nothing else"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens; wins over it")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="needs logprobs: true")

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choice_is_one(cls, value: Any) -> Any:
        function = value.get("function") if isinstance(value, dict) else None
        is_named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if value in (None, "none", "auto", "required") or (is_named and value.get("type") == "function"):
            return value
        raise PydanticCustomError(
            "tool_choice_type", 'must be none, auto, required or {"type": "function", "function": {"name": "..."}}'
        )


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompt_is_text_or_ids(cls, value: Any) -> Any:
        lists = isinstance(value, list) and value
        if isinstance(value, str) or (lists and (_is_list_of(value, str) or _is_list_of(value, int))):
            return value
        if lists and all(_is_list_of(ids, int) for ids in value):
            return value
        raise PydanticCustomError(
            "prompt_type", "must be a string, a list of strings, a list of token ids or a list of such lists"
        )


class DemoBody(Body):
    """POST /, the API of ChatGLM-6B's demo."""

    prompt: str
    history: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = Field(
        None, description="pairs of question and answer"
    )
    max_length: int | None = Field(None, ge=1, description="tokens of prompt and answer together; 2048")
    top_p: float | None = Field(None, description="0.7")
    temperature: float | None = Field(None, description="0.95; 0 is greedy")
    model: str | None = Field(None, description="not in the original: an id of /v1/models")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _check_part(index: int, part: Any) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return
    where = f"part {index}"
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError("part_type", f"{where} is of type {kind[:40]!r}; only text parts can be read here")
    raise PydanticCustomError("part_type", f'{where} must look like {{"type": "text", "text": "..."}}')


# Fields of OpenAI's and vLLM's APIs that would change the answer and that nothing here can honour. The values listed
# ask for what happens anyway; so do null, "", [] and {}.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": (),
    "continue_final_message": (False,),
    "documents": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": (),
    "guided_grammar": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "suffix": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_REFUSED_IN_STRUCTURED = ("grammar", "structural_tag")
_REFUSED_IN_MESSAGE = ("function_call", "audio")


def refuse(body: Body) -> None:
    """Raise RequestError for the first field that asks for something this server does not do."""
    for name, value in (body.model_extra or {}).items():
        if name in _REFUSED and not _is_harmless(value, _REFUSED[name]):
            raise _unsupported(name)
    structured: Body | None = getattr(body, "structured_outputs", None)
    for name in _REFUSED_IN_STRUCTURED:
        if structured is not None and not _is_harmless((structured.model_extra or {}).get(name), ()):
            raise _unsupported(f"structured_outputs.{name}")
    for i, message in enumerate(getattr(body, "messages", None) or ()):
        for name in _REFUSED_IN_MESSAGE:
            if not _is_harmless((message.model_extra or {}).get(name), ()):
                raise _unsupported(f"messages[{i}].{name}")


def _is_harmless(value: Any, allowed: tuple[Any, ...]) -> bool:
    return value is None or value in ("", [], {}) or value in allowed


def _unsupported(name: str) -> RequestError:
    return RequestError(
        f"{name} is not supported by this server and would change the answer; leave it out",
        param=name,
        code="unsupported_parameter",
    )
