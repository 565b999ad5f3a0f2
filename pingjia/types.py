"""Plain data that crosses rooms, and the two protocols that let rooms meet without importing each other.

No behaviour beyond checking itself; nothing here knows torch, sockets or files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pingjia.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool. `arguments` is the JSON text of an object. `id` links it to its result; it may be empty."""

    name: str
    arguments: str
    id: str = ""

    @property
    def text(self) -> str:
        """The call as one line of JSON."""
        return f'{{"name": {json.dumps(self.name, ensure_ascii=False)}, "arguments": {self.arguments}}}'


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is one of ROLES.

    An assistant's turn may hold `tool_calls`; a tool's turn may say which `name` it has and which call it answers.
    `learn`: whether training learns this turn, if it is the assistant's. An assistant's turn that is only read is
    rendered like any other.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    tool_call_id: str = ""
    learn: bool = True

    @property
    def text(self) -> str:
        """All that the turn says: its content, then each call on a line of its own."""
        if not self.tool_calls:
            return self.content
        return "\n".join(part for part in (self.content, *(call.text for call in self.tool_calls)) if part)


Prompt = str | Sequence[Message]
"""What a model is asked: raw text to continue, or a conversation that goes through the chat template."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of user data: a conversation whose last message is the answer to learn.

    `where` is "file:line" of the row, so that every later complaint can name it.
    `facts` are strings a right answer must contain; `topic` links rows about the same thing. `tools`: JSON text of
    each tool the assistant may call. `weight` multiplies the loss of the row. `augmented_from`: `where` of the row
    that this one was made from.
    """

    messages: tuple[Message, ...]
    where: str = ""
    domain: str | None = None
    lang: str | None = None
    topic: str | None = None
    source: str | None = None
    reference: str | None = None
    facts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    weight: float = 1.0
    augmented_from: str | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def response(self) -> str:
        return self.messages[-1].text


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids. `learn[i]` says whether token i is a target of the loss (the answer and its end).

    `weight` multiplies the loss of its tokens.
    """

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    where: str = ""
    weight: float = 1.0

    @property
    def num_learnt(self) -> int:
        return sum(self.learn)


GRAMMARS = ("json_schema", "json_object", "regex", "choice")
_MAX_GRAMMAR = 64 * 1024


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of an answer must look like; nothing else can be sampled. `kind` is one of GRAMMARS.

    text: a JSON schema; nothing; a regular expression that the whole answer matches (no look-around, no back
    references); a JSON list of strings, of which the answer is one. asked_as: what the caller calls this, for messages.
    Raises RequestError for text that is too long or not what the kind says. Whether it can be met is the engine's to
    say: it knows the tokens.
    """

    kind: str
    text: str = ""
    asked_as: str = dataclasses.field(default="grammar", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in GRAMMARS:
            raise self.refusal(f"the kind must be one of {', '.join(GRAMMARS)}, not {self.kind!r}")
        if len(self.text) > _MAX_GRAMMAR:
            raise self.refusal(f"{len(self.text)} characters long; at most {_MAX_GRAMMAR} are read")
        if self.kind in ("json_schema", "choice"):
            self._check_json()

    def refusal(self, reason: str) -> RequestError:
        """The error that says why this grammar is not obeyed."""
        return RequestError(f"{self.asked_as}: {reason}", param=self.asked_as.partition(".")[0], code="invalid_value")

    def _check_json(self) -> None:
        try:
            value = json.loads(self.text)
        except (ValueError, RecursionError) as e:
            raise self.refusal(f"not JSON that can be read: {e}") from None
        if self.kind == "json_schema" and not isinstance(value, dict | bool):
            raise self.refusal(f"a schema is an object, not a {type(value).__name__}")
        if self.kind == "choice" and not (isinstance(value, list) and value and all(isinstance(c, str) for c in value)):
            raise self.refusal("choices are a list of at least one string")

    @classmethod
    def schema(cls, schema: Mapping[str, Any] | str, asked_as: str = "grammar") -> Grammar:
        """JSON that a schema (an object or its JSON text) allows."""
        return cls("json_schema", schema if isinstance(schema, str) else _json(schema, asked_as), asked_as)

    @classmethod
    def choice(cls, choices: Sequence[str], asked_as: str = "grammar") -> Grammar:
        """One of these strings."""
        return cls("choice", _json(list(choices), asked_as), asked_as)

    @classmethod
    def regex(cls, pattern: str, asked_as: str = "grammar") -> Grammar:
        """Text that a regular expression matches from its beginning to its end."""
        return cls("regex", pattern, asked_as)


def _json(value: Any, asked_as: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise RequestError(f"{asked_as}: cannot be written as JSON: {e}", param=asked_as.partition(".")[0]) from None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen and when to stop. temperature 0 is greedy.

    With a `seed` the answer is a function of prompt, model and these fields alone, whatever else is in the batch.
    n: answers to one prompt, with seeds seed, seed + 1, ... min_tokens: until then no end is sampled and no stop
    string seen. logit_bias: token id -> what is added to its logit, -100 to 100; a mapping or pairs.
    Raises RequestError naming the field when a value is out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # number of alternatives to report per token; None: no logprobs
    n: int = 1
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for field, low, high in RANGES:
            value = getattr(self, field)
            if not low <= value <= high:  # also refuses NaN
                raise RequestError(f"{field} must be between {low} and {high}, not {value}", param=field)
        if len(self.stop) > 16:
            raise RequestError(f"stop takes at most 16 strings, not {len(self.stop)}", param="stop")
        if "" in self.stop:
            raise RequestError("stop must not hold an empty string: it would end every answer at once", param="stop")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise RequestError(f"logprobs must be between 0 and 20, not {self.logprobs}", param="logprobs")
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}", param="min_tokens"
            )
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        self._check_grammar()

    def _check_grammar(self) -> None:
        """A grammar alone says where an answer may end."""
        for field in ("min_tokens", "ignore_eos") if self.grammar else ():
            if getattr(self, field):
                raise RequestError(f"{field} and a grammar contradict each other; leave one out", param=field)


