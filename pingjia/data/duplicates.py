"""Rows that say what another row says: exactly, nearly, and across training and held-out files.

Signatures are made row by row, in any process; comparing them is sorting. MinHash by `rensa`, bands by numpy.

Near means: character shingles with a Jaccard similarity of at least the threshold, AND the same numbers and negations
in the same order. 保修三年 and 保修五年 are two facts, whatever else their rows share.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from pingjia.types import Example, Message

NUM_PERM = 128
_SEED = 42
SHINGLE = 3
NUM_BANDS = 16  # of 8 values each: a pair of similarity 0.85 meets in one of them with 99 %, of 0.5 with 6 %
_ROWS = NUM_PERM // NUM_BANDS
_MAX_APART = 32  # how many neighbours in a bucket a row is compared with, besides the first
_BATCH = 1 << 16

_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*|[零〇一二两三四五六七八九十百千万亿半]+|[%％]")
_NEGATION = re.compile(
    r"不|没|无|非|未|别|勿|莫|否|禁|\b(?:no|not|never|none|nor|without|cannot)\b|n['’]t\b", re.IGNORECASE
)
_NO_NUMBER = re.compile(r"一[下些个样直起点般定旦共同边]|万一|第一时间|统一|唯一")


@dataclass(frozen=True, slots=True)
class Signature:
    """What a row is compared by.

    exact: 16 bytes, equal for conversations that differ in width, case or white space only. question: of the prompt
    alone. bands_B, minhash_P: uint64 and uint32, of question and answer together.
    """

    exact: bytes
    question: int
    bands: np.ndarray
    minhash: np.ndarray


def signature(example: Example) -> Signature:
    """The same in every process and on every platform."""
    turns = example.messages
    text = "\n".join(m.content for m in turns if m.role in ("user", "assistant"))
    minhash = _minhash(text)
    return Signature(
        exact=_digest(turns, 16, example.tools),
        question=_number(_digest(turns[:-1], 8, example.tools)),
        bands=_bands(minhash, text),
        minhash=minhash,
    )


def text_digest(text: str) -> int:
    """`Signature.question` of a conversation that is this one question."""
    return _number(_digest([Message("user", text)], 8))


def _digest(turns: Sequence[Message], size: int, tools: Sequence[str] = ()) -> bytes:
    plain = "\0".join([*tools, *(f"{m.role}\0{_plain(m.content)}" for m in turns)])
    return blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little")


def _plain(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def _minhash(text: str) -> np.ndarray:
    made = _rensa()(NUM_PERM, _SEED)
    made.update(_shingles(text))
    return np.array(made.digest(), np.uint32)


@functools.cache
def _rensa() -> Any:
    from rensa import RMinHash

    return RMinHash


def _shingles(text: str) -> list[str]:
    """Every 3 characters in a row of the letters and digits; a shorter text is one shingle."""
    letters = "".join(filter(str.isalnum, _plain(text)))
    return list({letters[i : i + SHINGLE] for i in range(max(1, len(letters) - SHINGLE + 1))})


def _bands(minhash: np.ndarray, text: str) -> np.ndarray:
    meaning = _must_agree(text)
    keys = (blake2b(band.tobytes() + meaning, digest_size=8).digest() for band in minhash.reshape(NUM_BANDS, _ROWS))
    return np.frombuffer(b"".join(keys), "<u8")


def _must_agree(text: str) -> bytes:
    """The numbers and negations of a text in order: rows in which they differ are never near."""
    plain = _NO_NUMBER.sub("", _plain(text))
    numbers = " ".join(_NUMBER.findall(plain))
    negations = " ".join(_NEGATION.findall(plain))
    return f"\0{numbers}\0{negations}".encode()


# ---- comparing


@dataclass(frozen=True, slots=True)
class Signatures:
    """Columns of N rows: exact_N2 (two uint64), question_N, bands_BN, minhash_NP. May lie on disk."""

    exact: np.ndarray
    question: np.ndarray
    bands: np.ndarray
    minhash: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Signature]) -> Signatures:
        exact = np.frombuffer(b"".join(r.exact for r in rows), "<u8").reshape(-1, 2)
        question = np.array([r.question for r in rows], np.uint64)
        bands = np.stack([r.bands for r in rows], axis=1) if rows else np.zeros((NUM_BANDS, 0), np.uint64)
        minhash = np.stack([r.minhash for r in rows]) if rows else np.zeros((0, NUM_PERM), np.uint32)
        return cls(exact, question, bands, minhash)

    def __len__(self) -> int:
        return len(self.question)


def find_exact(signatures: Signatures) -> np.ndarray:
    """int64 [N]: the first row with the same conversation, or -1 for the first itself."""
    return _first_equal(_joined(signatures.exact))


def _joined(exact: np.ndarray) -> np.ndarray:
    """Both halves as one value that sorts and compares."""
    return np.ascontiguousarray(exact).view([("a", "<u8"), ("b", "<u8")]).reshape(-1)


def _first_equal(keys: np.ndarray) -> np.ndarray:
    result = np.full(len(keys), -1, np.int64)
    if not len(keys):
        return result
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    is_new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    first = order[np.maximum.accumulate(np.where(is_new, np.arange(len(keys)), 0))]
    result[order[~is_new]] = first[~is_new]
    return result


def find_near(signatures: Signatures, threshold: float, alive: np.ndarray) -> np.ndarray:
    """int64 [N]: an earlier row that stays and is nearly the same, or -1.

    Only rows where `alive` take part. Greedy in order: a row goes if it is near one that stays, so in a chain
    A ~ B ~ C with A and C apart, B goes and C stays. Similarity is estimated from the signatures (standard error 0.03).
    """
    result = np.full(len(signatures), -1, np.int64)
    pairs = [p for band in signatures.bands for p in _near_pairs(signatures.minhash, band, threshold, alive)]
    if not pairs:
        return result
    found = np.unique(np.concatenate(pairs), axis=0)
    for later, earlier in found[np.lexsort((found[:, 1], found[:, 0]))]:
        if result[later] == -1 and result[earlier] == -1:
            result[later] = earlier
    return result


def _near_pairs(
    minhash_NP: np.ndarray, keys_N: np.ndarray, threshold: float, alive: np.ndarray
) -> Iterator[np.ndarray]:
    """(later, earlier) pairs of one band that are near, in pieces."""
    rows = np.flatnonzero(alive)
    keys = np.asarray(keys_N)[rows]
    order = np.argsort(keys, kind="stable")
    rows, keys = rows[order], keys[order]
    starts = np.maximum.accumulate(np.where(np.concatenate([[True], keys[1:] != keys[:-1]]), np.arange(len(keys)), 0))
    for apart in range(1, _MAX_APART + 1):
        at = np.flatnonzero(keys[apart:] == keys[:-apart]) if apart < len(keys) else np.zeros(0, np.int64)
        if not len(at):
            return
        yield from _verified(minhash_NP, rows[at + apart], rows[at], threshold)
    far = np.flatnonzero(np.arange(len(keys)) - starts > _MAX_APART)
    yield from _verified(minhash_NP, rows[far], rows[starts[far]], threshold)


def _verified(minhash_NP: np.ndarray, later: np.ndarray, earlier: np.ndarray, threshold: float) -> Iterator[np.ndarray]:
    for start in range(0, len(later), _BATCH):
        a, b = later[start : start + _BATCH], earlier[start : start + _BATCH]
        is_near = similarity(minhash_NP[a], minhash_NP[b]) >= threshold
        yield np.stack([a[is_near], b[is_near]], axis=1)


def similarity(left_NP: np.ndarray, right_NP: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity, row by row."""
    return np.asarray((left_NP == right_NP).mean(axis=-1))


