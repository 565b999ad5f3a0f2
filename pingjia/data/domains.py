"""Which domain a row belongs to: as its field says, by a file of rules, or by grouping rows of similar meaning."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pingjia.errors import DataError, RecipeError
from pingjia.recipe import read_yaml
from pingjia.types import Example

_MAX_PATTERN = 500  # characters
_MAX_DOTS = 2
_MAX_TEXT = 4000


# ---- by rules


@dataclass(frozen=True, slots=True)
class DomainRules:
    """domain -> words and /regular expressions/. Picklable; patterns are compiled where they are used."""

    patterns: tuple[tuple[str, str], ...]

    def domain_of(self, example: Example) -> str | None:
        """The domain with the most hits in question and answer; the earlier one in the file among equals.

        The first 4,000 characters count; a system prompt, which is the same in every row, does not.
        """
        text = "\n".join(m.text for m in example.messages if m.role in ("user", "assistant"))[:_MAX_TEXT]
        hits = {name: sum(map(bool, re.findall(pattern, text, re.IGNORECASE))) for name, pattern in self.patterns}
        best = max(hits, key=lambda name: hits[name], default=None)
        return best if best is not None and hits[best] else None


def load_rules(path: str | Path) -> DomainRules:
    """Read a YAML file of `domain: [word, /pattern/, ...]`. RecipeError naming the domain and the entry for a bad one.

    A word of Latin letters must stand alone (order does not match border); others match anywhere.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict) or not raw:
        raise RecipeError(f"{path}: expected domain: [word, /pattern/, ...], one domain per line")
    return DomainRules(tuple((_name(path, name), _joined(path, name, entries)) for name, entries in raw.items()))


def _name(path: str | Path, name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise RecipeError(f"{path}: domain {name!r:.60} is no text; write it in quotes")
    return name


def _joined(path: str | Path, name: str, entries: Any) -> str:
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list) or not entries:
        raise RecipeError(f"{path}: {name}: must be a word or a list of words, not {entries!r:.60}")
    try:
        return "|".join(f"(?:{_pattern(entry)})" for entry in entries)
    except ValueError as e:
        raise RecipeError(f"{path}: {name}: {e}") from None


def _pattern(entry: Any) -> str:
    """ValueError saying what is wrong with an entry."""
    text = str(entry).strip() if isinstance(entry, str | int) and not isinstance(entry, bool) else ""
    if not text:
        raise ValueError(f"{str(entry)!s:.60} is no word; write it in quotes")
    if len(text) > 2 and text.startswith("/") and text.endswith("/"):
        return _checked(text[1:-1])
    word = re.escape(text)
    return rf"(?<![A-Za-z]){word}(?![A-Za-z])" if text.isascii() else word


def _checked(pattern: str) -> str:
    shown = f"/{pattern:.60}/"
    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"{shown}: {len(pattern)} characters, {_MAX_PATTERN} are allowed")
    try:
        compiled = re.compile(pattern)
        re.compile(f"(?:{pattern})", re.IGNORECASE)  # as it stands among the others
    except re.error as e:
        raise ValueError(f"{shown} is no regular expression here: {e}") from None
    if compiled.groups:
        raise ValueError(f"{shown}: write groups as (?:...)")
    if compiled.search(""):
        raise ValueError(f"{shown} fits the empty text, so it would be found everywhere")
    if slow := _slow(pattern):
        raise ValueError(f"{shown} {slow}, which can take for ever on some texts; write it without")
    return pattern


_PIECE = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"  # an escape, or a set: what is in it is no sign
    r"|(?P<many>[*+]|\{\d*,\})|(?P<some>\?|\{\d*,\d+\})|(?P<times>\{\d+\})|(?P<open>\((?:\?[:=!]|\?<[=!])?)|(?P<close>\))|(?P<or>\|)",
    re.DOTALL,
)


