"""More tokens for a BPE vocabulary: the surgery, and the means to prove that nothing else changed.

The new tokens are ordinary BPE merges put behind the base's own. BPE merges in order of rank, so every text is first
cut exactly as the base cuts it; only then are the new merges applied to the result. Added tokens in the sense of
`tokenizers` would be matched in the raw text instead: before the base's own split, wherever the letters stand, and
slower the more there are.

Not here: which tokens a corpus is worth (data/bpe.py) and their embeddings (models/vocabulary.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pingjia.chat.hf import HFTokenizer
from pingjia.chat.pieces import token_bytes
from pingjia.chat.tokenizer import Tokenizer
from pingjia.errors import ModelError

Pieces = tuple[int, ...]
"""Token ids of the base that spell something."""


@dataclass(frozen=True, slots=True)
class Join:
    """One merge to add: what `left` and `right` spell becomes one token.

    Each is a token of the base (one id), an earlier join, or the first bytes of a character.
    """

    left: Pieces
    right: Pieces

    @property
    def whole(self) -> Pieces:
        return self.left + self.right


@dataclass(frozen=True, slots=True)
class NewToken:
    """`content` is what it stands for; the first bytes of a character, where one takes several steps, are no text."""

    id: int
    content: bytes
    pieces: Pieces

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")


@dataclass(frozen=True)
class Extension:
    """A tokenizer with new tokens, and what they are. Their ids follow one another."""

    tokenizer: HFTokenizer
    tokens: tuple[NewToken, ...]

    @cached_property
    def _pieces(self) -> dict[int, Pieces]:
        return {token.id: token.pieces for token in self.tokens}

    def spelt(self, ids: Iterable[int]) -> list[int]:
        """`ids` with every new token spelt in the base's pieces: the base's own ids of the same text."""
        return [piece for token in ids for piece in self._pieces.get(token, (token,))]

    @cached_property
    def digest(self) -> str:
        """sha256 hex of the new tokens: id and pieces of each."""
        return hashlib.sha256(json.dumps([(t.id, t.pieces) for t in self.tokens]).encode()).hexdigest()


class BpeBase:
    """A BPE vocabulary as its extension sees it. Raises ModelError for a vocabulary that cannot be extended so."""

    def __init__(self, tokenizer: Tokenizer, name: str = "the base") -> None:
        if not isinstance(tokenizer, HFTokenizer):
            raise ModelError(_no_chatglm(tokenizer, name))
        self.tokenizer = tokenizer
        self._spec: dict[str, Any] = json.loads(tokenizer.vocabulary.to_str())
        to_bytes = token_bytes(tokenizer.vocabulary)
        problem = _problem(self._spec)
        if problem or to_bytes is None:
            raise ModelError(
                f"{name}: this vocabulary cannot be extended: {problem or 'its decoder is not known here'}; choose a "
                "base with a byte-level BPE, as of Llama 3, Qwen, SmolLM2 or GLM-4"
            )
        self._to_bytes = to_bytes
        self._added = {t["content"]: t["id"] for t in self._spec["added_tokens"]}
        self._strings = {i: text for text, i in self._spec["model"]["vocab"].items() if text not in self._added}
        self._bytes: dict[int, bytes] = {}
        self.first_new: int = 1 + max(*self._spec["model"]["vocab"].values(), *self._added.values(), 0)

    @property
    def by_character(self) -> bool:
        """Whether characters are looked up whole, and spelt in bytes only when they are unknown (SentencePiece)."""
        return bool(self._spec["model"].get("byte_fallback"))

    def content(self, token: int) -> bytes:
        """The bytes a token stands for; none for added tokens and ids beyond the vocabulary."""
        found = self._bytes.get(token)
        if found is None:
            text = self._strings.get(token)
            found = self._bytes[token] = b"" if text is None else self._to_bytes(text)
        return found

    def ordinary(self) -> Iterator[tuple[int, bytes]]:
        """Every token that is not an added one."""
        return ((token, self.content(token)) for token in sorted(self._strings))

    def pieces_of(self, text: str) -> Pieces | None:
        """How the base spells `text` by itself; None when it changes the text or drops part of it."""
        ids, wanted = self.tokenizer.encode(text), text.encode()
        ends = (ids[start:] for start in range(len(ids)))  # SentencePiece puts a space in front of every text
        return next((tuple(end) for end in ends if b"".join(map(self.content, end)) == wanted), None)

    def words(self, texts: Sequence[str]) -> Iterator[list[list[int]]]:
        """For each text the ids of its words: no merge ever crosses from one word to the next."""
        for encoding in self.tokenizer.vocabulary.encode_batch(list(texts), add_special_tokens=False):
            yield _by_word(encoding.ids, encoding.word_ids)

    def extend(self, joins: Iterable[Join], num_tokens: int) -> Extension:
        """Add the first `num_tokens` tokens that `joins` make, in this order.

        A join is passed over when its parts are no tokens (they were passed over themselves), or when the base would
        never cut its text into these pieces. Fewer tokens come out when there are no more joins.
        """
        growth = _Growth(self, self._spec["model"]["vocab"])
        for join in joins:
            if len(growth.tokens) < num_tokens:
                growth.add(join, num_tokens)
        return Extension(self.tokenizer.with_vocabulary(self._grown(growth)), tuple(growth.tokens))

    def _grown(self, growth: _Growth) -> Any:
        import tokenizers

        model = self._spec["model"]
        # Added tokens get an entry in the model too: without one, `tokenizers` numbers them behind its last token.
        vocab = model["vocab"] | self._added | growth.strings
        merges = [*model["merges"], *growth.merges]
        spec = {**self._spec, "model": {**model, "vocab": vocab, "merges": merges}}
        return tokenizers.Tokenizer.from_str(json.dumps(spec))

    def string(self, token: int) -> str:
        """A token as the vocabulary writes it."""
        return self._strings[token]


class _Growth:
    """The new part of a vocabulary while it grows."""

    def __init__(self, base: BpeBase, vocab: dict[str, int]) -> None:
        self._base, self._vocab = base, vocab
        self._known: dict[Pieces, str] = {}
        self.strings: dict[str, int] = {}
        self.merges: list[list[str]] = []
        self.tokens: list[NewToken] = []

    def add(self, join: Join, num_tokens: int) -> None:
        if self._is_cut_otherwise(join.whole):
            return
        steps = self._steps(join)
        if steps and len(self.tokens) + len(steps) <= num_tokens:
            for step in steps:
                self._take(step)

    def _is_cut_otherwise(self, whole: Pieces) -> bool:
        text = b"".join(map(self._base.content, whole)).decode("utf-8", "replace")
        return self._base.pieces_of(text) != whole

    def _steps(self, join: Join) -> list[Join]:
        """The joins that are still to be made for this one, itself last; none when it cannot be made."""
        if not self._is_token(join.right):
            return []
        if self._is_spelt_in_bytes(join) or self._is_token(join.left):
            return [] if self._is_taken(self._string(join)) else [join]
        if self._is_text(join.left):
            return []
        before = self._steps(Join(join.left[:-1], join.left[-1:]))
        return [*before, join] if before else []

    def _is_spelt_in_bytes(self, join: Join) -> bool:
        """A character that the base looks up whole and does not know: an entry is all it takes."""
        return self._base.by_character and not self._is_text(join.left)

    def _is_taken(self, string: str) -> bool:
        return string in self._vocab or string in self.strings

    def _is_text(self, pieces: Pieces) -> bool:
        try:
            b"".join(map(self._base.content, pieces)).decode()
        except UnicodeDecodeError:
            return False
        return True

    def _is_token(self, pieces: Pieces) -> bool:
        return len(pieces) == 1 or pieces in self._known

    def _string_of(self, pieces: Pieces) -> str:
        return self._known[pieces] if pieces in self._known else "".join(map(self._base.string, pieces))

    def _string(self, join: Join) -> str:
        if self._is_spelt_in_bytes(join):
            return b"".join(map(self._base.content, join.whole)).decode()
        return self._string_of(join.left) + self._string_of(join.right)

    def _take(self, join: Join) -> None:
        string = self._string(join)
        if not self._is_spelt_in_bytes(join):
            self.merges.append([self._string_of(join.left), self._string_of(join.right)])
        token = self._base.first_new + len(self.tokens)
        self._known[join.whole] = string
        self.strings[string] = token
        self.tokens.append(NewToken(token, b"".join(map(self._base.content, join.whole)), join.whole))


def _no_chatglm(tokenizer: Tokenizer, name: str) -> str:
    return (
        f"{name}: the vocabulary of {tokenizer.family} is not extended: its special tokens have fixed ids right behind "
        f"its words ({tokenizer.vocab_size:,} in all), so new ones have no place, and it is a Chinese vocabulary "
        "already; tune it as it is"
    )


def _problem(spec: dict[str, Any]) -> str | None:
    """Why a vocabulary does not take new merges, if so."""
    model, decoder = spec["model"], spec["decoder"] or {}
    if model["type"] != "BPE":
        return f"it is a {model['type']}, not a BPE"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its pieces carry marks for their place in a word"
    if model.get("dropout"):
        return f"it cuts at random (dropout {model['dropout']})"
    if decoder.get("type") != "ByteLevel" and not model.get("byte_fallback"):
        return "it has no way to write a character it does not know"
    return None


def _by_word(ids: Sequence[int], words: Sequence[int | None]) -> list[list[int]]:
    """Ids in groups of the same word. Added tokens have no word; each stands alone."""
    groups: list[list[int]] = []
    before: int | None = None
    for token, word in zip(ids, words, strict=True):
        if word is None or word != before:
            groups.append([])
        groups[-1].append(token)
        before = word
    return groups
