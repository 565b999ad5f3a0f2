"""A corpus -> a Chinese BPE: a fresh vocabulary, or the tokens that a base's vocabulary lacks.

Here: what is read, what is counted, and how well a tokenizer does. Not here: how new tokens get into an existing
vocabulary (chat/extend.py), and the weights (models/vocabulary.py).

The merges of an extension are found by the trainer of `tokenizers`, on a corpus in which every token of the base is
one private-use character. So training goes on exactly where the base's training ended.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pingjia.chat.extend import BpeBase, Extension, Join, Pieces
from pingjia.chat.hf import HFTokenizer, Parts
from pingjia.chat.template import ChatTemplate
from pingjia.data.problems import Problem
from pingjia.data.read import read_examples
from pingjia.errors import DataError, ModelError

Texts = Callable[[], Iterable[str]]
"""Reads a corpus anew each time it is called."""
OnNote = Callable[[str], None]

HOLD_OUT_EVERY = 10
MAX_CHARACTERS = 8  # of one token: beyond are whole phrases of a form letter
MAX_LEARNT = 5_000_000  # characters the trainer is given; it keeps some 200 bytes for each
_BATCH = 256  # texts encoded at once

# Chinese characters, CJK punctuation and the full-width forms of ASCII up to U+FF3F. Each of these ranges is whole in
# UTF-8 from its first two bytes on: a token for such two bytes can never take part in a character outside of it.
CHINESE = "\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff3f\U00020000-\U0002ffff\U00030000-\U0003ffff"
_CHINESE = re.compile(f"[{CHINESE}]+")

# A word of other letters with the space or mark before it; Chinese; a digit; marks; white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+"
    r"|\p{Han}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ---- what is read


@dataclass(slots=True)
class Corpus:
    """Questions and answers of data files, read anew, row by row, each time they are asked for.

    Without `held_out` files every tenth row is held out. The counts are those of the latest reading. Raises DataError
    for a file that cannot be read; a single bad row is passed over and counted.
    """

    files: Sequence[str]
    held_out: Sequence[str] = ()
    num_rows: int = 0
    num_bad_rows: int = 0

    def learnt(self) -> Iterator[str]:
        """The texts to learn from."""
        return self._texts(self.files, lambda row: bool(self.held_out) or row % HOLD_OUT_EVERY != HOLD_OUT_EVERY - 1)

    def unseen(self) -> Iterator[str]:
        """The texts kept for measuring."""
        if self.held_out:
            return self._texts(self.held_out, lambda row: True)
        return self._texts(self.files, lambda row: row % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1)

    def _texts(self, files: Sequence[str], wanted: Callable[[int], bool]) -> Iterator[str]:
        self.num_rows = self.num_bad_rows = 0
        for row, example in enumerate(read_examples(files, on_problem=self._note)):
            self.num_rows += wanted(row)
            if wanted(row):
                yield from (m.text for m in example.messages if m.text)

    def _note(self, problem: Problem) -> None:
        if problem.line == 0:
            raise DataError(str(problem))
        self.num_bad_rows += 1


# ---- a fresh vocabulary


def train_fresh(texts: Texts, vocab_size: int, min_frequency: int, on_note: OnNote = lambda note: None) -> HFTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, with ChatML as its form of conversation.

    Any text is encoded and decoded without loss, whatever it was trained on. Pairs seen less than `min_frequency`
    times are not merged, so a small corpus gives fewer tokens. `texts` is read twice. Raises DataError for an empty
    corpus.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

    vocabulary = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    vocabulary.decoder = decoders.ByteLevel()
    sample = _Sample.of(sum(map(len, _some(texts()))), min_frequency, on_note)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=sample.min_frequency,
        special_tokens=[AddedToken(s, normalized=False, special=True) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    vocabulary.train_from_iterator(sample.take(texts()), trainer)
    tokens = {"eos_token": SPECIALS[2], "pad_token": SPECIALS[0]}
    ids = [vocabulary.get_vocab()[s] for s in SPECIALS]
    return HFTokenizer(Parts(vocabulary, ChatTemplate(CHATML, tokens), tokens, frozenset({ids[2]}), ids[0]))


def _some(texts: Iterable[str]) -> Iterator[str]:
    """The same texts; DataError when there is none."""
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise DataError("no text to learn from: the files hold no sound row; see `pingjia data check`")


@dataclass(frozen=True, slots=True)
class _Sample:
    """Which texts the trainer is given: all of them, or a share by lot, so that its memory has a bound."""

    share: float
    min_frequency: int

    @classmethod
    def of(cls, num_characters: int, min_frequency: int, on_note: OnNote) -> _Sample:
        share = min(1.0, MAX_LEARNT / num_characters)
        if share < 1:
            on_note(
                f"learning from a sample, {share:.0%} of the {num_characters:,} characters: more would only take memory"
            )
        return cls(share, max(2, round(min_frequency * share)))

    def take(self, texts: Iterable[str]) -> Iterator[str]:
        draw = random.Random(0).random  # noqa: S311  not a secret
        return (text for text in texts if self.share == 1 or draw() < self.share)


# ---- more tokens for a base


def extend(
    base: BpeBase, texts: Texts, num_tokens: int, min_frequency: int, on_note: OnNote = lambda note: None
) -> Extension:
    """The base with up to `num_tokens` Chinese tokens more: those that continuing its training on `texts` gives.

    Only Chinese characters and punctuation are merged, so texts without them keep their ids. `texts` is read twice.
    Raises DataError for an empty corpus, or one in which nothing Chinese is left to merge.
    """
    counts = Counter[str]()
    for text in _some(texts()):
        counts.update("".join(_CHINESE.findall(text)))
    alphabet = _Alphabet(base, sorted(c for c, count in counts.items() if count >= min_frequency))
    sample = _Sample.of(counts.total(), min_frequency, on_note) if counts else _Sample(1, min_frequency)
    merges = _train(alphabet, sample.take(texts()), num_tokens, sample.min_frequency)
    extension = base.extend(alphabet.joins(merges), num_tokens)
    if not extension.tokens:
        raise DataError(
            f"no Chinese character or word occurs {min_frequency} times and takes the base more than one token: there "
            "is nothing to add; give more text or a lower --min-frequency"
        )
    return extension


class _Alphabet:
    """Private-use characters for what the base writes Chinese with.

    A token that is Chinese text is one symbol. A character that takes several tokens is two, of its own: its first
    tokens and its last one. So the trainer weighs making it one token against all other merges. Halves come first in
    order, which is how the trainer settles ties: a character is complete before anything joins it.
    """

    _HALVES, _TOKENS = range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)

    def __init__(self, base: BpeBase, characters: Iterable[str]) -> None:
        self.base = base
        whole = [t for t, content in base.ordinary() if _is_chinese(content)]
        spelt = [p for c in characters if (p := base.pieces_of(c)) is not None and len(p) > 1]
        self._symbols: dict[Pieces, str] = {(t,): chr(c) for t, c in zip(whole, self._TOKENS, strict=False)}
        pairs = zip(self._HALVES[::2], self._HALVES[1::2], strict=True)
        self._symbols |= {p: chr(a) + chr(b) for p, (a, b) in zip(spelt, pairs, strict=False)}
        self._spelt_first = {p[0] for p in spelt}
        self._longest = max(map(len, self._symbols), default=0)
        self._pieces = {symbol: pieces for pieces, symbol in self._symbols.items()}

    def __len__(self) -> int:
        return sum(map(len, self._symbols.values()))

    def runs(self, word: Sequence[int]) -> Iterator[str]:
        """The stretches of a word that are Chinese, in symbols."""
        run, at = "", 0
        while at < len(word):
            symbol, size = self._symbol(word, at)
            if not symbol and run:
                yield run
            run = run + symbol if symbol else ""
            at += size
        if run:
            yield run

    def _symbol(self, word: Sequence[int], at: int) -> tuple[str, int]:
        if word[at] in self._spelt_first:
            for size in range(2, self._longest + 1):
                found = self._symbols.get(tuple(word[at : at + size]))
                if found:
                    return found, size
        return self._symbols.get((word[at],), ""), 1

    def joins(self, merges: Iterable[tuple[str, str]]) -> Iterator[Join]:
        """The trainer's merges in the base's pieces. What is too long, or half a character, is left out."""
        pieces = dict(self._pieces)
        for left, right in merges:
            if left + right in self._pieces:
                whole = self._pieces[left + right]
                yield Join(whole[:-1], whole[-1:])
            elif (
                left in pieces
                and right in pieces
                and self._num_characters(pieces[left] + pieces[right]) <= MAX_CHARACTERS
            ):
                pieces[left + right] = pieces[left] + pieces[right]
                yield Join(pieces[left], pieces[right])

    def _num_characters(self, pieces: Pieces) -> int:
        return len(b"".join(map(self.base.content, pieces)).decode())


def _is_chinese(content: bytes) -> bool:
    try:
        return _CHINESE.fullmatch(content.decode()) is not None
    except UnicodeDecodeError:
        return False


def _train(alphabet: _Alphabet, texts: Iterable[str], num_tokens: int, min_frequency: int) -> list[tuple[str, str]]:
    """The merges, most frequent first; more than are wanted, since some are passed over."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    vocabulary = tokenizers.Tokenizer(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 2 * num_tokens,
        min_frequency=min_frequency,
        max_token_length=2 * MAX_CHARACTERS,
        show_progress=False,
    )
    vocabulary.train_from_iterator(_in_symbols(alphabet, texts), trainer)
    return [(left, right) for left, right in json.loads(vocabulary.to_str())["model"]["merges"]]


