"""A grammar -> which tokens may come next, by llguidance. Compiling happens before a request joins, never in a step.

Everything a stranger can send is bounded: the length of the text (types.Grammar), the work of compiling, the work and
the states of a step, and how many compiled grammars are kept. Not here: what a request may ask for (types.py) and how
the choice among the allowed tokens is made (sample.py).
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any

import llguidance
import numpy as np
import torch

from pingjia.chat import StreamDecoder, Tokenizer
from pingjia.chat.tokenizer import ByteStream
from pingjia.types import Grammar

_MAX_KEPT = 32
_MAX_MULTIPLE = 10_000
# Sizes are those of llguidance, which gives the speeds: about 50,000 units of fuel or 20,000 items in a millisecond.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=500_000,
    step_max_items=50_000,
    max_lexer_states=8_000,  # one or two kB each
    max_grammar_size=200_000,
    verbose_errors=False,
)
# Without a bound a model that likes line breaks would write nothing else: white space is allowed nearly everywhere.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\r\t]{1,32}"}
_META = re.compile(r"([\\.+*?()|\[\]{}^$])")


class DeadEnd(Exception):
    """The grammar allows no token at all, or a step's work on it went over the bounds."""


class Matcher:
    """How far one answer has come in its grammar. Lives as long as the request, preemption or not."""

    def __init__(self, compiled: Any, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._compiled = compiled
        self._vocab_size = vocab_size
        self._stop_ids = stop_ids

    def allowed_V(self) -> torch.Tensor:
        """bool [V]: the tokens that may come next; stop tokens only where the answer may end. Raises DeadEnd."""
        bits = np.frombuffer(self._compiled.compute_bitmask(), np.uint8)
        if self._compiled.is_error():
            raise DeadEnd(_one_line(self._compiled.get_error()))
        allowed_V = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)
        if not allowed_V.any():
            raise DeadEnd("no token of this model can come next")
        return torch.from_numpy(allowed_V)

    def accept(self, token_id: int) -> bool:
        """Go on by an allowed token; return whether the answer is complete, so that nothing but its end may follow."""
        if token_id not in self._stop_ids and not self._compiled.consume_token(token_id):
            raise DeadEnd(_one_line(self._compiled.get_error()))
        return bool(self._compiled.is_stopped())


class Grammars:
    """The compiled grammars of one model, the latest few kept. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()
        self._vocabulary: Any = None
        self._vocabulary_lock = threading.Lock()  # a table of all tokens takes up to a second, once

    def matcher(self, grammar: Grammar) -> Matcher:
        """A fresh matcher. A new grammar takes milliseconds, about a second at most; one that is kept, microseconds.

        Raises RequestError: not a grammar, one that cannot be met, one over the bounds, or a model whose tokens have
        no fixed text.
        """
        with self._lock:
            compiled = self._kept.get(grammar)
        if compiled is None:  # outside the lock: a slow one must not hold up those that are kept
            compiled = self._compile(grammar)
        with self._lock:
            self._kept[grammar] = compiled
            self._kept.move_to_end(grammar)
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
            return Matcher(compiled.deep_copy(), self._vocab_size, self._tokenizer.stop_ids)

    def stream(self) -> StreamDecoder:
        """A decoder that shows exactly the text the grammar saw: no finishing touches, which could break it."""
        return ByteStream(lambda token: self._tokenizer.token_bytes(token) or b"")

    def _compile(self, grammar: Grammar) -> Any:
        try:
            source = _SOURCES[grammar.kind](grammar)
        except ValueError as e:
            raise grammar.refusal(_one_line(str(e))) from None
        compiled = llguidance.LLMatcher(self._tokens(grammar), source, log_level=0, limits=_LIMITS)
        if compiled.is_error():
            raise grammar.refusal(_one_line(compiled.get_error()))
        self._refuse_unmeetable(grammar, compiled)
        return compiled

    def _tokens(self, grammar: Grammar) -> Any:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer, self._vocab_size, grammar)
            return self._vocabulary

    def _refuse_unmeetable(self, grammar: Grammar, compiled: Any) -> None:
        try:
            Matcher(compiled.deep_copy(), self._vocab_size, self._tokenizer.stop_ids).allowed_V()
        except DeadEnd as e:
            reason = "no text fits it" if "NoExtension" in str(e) else str(e)
            raise grammar.refusal(f"cannot be met: {reason}") from None


class _Tokens:
    """The vocabulary as llguidance wants it, which also asks how forced text is best cut into tokens."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], stop_ids: list[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = None
        self.special_token_ids = [i for i, token in enumerate(tokens) if not token]
        self._tokenizer = tokenizer
        self._id_of = {token: i for i, token in reversed(list(enumerate(tokens))) if token}
        self._longest = max(map(len, self._id_of), default=0)

    def __call__(self, text: str) -> list[int]:
        data = text.encode()
        ids = self._tokenizer.encode(text)
        if b"".join(self.tokens[i] for i in ids) == data:
            return ids
        return self._longest_first(data)  # SentencePiece adds a space in front, and changes some characters

    def _longest_first(self, data: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._id_of), None)
            if end is None:
                break  # no token for what follows
            ids.append(self._id_of[data[start:end]])
            start = end
        return ids


