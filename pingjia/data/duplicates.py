"""Rows that say what another row says: exactly, or nearly. (Across training and held-out files: leaks.py.)

Signatures are made row by row, in any process; comparing them is sorting. MinHash by `rensa`, bands by numpy.

Near means: character shingles with a Jaccard similarity of at least the threshold, AND the same numbers (with their
units, signs and codes) and negations in the same order. 保修三年 and 保修五年 are two facts, whatever else their rows
share. An answer not half as long as what it answers must be the same, or 正面 and 负面 would be near. Rows that differ
in another word, 免费 and 收费, can be.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from pingjia.data.columns import Column, among, gather, numbers, pieces
from pingjia.types import Example, Message

NUM_PERM = 128
_SEED = 42
SHINGLE = 3
NUM_BANDS = 21  # of 6 values each: a pair of similarity 0.85 meets in one of them always, of 0.7 with 93 %
_ROWS = NUM_PERM // NUM_BANDS
_MAX_ROUNDS = 32  # of comparing all rows with the first of their buckets; what is open then, with its neighbours:
_MAX_APART = 32
_BATCH = 1 << 13

# What two rows must have in common to be near, in lower case. A unit belongs to a number: 3年 is not 3个月.
_ONES = "零〇一二两三四五六七八九十百千万亿半兩萬億壹贰貳叁參肆伍陆陸柒捌玖拾佰仟廿卅俩仨"
_UNIT = r"(?:\s*(?:%|°[cf]?|[a-z]{1,3}|[个個]?[\u4e00-\u9fff]))?"
_DIGITS = re.compile(rf"\d+(?:[-.,:/]\d+)*{_UNIT}")
_BEFORE_DIGITS = re.compile(r"(?:[-−+*/×÷<>≤≥≠=±^~$¥€£]\s?)?(?:[a-z]{1,8}-?)?$")  # -5 is not 5, nor KL-200 KM-200
_HAN = re.compile(rf"[{_ONES}]+{_UNIT}|[上下中]午|凌晨|[早晚]上|[不没沒无無非未别別勿莫毋否禁免拒]")
_LATIN = re.compile(r"[a-z]+(?:['’][a-z]+)?")
# Without "one", "second", "may": mostly they are no numbers, and a number they are exchanged for is here.
_LATIN_NUMBERS = frozenset(
    """
    zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen
    half quarter first third fourth fifth last once twice double triple
    monday tuesday wednesday thursday friday saturday sunday
    january february march april june july august september october november december
    """.split()  # noqa: SIM905
)
_LATIN_NEGATIONS = frozenset(
    """
    no not never none nor neither nobody nothing nowhere without cannot unable unavailable except unless
    """.split()  # noqa: SIM905
)
# Common words with a numeral in them; not in 十一下, 一万一千, 一个半小时.
_NO_NUMBER = re.compile(rf"(?<![{_ONES}])(?:一[下些个個样樣直起般定旦共同边邊]|万一|第一时间)(?![{_ONES}])|统一|唯一")


@dataclass(frozen=True, slots=True)
class Signature:
    """What a row is compared by.

    exact: 16 bytes, equal for conversations that differ in width, case or white space only. question: of the prompt
    alone. bands_B: uint64; minhash_P: the lowest 8 bits of each value, as uint8. Both of question and answer together.
    """

    exact: bytes
    question: int
    bands: np.ndarray
    minhash: np.ndarray


def signature(example: Example, *, near: bool = True) -> Signature:
    """The same in every process and on every platform. Without `near`, of use for equal rows and questions only."""
    turns = example.messages
    bands, minhash = _near_keys(turns) if near else _NO_KEYS
    return Signature(
        exact=_digest(turns, 16, example.tools),
        question=_number(_digest(turns[:-1], 8, example.tools)),
        bands=bands,
        minhash=minhash,
    )


_NO_KEYS = np.zeros(NUM_BANDS, "<u8"), np.zeros(NUM_PERM, np.uint8)


def _near_keys(turns: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """`Signature.bands` and `Signature.minhash`."""
    *asked, told = (_plain(m.text) for m in turns if m.role in ("user", "assistant"))
    question = " ".join(asked)
    letters, answer = _letters(f"{question} {told}"), _letters(told)
    meaning = _must_agree(f"{question} {told}") + (answer if 3 * len(answer) <= len(letters) else "")
    minhash = _minhash(letters)
    return _bands(minhash, meaning.encode("utf-8", "surrogatepass")), minhash.astype(np.uint8)


def text_digest(text: str) -> int:
    """`Signature.question` of a conversation that is this one question."""
    return _number(_digest([Message("user", text)], 8))


def _digest(turns: Sequence[Message], size: int, tools: Sequence[str] = ()) -> bytes:
    plain = "\0".join([*tools, *(f"{m.role}\0{_plain(m.text)}" for m in turns)])
    return blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little")


def _plain(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def _minhash(letters: str) -> np.ndarray:
    made = _rensa()(NUM_PERM, _SEED)
    made.update(_shingles(letters))
    return np.array(made.digest(), np.uint32)


@functools.cache
def _rensa() -> Any:
    from rensa import RMinHash

    return RMinHash


def _letters(plain: str) -> str:
    """The letters and digits; of a text without any, its signs."""
    return "".join(filter(str.isalnum, plain)) or "".join(c for c in plain if c.isprintable() and c != " ")


def _shingles(letters: str) -> list[str]:
    """Every 3 characters in a row; a shorter text is one shingle."""
    return list({letters[i : i + SHINGLE] for i in range(max(1, len(letters) - SHINGLE + 1))})


def _bands(minhash: np.ndarray, meaning: bytes) -> np.ndarray:
    """One key for each band: the hash of its values and of what must agree."""
    banded = minhash[: NUM_BANDS * _ROWS].astype("<u4").reshape(NUM_BANDS, _ROWS)
    keys = (blake2b(band.tobytes() + meaning, digest_size=8).digest() for band in banded)
    return np.frombuffer(b"".join(keys), "<u8")


def _must_agree(plain: str) -> str:
    """The numbers and negations of a text in order: rows in which they differ are never near."""
    found = [_sign_or_code(plain, m.start()) + m[0] for m in _DIGITS.finditer(plain)]
    if not plain.isascii():
        found += ["", *_HAN.findall(_NO_NUMBER.sub("", plain))]
    found += ["", *_latin(_LATIN.findall(plain))]
    return "\0".join(["", *found, ""]).replace(" ", "")


def _sign_or_code(plain: str, at: int) -> str:
    """What stands right before the digits at `at` and belongs to them."""
    found = _BEFORE_DIGITS.search(plain, max(0, at - 10), at)
    return found[0] if found else ""


def _latin(words: list[str]) -> Iterator[str]:
    """Numbers, each with the start of the word after it, and negations."""
    for word, after in itertools.pairwise([*words, ""]):
        if word.removesuffix("s") in _LATIN_NUMBERS:
            yield f"{word} {after[:3]}"
        elif word in _LATIN_NEGATIONS or word.endswith(("n't", "n’t")):
            yield word.replace("’", "'")


# ---- comparing


@dataclass(frozen=True, slots=True)
class Signatures:
    """Columns of N rows: exact_N2 (two uint64), question_N, bands_BN, minhash_NP; each an array, or a file."""

    exact: Column
    question: Column
    bands: Sequence[Column]
    minhash: Column

    @classmethod
    def of(cls, rows: Sequence[Signature]) -> Signatures:
        exact = np.frombuffer(b"".join(r.exact for r in rows), "<u8").reshape(-1, 2)
        question = np.array([r.question for r in rows], np.uint64)
        bands = np.stack([r.bands for r in rows], axis=1) if rows else np.zeros((NUM_BANDS, 0), np.uint64)
        minhash = np.stack([r.minhash for r in rows]) if rows else np.zeros((0, NUM_PERM), np.uint8)
        return cls(exact, question, list(bands), minhash)

    def __len__(self) -> int:
        return len(self.question)


def find_exact(signatures: Signatures, alive: np.ndarray | None = None) -> np.ndarray:
    """int32 [N]: the first row with the same conversation, or -1 for the first itself; of rows where `alive` only."""
    size = len(signatures)
    result = np.full(size, -1, np.int32)
    for rows, exact in pieces(signatures.exact, numbers(np.ones(size, bool) if alive is None else alive)):
        ordered, start = _buckets(joined(exact), rows)
        is_later = start != np.arange(len(ordered))
        result[ordered[is_later]] = ordered[start[is_later]]
    return result


def joined(exact: np.ndarray) -> np.ndarray:
    """Both halves as one value that sorts and compares."""
    return np.ascontiguousarray(exact).view([("a", "<u8"), ("b", "<u8")]).reshape(-1)


def find_near(signatures: Signatures, threshold: float, alive: np.ndarray) -> np.ndarray:
    """int32 [N]: an earlier row that stays and is nearly the same, or -1.

    Only rows where `alive` take part. Greedy in order: a row goes if it is near one that stays, so in a chain
    A ~ B ~ C with A and C apart, B goes and C stays. Similarity is estimated from the signatures (standard error 0.03).
    Memory: about 16 bytes a row, however many rows are near each other.
    """
    result = np.full(len(signatures), -1, np.int32)
    rows = _with_neighbours(signatures, numbers(alive))
    for _ in range(_MAX_ROUNDS):
        if len(rows):
            rows = _follow_sure(signatures, threshold, rows, result)
    _settle(_near_pairs(signatures, threshold, rows), result)
    return result


def _with_neighbours(signatures: Signatures, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` that share a bucket with another."""
    has_any = np.zeros(len(signatures), bool)
    for band in signatures.bands:
        for piece, keys in pieces(band, rows):
            order = np.argsort(keys)
            keys = keys[order]
            is_same = keys[1:] == keys[:-1]
            has_any[piece[order[1:][is_same]]] = True
            has_any[piece[order[:-1][is_same]]] = True
    return among(rows, has_any)


