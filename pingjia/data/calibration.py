"""Text to look at a model's insides with, as token ids: for calibrating its compression and for measuring the loss.

Rows of data files are rendered as in training; .txt and .md files are read as plain text. Not here: what the ids are
used for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.encode import encode_example
from pingjia.data.files import fingerprint, resolve
from pingjia.data.problems import Problem
from pingjia.data.read import read_examples
from pingjia.errors import DataError
from pingjia.script import zh_share

CALIBRATION = ("samples:customer_service.jsonl", "samples:tutoring.jsonl", "samples:writing.jsonl")
HELD_OUT = tuple(name.replace(".jsonl", ".heldout.jsonl") for name in CALIBRATION)
_PLAIN = (".txt", ".md")
_PIECE_CHARACTERS = 1500  # of plain text, about: a few hundred tokens


@dataclass(frozen=True, slots=True)
class Sample:
    """Some text as ids. `langs[i]` is "zh" or "en" of `rows[i]`; `sha256` is of the files' contents."""

    files: tuple[str, ...]
    sha256: str
    rows: tuple[tuple[int, ...], ...]
    langs: tuple[str, ...]
    num_passed_over: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))


def sample(files: Sequence[str], tokenizer: Tokenizer, max_tokens: int, max_len: int) -> Sample:
    """Rows of all files in turn until `max_tokens` are reached; rows over `max_len` tokens are passed over.

    Raises DataError when a file cannot be read or no row is left.
    """
    digest = fingerprint(files)
    rows, langs, num_tokens, num_passed = list[tuple[int, ...]](), list[str](), 0, 0
    for ids, lang in _in_turn([_rows(name, tokenizer) for name in files]):
        if num_tokens >= max_tokens:
            break
        if not 1 < len(ids) <= max_len:
            num_passed += 1
            continue
        rows.append(ids)
        langs.append(lang)
        num_tokens += len(ids)
    if not rows:
        raise DataError(f"{', '.join(files)}: no row of 2 to {max_len} tokens; see `pingjia data check`")
    return Sample(tuple(files), digest, tuple(rows), tuple(langs), num_passed)


def require_different(first: Sequence[str], second: Sequence[str]) -> None:
    """Raise DataError when a file is among both, by whatever name: what was measured on would have been learnt from."""
    digests = {fingerprint([name]): name for name in first}
    for name in second:
        same = digests.get(fingerprint([name]))
        if same is not None:
            raise DataError(
                f"{name} is the calibration text {same}; the loss must be measured on other text: give another "
                "--held-out"
            )


def _in_turn(sources: Sequence[Iterator[tuple[tuple[int, ...], str]]]) -> Iterator[tuple[tuple[int, ...], str]]:
    """First of each, second of each, ..."""
    return (item for item in chain.from_iterable(zip_longest(*sources)) if item is not None)


def _rows(name: str, tokenizer: Tokenizer) -> Iterator[tuple[tuple[int, ...], str]]:
    if resolve(name).suffix.lower() in _PLAIN:
        for piece in _pieces(resolve(name)):
            yield tuple(tokenizer.render_text(piece)), _lang(piece)
        return
    for example in read_examples([name], on_problem=_passed_over):
        encoded = encode_example(example, tokenizer, None)
        if not isinstance(encoded, Problem):
            yield encoded.ids, example.lang or _lang(*(m.content for m in example.messages))


def _pieces(file: Path) -> Iterator[str]:
    """Whole lines, about `_PIECE_CHARACTERS` at a time."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {e}") from None
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece.strip() and len(piece) + len(line) > _PIECE_CHARACTERS:
            yield piece
            piece = ""
        piece += line
    if piece.strip():
        yield piece


def _lang(*texts: str) -> str:
    return "zh" if (zh_share(texts) or 0.0) >= 0.5 else "en"


def _passed_over(_: Problem) -> None:
    """Bad rows are for `pingjia data check`."""
