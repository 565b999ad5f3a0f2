"""A SentencePiece model file: text <-> ids, and ids -> text piece by piece.

Here: reading the file and the exact decoding of the SentencePiece library, done incrementally. Not here: what a family
makes of white space, special tokens and conversations (`chatglm.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pingjia.errors import ModelError

if TYPE_CHECKING:
    import sentencepiece

SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """A loaded SentencePiece model. Safe to use from several threads."""

    file: Path
    serialized: bytes

    @classmethod
    def read(cls, file: Path) -> Vocabulary:
        """Raises ModelError when the file is not there or not a SentencePiece model."""
        try:
            vocabulary = cls(file, file.read_bytes())
        except OSError as e:
            raise ModelError(f"{file}: cannot be read: {e.strerror or e}") from None
        if vocabulary.serialized.startswith(b"version https://git-lfs"):
            raise ModelError(f"{file}: this is a Git LFS pointer, not the file itself; run: git lfs pull")
        if len(vocabulary) == 0:
            raise ModelError(f"{file}: not a SentencePiece model ({len(vocabulary.serialized)} bytes)")
        return vocabulary

    @cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.serialized)
        except RuntimeError:
            raise ModelError(
                f"{self.file}: not a SentencePiece model ({len(self.serialized)} bytes; truncated?)"
            ) from None

    def __len__(self) -> int:
        return int(self._model.get_piece_size())

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def id_of(self, piece: str) -> int | None:
        """Id of a piece; None when the vocabulary does not hold it."""
        found = int(self._model.piece_to_id(piece))
        return found if self._model.id_to_piece(found) == piece else None

    @cached_property
    def pieces(self) -> list[bytes | str | None]:
        """What each id contributes: text (▁ for a space), one byte, or None for a control token."""
        return [self._piece(i) for i in range(len(self))]

    def _piece(self, token: int) -> bytes | str | None:
        if self._model.is_control(token):
            return None
        if self._model.is_unknown(token):
            return " ⁇ "
        piece = str(self._model.id_to_piece(token))
        return bytes([int(piece[3:5], 16)]) if self._model.is_byte(token) else piece

    @cached_property
    def drops_leading_spaces(self) -> bool:
        """Whether decoding drops every leading space (v1), not only the one that encoding adds (v2, v3)."""
        return self._model.decode_pieces([SPACE, SPACE]) == ""


class PieceStream:
    """StreamDecoder over a vocabulary, without any post-processing; equals the library's own decoding.

    Bytes of an unfinished character are held back; a byte that belongs to no character becomes U+FFFD. Control tokens,
    ids in `silent` and ids beyond the vocabulary give no text.
    """

    def __init__(self, vocabulary: Vocabulary, silent: frozenset[int] = frozenset()) -> None:
        self._pieces = vocabulary.pieces
        self._drop_all = vocabulary.drops_leading_spaces
        self._silent = silent
        self._at_start = True
        self._bytes = b""

    def feed(self, ids: Sequence[int]) -> str:
        return "".join(map(self._feed_one, ids))

    def flush(self) -> str:
        return self._end_bytes()

    def _feed_one(self, token: int) -> str:
        piece = self._pieces[token] if 0 <= token < len(self._pieces) and token not in self._silent else None
        if isinstance(piece, bytes):
            return self._take_byte(piece)
        before = self._end_bytes()
        return before if piece is None else before + self._take_text(piece)

    def _take_text(self, piece: str) -> str:
        if self._at_start and piece.startswith(SPACE):
            piece = piece.lstrip(SPACE) if self._drop_all else piece[1:]
            self._at_start = self._drop_all and not piece
        else:
            self._at_start = False
        return piece.replace(SPACE, " ")

    def _take_byte(self, byte: bytes) -> str:
        self._at_start = False
        text, self._bytes = _characters(self._bytes + byte)
        return text

    def _end_bytes(self) -> str:
        broken, self._bytes = "\ufffd" * len(self._bytes), b""
        return broken


def _characters(data: bytes) -> tuple[str, bytes]:
    """The characters that `data` begins with, and the bytes of a last one that may still be finished."""
    text = ""
    while data:
        length = _length(data[0])
        if len(data) < length and _may_go_on(data):
            return text, data
        try:
            text, data = text + data[:length].decode(), data[length:]
        except UnicodeDecodeError:
            text, data = text + "\ufffd", data[1:]
    return text, b""


def _length(first: int) -> int:
    """Bytes of the character that begins with this byte; 1 for bytes that begin none."""
    return 4 if 0xF0 <= first < 0xF5 else 3 if 0xE0 <= first < 0xF0 else 2 if 0xC2 <= first < 0xE0 else 1


def _may_go_on(data: bytes) -> bool:
    """Whether some continuation makes `data`, the start of one character, valid."""
    missing = _length(data[0]) - len(data)
    return any(_is_valid(data + bytes([second]) + b"\x80" * (missing - 1)) for second in (0x80, 0xBF))


def _is_valid(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
