"""What a tokenizer is to the rest of the house, and the arithmetic every family shares.

Here: the `Tokenizer` and `StreamDecoder` protocols, the checks of a conversation, which tokens of an example are
learnt, and the assembly of bytes into text. Not here: any vocabulary or template (`hf.py`, `chatglm.py`) and how a
tokenizer is found (`load.py`).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pingjia.errors import ModelError, RequestError
from pingjia.types import ROLES, Encoded, Example, Message


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

    def render(self, messages: Sequence[Message | Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation. Special-token strings inside contents stay plain text.

        Raises RequestError (param "messages") for a conversation that cannot be rendered.
        """
        ...

    def render_text(self, text: str) -> list[int]:
        """Ids of a raw prompt, with what the family needs around it (bos; [gMASK] sop)."""
        ...

    def encode_example(self, example: Example) -> Encoded:
        """Ids of a whole example and which of them are learnt; `render(example.prompt)` is an exact prefix."""
        ...

    def stream(self) -> StreamDecoder:
        """A fresh decoder; its joined pieces equal `decode` of all ids."""
        ...

    def stream_answer(self) -> StreamDecoder:
        """A fresh decoder for what a reader is shown of one answer: `stream`, and the family's finishing touches."""
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
        unknown = [k for k in item if k not in ("role", "content")]
        if unknown:
            raise _bad(f"messages[{index}]: unknown key {unknown[0]!r}; a message has role and content")
        item = Message(item.get("role"), item.get("content"))  # type: ignore[arg-type]  # checked just below
    if not isinstance(item, Message):
        raise _bad(f"messages[{index}] must have role and content, not be a {type(item).__name__}")
    if item.role not in ROLES:
        raise _bad(f"messages[{index}].role must be one of {', '.join(ROLES)}, not {item.role!r}")
    if not isinstance(item.content, str):
        raise _bad(f"messages[{index}].content must be a string, not {type(item.content).__name__}")
    check_text(item.content, f"messages[{index}].content")
    return item


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


def check_example(example: Example) -> None:
    """Refuse an example that does not end with an answer. Raises RequestError (param "messages")."""
    as_messages(example.messages)
    if len(example.messages) < 2 or example.messages[-1].role != "assistant":
        raise _bad(f"{example.where or 'example'}: the last message must be the assistant's answer, after a question")


def learn_answers(
    prompt_ids: Sequence[int], answers: Sequence[Sequence[int]], stop_ids: frozenset[int], where: str = ""
) -> Encoded:
    """Join a prompt and what follows it; decide what is learnt. The one place that does, for every family.

    `answers[k]` are the ids of answer k, its end token, and everything up to where the next answer begins. Of each,
    the ids up to and including the first stop token are learnt: the answer and how it ends. The rest is only read, and
    after the last answer's end it is dropped: nothing is learnt from it. Every assistant turn given here is learnt; a
    family that can learn only the last one puts the others in the prompt.

    Raises ModelError when an answer holds no stop token: a model trained on it would never stop.
    """
    ids, learn = list(prompt_ids), [False] * len(prompt_ids)
    for answer in answers:
        end = next((i for i, token in enumerate(answer) if token in stop_ids), None)
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
