"""What a tokenizer is to the rest of the house, and the arithmetic every family shares.

Here: the `Tokenizer` and `StreamDecoder` protocols, the checks of a conversation, which tokens of an example are
learnt, and the assembly of bytes into text. Not here: any vocabulary or template (`hf.py`, `chatglm.py`) and how a
tokenizer is found (`load.py`).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pingjia.chat.tools import Malformed, read_call
from pingjia.errors import ModelError, RequestError
from pingjia.types import ROLES, Encoded, Example, Message, ToolCall


class StreamDecoder(Protocol):
    """Token ids in, text out, piece by piece; one per answer.

    The joined pieces of `feed` and `flush` equal `decode` of all ids, and no piece holds half a character.
    """

    def feed(self, ids: Sequence[int]) -> str:
        """The text that became certain with these ids; may be empty."""
        ...

    def flush(self) -> str:
        """What was held back. Call once, after the last `feed`."""
        ...


class Tokenizer(Protocol):
    """A conversation <-> token ids. Safe to use from several threads."""

    family: str
    """"hf", "chatglm", "chatglm2" or "chatglm3"."""
    vocab_size: int
    pad_id: int
    stop_ids: frozenset[int]
    """Ids that end an answer."""

    @property
    def template_digest(self) -> str:
        """sha256 hex of what decides the rendering. Equal digests render equally; others may too (`golden.py`)."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of raw text, nothing added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out, the family's post-processing applied."""
        ...

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[str | Mapping[str, Any]] = (),
    ) -> list[int]:
        """Ids of a conversation. Special-token strings inside contents, calls and tools stay plain text.

        `tools` are what the assistant may call, each an object or its JSON text. They reach the model in the form it
        was taught, or in the plain form of `tools.py`. Raises RequestError (param "messages" or "tools") for a
        conversation that cannot be rendered.
        """
        ...

    def render_text(self, text: str) -> list[int]:
        """Ids of a raw prompt, with what the family needs around it (bos; [gMASK] sop)."""
        ...

    def encode_example(self, example: Example) -> Encoded:
        """Ids of a whole example and which of them are learnt.

        `render(example.prompt, tools=example.tools)` is an exact prefix.
        """
        ...

    def stream(self) -> StreamDecoder:
        """A fresh decoder; its joined pieces equal `decode` of all ids."""
        ...

    def stream_answer(self) -> StreamDecoder:
        """A fresh decoder for what a reader is shown of one answer: `stream`, and the family's finishing touches."""
        ...

    def special_text(self, token: int) -> str | None:
        """How a special token is written, <|im_end|> say; None for a token of text."""
        ...

    def token_bytes(self, token: int) -> bytes | None:
        """What a token adds to a text, before any finishing touches; b"" for a special token.

        None where a token alone has no fixed bytes (word pieces).
        """
        ...

    def save(self, directory: Path) -> None:
        """Write the files from which `load_tokenizer` makes an equal tokenizer."""
        ...