def _vocabulary(tokenizer: Tokenizer, vocab_size: int, grammar: Grammar) -> Any:
    tokens = [tokenizer.token_bytes(i) for i in range(min(tokenizer.vocab_size, vocab_size))]
    known = [token for token in tokens if token is not None]
    stop_ids = sorted(i for i in tokenizer.stop_ids if i < len(known))
    if len(known) < len(tokens) or not stop_ids:
        reason = "has no stop token" if len(known) == len(tokens) else "has tokens without a text of their own"
        raise grammar.refusal(f"this model's tokenizer {reason}, so its answers cannot be held to a grammar")
    known += [b""] * (vocab_size - len(known))
    wrapped = llguidance.TokenizerWrapper(_Tokens(tokenizer, known, stop_ids))
    return llguidance.LLTokenizer(wrapped, n_vocab=vocab_size, eos_token=stop_ids)


def _schema(grammar: Grammar) -> str:
    schema = json.loads(grammar.text)
    if schema is False:
        raise grammar.refusal("cannot be met: the schema false allows nothing")
    _refuse_fine_multiples(grammar, schema)
    text = "{}" if schema is True else grammar.text
    return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))


def _refuse_fine_multiples(grammar: Grammar, schema: Any) -> None:
    """multipleOf costs a state for each remainder, of the common multiple where several meet.

    A million took 10 seconds and 300 MB, and no other bound stopped it.
    """
    common = math.lcm(*map(_digits, _values_of("multipleOf", schema)))
    if common > _MAX_MULTIPLE:
        raise grammar.refusal(
            f"the common multiple of its multipleOf digits is {common}; at most {_MAX_MULTIPLE}: use rounder ones"
        )


def _digits(value: Any) -> int:
    digits = Decimal(str(value)).as_tuple().digits if type(value) in (int, float) else ()
    return int("".join(map(str, digits)) or "0") or 1


def _values_of(key: str, node: Any) -> Iterator[Any]:
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield from (value for name, value in node.items() if name == key)
            stack += node.values()
        elif isinstance(node, list):
            stack += node


def _object(grammar: Grammar) -> str:
    return str(llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_OPTIONS))


def _regex(grammar: Grammar) -> str:
    """The whole answer has to match anyway, so anchors at the ends say nothing new; the library knows none."""
    pattern = grammar.text.removeprefix("^")
    if re.search(r"(?<!\\)(?:\\\\)*\$$", pattern):
        pattern = pattern[:-1]
    return str(llguidance.LLMatcher.grammar_from_regex(pattern))


def _choice(grammar: Grammar) -> str:
    choices: Sequence[str] = json.loads(grammar.text)
    return str(llguidance.LLMatcher.grammar_from_regex("|".join(_META.sub(r"\\\1", c) for c in choices)))


_SOURCES: dict[str, Callable[[Grammar], str]] = {
    "json_schema": _schema, "json_object": _object, "regex": _regex, "choice": _choice,
}  # fmt: skip


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."