def _slow(pattern: str) -> str:
    """What makes the time of a pattern grow beyond measure; "" if nothing known does.

    A repeated group in which a length or a choice is open can be read in exponentially many ways.
    """
    if len(re.findall(r"(?<!\\)\.(?:[*+]|\{\d*,\})", pattern)) > _MAX_DOTS:
        return f"has more than {_MAX_DOTS} of .*"
    groups: list[set[str]] = [set()]
    closed: set[str] = set()  # what is open in the group that ends right before this piece
    end = 0
    for piece in _PIECE.finditer(pattern):
        inside = closed if piece.start() == end else set()
        closed, end = set(), piece.end()
        kind = piece.lastgroup
        if kind in ("many", "times", "some") and "repetition" in inside and piece[0] != "?":
            return "repeats a repetition"
        if kind == "many" and "choice" in inside:
            return "repeats a choice"
        if kind == "open":
            groups.append(set())
        elif kind == "close":
            closed = groups.pop()
            groups[-1] |= closed
        elif kind in ("many", "some"):
            groups[-1].add("repetition")
        elif kind == "or":
            groups[-1].add("choice")
    return ""


# ---- by meaning


Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts -> float32 [N, H], one vector each."""
_BATCH = 1024
_SAMPLE = 20_000  # texts from which the groups are learnt and named
_NUM_WORDS = 3


@dataclass(frozen=True, slots=True)
class Clusters:
    """`label_N`: number of the group of each text; `names`: of the groups, from their most telling words."""

    label: np.ndarray
    names: tuple[str, ...]


def cluster(texts: Callable[[], Iterable[str]], num_texts: int, embed: Embed, num_clusters: int, seed: int) -> Clusters:
    """Group texts by meaning: k-means over the vectors of a sample drawn by `seed`, then every text to the next mean.

    `texts()` is called twice and must give the same texts. Memory: the sample and its vectors, and 4 bytes a text.
    """
    if not num_texts:
        return Clusters(np.zeros(0, np.int32), ())
    num_clusters = min(num_clusters, num_texts)
    sample = _sample(texts(), num_texts, seed)
    means = _means(np.concatenate([embed(batch) for batch in _batches(sample)]), num_clusters, seed)
    label = np.concatenate([means.predict(embed(batch)) for batch in _batches(texts())]).astype(np.int32)
    return Clusters(label, _names(sample, means.labels_, num_clusters))


def _sample(texts: Iterable[str], num_texts: int, seed: int) -> list[str]:
    """Texts from everywhere: files are often sorted, and their first rows are about one thing."""
    is_in = np.zeros(num_texts, bool)
    is_in[np.random.default_rng(seed).permutation(num_texts)[:_SAMPLE]] = True
    return [text for text, wanted in zip(texts, is_in.tolist(), strict=True) if wanted]


def _means(vectors_SH: np.ndarray, num_clusters: int, seed: int) -> Any:
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise DataError(
            "prepare.domains.clusters needs scikit-learn: pip install 'pingjia[data]', or give domains.rules"
        ) from None
    # Ten starts, each judged on all vectors: of 12 uneven groups 0.83-0.93 (adjusted Rand index), 0.76-0.84 with three.
    means = MiniBatchKMeans(num_clusters, random_state=seed, n_init=10, init_size=len(vectors_SH), batch_size=_BATCH)
    return means.fit(vectors_SH)


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    held: list[str] = []
    for text in texts:
        held.append(text)
        if len(held) == _BATCH:
            yield held
            held = []
    if held:
        yield held


def _names(texts: Iterable[str], label: np.ndarray, num_clusters: int) -> tuple[str, ...]:
    """ "cluster-1 (退款, 物流)": the words that are most over-represented in a group."""
    import jieba

    counts = [Counter[str]() for _ in range(num_clusters)]
    for text, group in zip(texts, label, strict=True):
        counts[group].update({w for w in jieba.cut(text[:500].lower()) if len(w) > 1 and w.isalpha()})
    total: Counter[str] = sum(counts, Counter())
    sizes = np.bincount(label, minlength=num_clusters)
    return tuple(f"cluster-{i + 1}{_told(_telling(counts[i], total, sizes, i))}" for i in range(num_clusters))


def _told(words: Sequence[str]) -> str:
    return f" ({', '.join(words)})" if words else ""


def _telling(mine: Counter[str], total: Mapping[str, int], sizes: np.ndarray, group: int) -> list[str]:
    share = float(sizes[group] / sizes.sum())
    gain = {word: count - share * total[word] for word, count in mine.items() if count > 1}
    return sorted(gain, key=lambda word: (-gain[word], word))[:_NUM_WORDS]
