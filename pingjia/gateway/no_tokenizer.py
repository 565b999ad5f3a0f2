"""In the place of a tokenizer where other servers answer: it has none of their vocabularies, and says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pingjia.chat.tokenizer import StreamDecoder
from pingjia.errors import RequestError
from pingjia.types import Encoded, Example, Message


class NoTokenizer:
    """A `Tokenizer` that refuses. No road to another server asks it for anything."""

    family = "none"
    vocab_size = 2**31  # any id may be one of theirs
    pad_id = 0
    stop_ids: frozenset[int] = frozenset()
    template_digest = ""

    def encode(self, text: str) -> list[int]:
        _refuse()

    def decode(self, ids: Sequence[int]) -> str:
        _refuse()

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[str | Mapping[str, Any]] = (),
    ) -> list[int]:
        _refuse()

    def render_text(self, text: str) -> list[int]:
        _refuse()

    def encode_example(self, example: Example) -> Encoded:
        _refuse()

    def stream(self) -> StreamDecoder:
        _refuse()

    def stream_answer(self) -> StreamDecoder:
        _refuse()

    def special_text(self, token: int) -> str | None:
        return None

    def token_bytes(self, token: int) -> bytes | None:
        return None

    def save(self, directory: Path) -> None:
        _refuse()


def _refuse() -> NoReturn:
    raise RequestError(
        "this gateway stands before other servers and has no tokenizer; ask them for token ids",
        code="unsupported_parameter",
    )
