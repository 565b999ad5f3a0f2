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

_MAX_PATTERN = 500  # characters; and no group is repeated inside a repeated group, which can take for ever
_NESTED = re.compile(r"\([^()]*[+*][^()]*\)\s*[+*{]")
_MAX_TEXT = 4000


# ---- by rules


@dataclass(frozen=True, slots=True)
class DomainRules:
    """domain -> words and /regular expressions/. Picklable; patterns are compiled where they are used."""

    patterns: tuple[tuple[str, str], ...]

    def domain_of(self, example: Example) -> str | None:
        """The domain with the most hits in question and answer; the earlier one in the file among equals."""
        text = "\n".join(m.text for m in example.messages)[:_MAX_TEXT]
        hits = {name: len(re.findall(pattern, text, re.IGNORECASE)) for name, pattern in self.patterns}
        best = max(hits, key=lambda name: hits[name], default=None)
        return best if best is not None and hits[best] else None


def load_rules(path: str | Path) -> DomainRules:
    """Read a YAML file of `domain: [word, /pattern/, ...]`. RecipeError naming the domain and the entry for a bad one.

    A word of Latin letters must stand alone (order does not match border); others match anywhere.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict) or not raw:
        raise RecipeError(f"{path}: expected domain: [word, /pattern/, ...], one domain per line")
    return DomainRules(tuple((str(name), _joined(path, str(name), entries)) for name, entries in raw.items()))


def _joined(path: str | Path, name: str, entries: Any) -> str:
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list) or not entries:
        raise RecipeError(f"{path}: {name}: must be a word or a list of words, not {entries!r:.60}")
    return "|".join(f"(?:{_pattern(path, name, entry)})" for entry in entries)


def _pattern(path: str | Path, name: str, entry: Any) -> str:
    text = str(entry).strip() if isinstance(entry, str | int | float) and not isinstance(entry, bool) else ""
    if not text:
        raise RecipeError(f"{path}: {name}: {entry!r:.60} is no word")
    if not (len(text) > 2 and text.startswith("/") and text.endswith("/")):
        word = re.escape(text)
        return rf"(?<![A-Za-z]){word}(?![A-Za-z])" if text.isascii() else word
    pattern = text[1:-1]
    if len(pattern) > _MAX_PATTERN or _NESTED.search(pattern):
        raise RecipeError(f"{path}: {name}: {text:.60} is too long, or repeats a repetition, which can take for ever")
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise RecipeError(f"{path}: {name}: {text:.60} is no regular expression: {e}") from None
    if compiled.groups:
        raise RecipeError(f"{path}: {name}: {text:.60}: write groups as (?:...)")
    return pattern


# ---- by meaning


Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts -> float32 [N, H], one vector each."""
_BATCH = 1024
_NUM_WORDS = 3


@dataclass(frozen=True, slots=True)
class Clusters:
    """`label_N`: number of the group of each text; `names`: of the groups, from their most telling words."""

    label: np.ndarray
    names: tuple[str, ...]


def cluster(texts: Callable[[], Iterable[str]], num_texts: int, embed: Embed, num_clusters: int, seed: int) -> Clusters:
    """Group texts by meaning: k-means over their vectors, learnt in batches.

    `texts()` is called three times and must give the same texts. Memory: the vectors of one batch, and 4 bytes a text.
    """
    num_clusters = min(num_clusters, num_texts)
    means = _means(texts, embed, num_clusters, seed)
    label = np.concatenate([means.predict(embed(batch)) for batch in _batches(texts())]).astype(np.int32)
    return Clusters(label, _names(texts(), label, num_clusters))


def _means(texts: Callable[[], Iterable[str]], embed: Embed, num_clusters: int, seed: int) -> Any:
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise DataError(
            "prepare.domains.clusters needs scikit-learn: pip install 'pingjia[data]', or give domains.rules"
        ) from None
    means = MiniBatchKMeans(num_clusters, random_state=seed, n_init=3, batch_size=_BATCH)
    for batch in _batches(texts()):
        if len(batch) >= num_clusters:  # a shorter last batch has too few rows to choose first centres from
            means.partial_fit(embed(batch))
    return means


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