def as_messages(messages: Sequence[Message | Mapping[str, Any]]) -> tuple[Message, ...]:
    """Check a conversation and return it as `Message`s. Raises RequestError (param "messages") naming the turn."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise _bad(f"messages must be a list of {{role, content}}, not {type(messages).__name__}")
    if not messages:
        raise _bad("messages is empty; give at least one user message")
    return tuple(_as_message(m, i) for i, m in enumerate(messages))


def _as_message(item: Message | Mapping[str, Any], index: int) -> Message:
    if isinstance(item, Mapping):
        item = _read_message(item, index)
    if not isinstance(item, Message):
        raise _bad(f"messages[{index}] must have role and content, not be a {type(item).__name__}")
    if item.role not in ROLES:
        raise _bad(f"messages[{index}].role must be one of {', '.join(ROLES)}, not {item.role!r}")
    if not isinstance(item.content, str):
        raise _bad(f"messages[{index}].content must be a string, not {type(item.content).__name__}")
    check_text(item.content, f"messages[{index}].content")
    return _with_checked_links(item, index) if item.tool_calls or item.name or item.tool_call_id else item


_OWN_KEYS = {"assistant": ("tool_calls",), "tool": ("name", "tool_call_id")}


def _read_message(item: Mapping[str, Any], index: int) -> Message:
    """What a mapping says, still unchecked but for its keys."""
    allowed = ("role", "content", *_OWN_KEYS.get(str(item.get("role")), ()))
    unknown = [k for k in item if k not in allowed]
    if unknown:
        raise _bad(f"messages[{index}]: unknown key {unknown[0]!r}; this message has {', '.join(allowed)}")
    calls = item.get("tool_calls") or ()
    content = "" if calls and item.get("content") is None else item.get("content")
    links = [item.get(key) or "" for key in _OWN_KEYS["tool"]]
    return Message(item.get("role"), content, calls, *links)  # type: ignore[arg-type]  # checked by the caller


def _with_checked_links(item: Message, index: int) -> Message:
    """The message with canonical calls, once it may have them."""
    where = f"messages[{index}]"
    for key, role in (("tool_calls", "assistant"), ("name", "tool"), ("tool_call_id", "tool")):
        if getattr(item, key) and item.role != role:
            raise _bad(f"{where}.{key} belongs to a message of role {role}, not {item.role}")
    for key in _OWN_KEYS["tool"]:
        if not isinstance(getattr(item, key), str):
            raise _bad(f"{where}.{key} must be a string, not {type(getattr(item, key)).__name__}")
        check_text(getattr(item, key), f"{where}.{key}")
    if not isinstance(item.tool_calls, list | tuple):
        raise _bad(f"{where}.tool_calls must be a list, not {type(item.tool_calls).__name__}")
    calls = (_as_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(item.tool_calls))
    return replace(item, tool_calls=tuple(calls))


def _as_call(call: Any, where: str) -> ToolCall:
    if isinstance(call, ToolCall):
        call = {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
    try:
        found = read_call(call)
    except Malformed as e:
        raise _bad(f"{where}{e.field and f'.{e.field}'}: {e.reason}") from None
    check_text(found.id, f"{where}.id")
    return found


def check_text(text: str, field: str, param: str = "messages") -> None:
    """Refuse half of a surrogate pair, which no tokenizer can take. Raises RequestError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        half = f"U+{ord(text[e.start]):04X}"
        raise RequestError(
            f"{field}: character {e.start} is half of a surrogate pair ({half}); send valid Unicode", param=param
        ) from None


def _bad(message: str) -> RequestError:
    return RequestError(message, param="messages")


def check_example(example: Example) -> tuple[Message, ...]:
    """The messages of an example. Raises RequestError (param "messages") unless an answer to learn ends it."""
    messages = as_messages(example.messages)
    where = example.where or "example"
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise _bad(f"{where}: the last message must be the assistant's answer, after a question")
    if not messages[-1].learn:
        raise _bad(f"{where}: the last answer is not to be learnt; leave out what follows the last one that is")
    return messages


def learn_answers(
    prompt_ids: Sequence[int],
    answers: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    where: str = "",
    wanted: Sequence[bool] | None = None,
) -> Encoded:
    """Join a prompt and what follows it; decide what is learnt. The one place that does, for every family.

    `answers[k]` are the ids of answer k, its end token, and everything up to where the next answer begins. Of each,
    the ids up to and including the first stop token are learnt: the answer and how it ends. The rest is only read, and
    after the last answer's end it is dropped: nothing is learnt from it. Every assistant turn given here is learnt, but
    those that are not `wanted`; a family that can learn only the last one puts the others in the prompt.

    Raises ModelError when an answer holds no stop token: a model trained on it would never stop.
    """
    ids, learn = list(prompt_ids), [False] * len(prompt_ids)
    for answer, is_wanted in zip(answers, wanted or [True] * len(answers), strict=True):
        end = next((i for i, token in enumerate(answer) if token in stop_ids), None) if is_wanted else -1
        if end is None:
            raise ModelError(
                f"{where or 'example'}: the chat template puts none of the stop tokens {sorted(stop_ids)} after an "
                "answer, so a model trained on it would never stop; use a template that ends answers with the eos token"
            )
        ids.extend(answer)
        learn.extend(i <= end for i in range(len(answer)))
    size = max((i for i, learnt in enumerate(learn) if learnt), default=len(ids) - 1) + 1
    return Encoded(tuple(ids[:size]), tuple(learn[:size]), where)


class ByteStream:
    """StreamDecoder for vocabularies whose tokens are bytes: `piece(id)` gives them, b"" for special tokens.

    Constant work per token. Bytes of an unfinished character are held back; bytes that are no character become
    U+FFFD, one for each maximal ill-formed part (as Unicode recommends and Rust's lossy decoding does). With
    `strip_space` one leading space of the whole answer is dropped (SentencePiece's dummy prefix).
    """

    def __init__(self, piece: Callable[[int], bytes], *, strip_space: bool = False) -> None:
        self._piece = piece
        self._strip = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> str:
        data = b"".join(map(self._piece, ids))
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)