def _in_symbols(alphabet: _Alphabet, texts: Iterable[str]) -> Iterator[str]:
    for batch in _batches(texts):
        for words in alphabet.base.words(batch):
            yield " ".join(run for word in words for run in alphabet.runs(word) if len(run) > 1)


# ---- how well it does


@dataclass(slots=True)
class Fit:
    """Characters of texts and the tokens they take, before and after. `num_before` is 0 without a base."""

    num_texts: int = 0
    num_characters: int = 0
    num_before: int = 0
    num_after: int = 0

    def add(self, text: str, num_before: int, num_after: int) -> None:
        self.num_texts += 1
        self.num_characters += len(text)
        self.num_before += num_before
        self.num_after += num_after

    @property
    def before(self) -> float | None:
        """Characters per token of the base; None without one, or without a text."""
        return self.num_characters / self.num_before if self.num_before else None

    @property
    def after(self) -> float | None:
        return self.num_characters / self.num_after if self.num_after else None


def measure(texts: Iterable[str], tokenizer: HFTokenizer) -> Fit:
    """How many tokens a tokenizer takes for `texts`."""
    fit = Fit()
    for batch in _batches(texts):
        for text, ids in zip(batch, _encode(tokenizer, batch), strict=True):
            fit.add(text, 0, len(ids))
    return fit


def compare(texts: Iterable[str], base: HFTokenizer, extension: Extension) -> Fit:
    """Tokens before and after, and the proof on every text that only new tokens differ.

    Raises ModelError when the new ids, spelt in the base's pieces, are not the base's ids of the same text.
    """
    fit = Fit()
    for batch in _batches(texts):
        ids = zip(batch, _encode(base, batch), _encode(extension.tokenizer, batch), strict=True)
        for text, before, after in ids:
            if extension.spelt(after) != list(before):
                raise ModelError(f"the extended vocabulary cuts the text that begins {text[:40]!r} in another way")
            fit.add(text, len(before), len(after))
    return fit


def _encode(tokenizer: HFTokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.vocabulary.encode_batch(list(texts), add_special_tokens=False)]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    left = iter(texts)
    while batch := list(islice(left, _BATCH)):
        yield batch