def _checked_bias(bias: Mapping[int, float] | tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    pairs = tuple(sorted(dict(bias).items()))
    for token, value in pairs:
        if type(token) is not int or token < 0:
            raise RequestError(f"logit_bias: {token!r} is not a token id; give integers from 0", param="logit_bias")
        if not -100 <= value <= 100:
            raise RequestError(f"logit_bias of token {token} must be -100 to 100, not {value}", param="logit_bias")
    return pairs


RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 1, 1_000_000),
    ("temperature", 0.0, 2.0),
    ("top_p", 1e-9, 1.0),
    ("top_k", 0, 1_000_000),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 10.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("n", 1, 16),
    ("min_tokens", 0, 1_000_000),
)
"""(field, least, most) of `Sampling`."""


@dataclass(frozen=True, slots=True)
class Passed:
    """What another server is asked in place of token ids. path: the end of the URL, chat/completions or completions.

    body: JSON text with sorted keys, without what is said elsewhere: model, seed, stream, n. num_prompt: tokens of the
    prompt, as well as they are known; not in `repr`, by which the cache tells questions apart.
    """

    path: str
    body: str
    num_prompt: int = dataclasses.field(default=0, repr=False)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt on its way to an engine, already rendered to token ids. `adapter` None means the base model.

    passed: instead of ids, for a server that renders by itself; `adapter` is then the model's id, the base's too.
    trace: who asks, as W3C's traceparent (`pingjia.trace`).
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    passed: Passed | None = None
    trace: str = dataclasses.field(default="", compare=False)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt; an estimate where another server counts them."""
        return len(self.prompt_ids) if self.passed is None else self.passed.num_prompt


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer. `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """ln p of a chosen token and of the best alternatives, as the model gives them (temperature 1)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer; never half a character. The last one, and only it, has `finish_reason`.

    index: which of the `n` answers to one prompt this belongs to, where several come through one stream.
    foreign: what another server said that is more than text (calls of tools, log-probabilities), as JSON text of its
    choice; `text` and `finish_reason` repeat of it what is known here.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None
    index: int = 0
    foreign: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. foreign: as in its chunks, in order; empty for one that is text alone."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    foreign: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a given answer is: sum of ln p over its `num_tokens`. `is_greedy`: each is the likeliest token."""

    logprob: float
    num_tokens: int
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What `/v1/models` says of a served name. `parent` is the base an adapter stands on.

    digest: of its weights, so that two cards with one digest answer alike; empty when it is not known.
    """

    id: str
    root: str
    parent: str | None = None
    max_model_len: int = 0
    created: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of an engine, for `/metrics` and readiness. Counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generation_tokens_total: int = 0
    tokens_after_disconnect_total: int = 0
    num_steps: int = 0
    compute_s_total: float = 0.0
    seconds_since_step: float = 0.0


class Generator(Protocol):
    """Anything that answers prompts: an engine, an adapter on it, an HTTP endpoint."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answer every prompt, in order. `on_done(index, completion)` is called as each one ends."""
        ...


class Backend(Protocol):
    """What a gateway needs of the place that computes: a worker in this process, behind a queue, or upstream."""

    def models(self) -> list[ModelCard]: ...

    def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """Yield chunks; the last has `finish_reason`. Closing the iterator cancels the request within one step."""
        ...

    def stats(self) -> EngineStats: ...

    def is_ready(self) -> bool:
        """True when a token could come out now: started, not frozen, not draining."""
        ...


def as_dict(value: Any) -> dict[str, Any]:
    """A dataclass as a JSON-ready dict without its empty fields."""
    return {k: v for k, v in dataclasses.asdict(value).items() if v not in (None, (), "")}


class Scorer(Protocol):
    """Anything that says how likely given answers are. An HTTP endpoint does not."""

    def likelihoods(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        *,
        with_end: bool = True,
        on_done: Callable[[int, Likelihood], None] | None = None,
    ) -> list[Likelihood]:
        """Of each answer to its prompt, in order. `with_end`: the token that ends an answer counts too."""
        ...