def find_leaks(rows: Signatures, held_out: Signatures, near: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [N] held-out row or -1, [N] how: b"", b"row", b"question" or b"near") for every training row.

    A training row leaks when it equals a held-out row, asks a held-out question, or (with `near`) nearly equals one.
    """
    where, how = np.full(len(rows), -1, np.int64), np.zeros(len(rows), "S8")
    if not len(held_out):
        return where, how
    for kind, left, right in (
        (b"row", _joined(rows.exact), _joined(held_out.exact)),
        (b"question", np.asarray(rows.question), np.asarray(held_out.question)),
    ):
        _note(where, how, kind, _lookup(left, right))
    if near is not None:
        for mine, theirs in zip(rows.bands, held_out.bands, strict=True):
            _note(where, how, b"near", _near_in(rows, held_out, np.asarray(mine), np.asarray(theirs), near))
    return where, how


def _note(where: np.ndarray, how: np.ndarray, kind: bytes, found: np.ndarray) -> None:
    new = (where == -1) & (found >= 0)
    where[new], how[new] = found[new], kind


def _lookup(keys: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For every key the first place in `among` that equals it, or -1."""
    order = np.argsort(among, kind="stable")
    at = np.minimum(np.searchsorted(among[order], keys), len(among) - 1)
    return np.where(among[order][at] == keys, order[at], -1)


def _near_in(
    rows: Signatures, held_out: Signatures, mine_N: np.ndarray, theirs_M: np.ndarray, threshold: float
) -> np.ndarray:
    """As `_lookup` for one band, with candidates checked; every held-out row of a bucket is tried."""
    result = np.full(len(mine_N), -1, np.int64)
    order = np.argsort(theirs_M, kind="stable")
    ordered = theirs_M[order]
    low, high = (np.searchsorted(ordered, mine_N, side) for side in ("left", "right"))
    left = np.flatnonzero(high > low)
    offset = 0
    while len(left):
        candidates = order[low[left] + offset]
        is_near = similarity(rows.minhash[left], held_out.minhash[candidates]) >= threshold
        result[left[is_near]] = candidates[is_near]
        offset += 1
        left = left[~is_near & (low[left] + offset < high[left])]
    return result