def _buckets(keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(`rows` sorted by bucket, then by number; for each the place where its bucket starts)."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    is_new = np.ones(len(keys), bool)
    is_new[1:] = keys[1:] != keys[:-1]
    return rows[order], np.maximum.accumulate(np.where(is_new, np.arange(len(keys)), 0))


def _all_buckets(signatures: Signatures, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The buckets of all bands, as many at a time as are sorted together."""
    for band in signatures.bands:
        for piece, keys in pieces(band, rows):
            yield _buckets(keys, piece)


def _follow_sure(signatures: Signatures, threshold: float, rows: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Decide what is sure, and return the rows that are still open. No list of pairs is made.

    A row that is first in all its buckets stays: there is no earlier one to repeat. Those near it go. Both are compared
    with all they meet then, so the next ones in their buckets are first. (Parallel greedy, arXiv:1202.3205.)
    """
    is_sure = np.ones(len(result), bool)
    for ordered, start in _all_buckets(signatures, rows):
        is_sure[ordered[start != np.arange(len(ordered))]] = False
    for band in signatures.bands:
        for piece, keys in pieces(band, among(rows, result == -1)):
            ordered, start = _buckets(keys, piece)
            first = ordered[start]
            met = (first != ordered) & is_sure[first]
            later, earlier = verified(signatures, ordered[met], signatures, first[met], threshold)
            result[later] = earlier
    return among(rows, (result == -1) & ~is_sure)


def _near_pairs(signatures: Signatures, threshold: float, rows: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2]: (later, earlier) of those of `rows` that are near, in order."""
    size = max(1, len(signatures))
    found = np.zeros(0, np.int64)
    for ordered, start in _all_buckets(signatures, rows):
        pairs = [_near_apart(signatures, threshold, ordered, start, apart) for apart in range(1, _MAX_APART + 1)]
        far = np.arange(len(ordered)) - start > _MAX_APART
        pairs.append(verified(signatures, ordered[far], signatures, ordered[start[far]], threshold))
        coded = (later.astype(np.int64) * size + earlier for later, earlier in pairs)
        found = np.unique(np.concatenate([found, *coded]))
    return np.stack(np.divmod(found, size), axis=1)


def _near_apart(
    signatures: Signatures, threshold: float, ordered: np.ndarray, start: np.ndarray, apart: int
) -> tuple[np.ndarray, np.ndarray]:
    """Near pairs of rows that are so far apart in one bucket."""
    at = np.flatnonzero(np.arange(len(ordered)) - start >= apart)
    return verified(signatures, ordered[at], signatures, ordered[at - apart], threshold)


def _settle(pairs: np.ndarray, result: np.ndarray) -> None:
    """Walk the pairs in order of the later row: whether the earlier one stays is known by then."""
    for later, earlier in pairs.tolist():
        if result[later] == -1 and result[earlier] == -1:
            result[later] = earlier


def verified(
    left: Signatures, left_rows: np.ndarray, right: Signatures, right_rows: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Those pairs of `left_rows` and `right_rows` that are near."""
    is_near = np.zeros(len(left_rows), bool)
    for start in range(0, len(left_rows), _BATCH):
        batch = slice(start, start + _BATCH)
        a, b = gather(left.minhash, left_rows[batch]), gather(right.minhash, right_rows[batch])
        is_near[batch] = similarity(a, b) >= threshold
    return left_rows[is_near], right_rows[is_near]


def similarity(left_NP: np.ndarray, right_NP: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity, row by row: the share of equal values less those that 8 bits make equal by chance
    (b-bit minwise hashing, arXiv:0910.3349)."""
    equal = (left_NP == right_NP).mean(axis=-1)
    return np.asarray((256 * equal - 1) / 255)
