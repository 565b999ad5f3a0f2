"""Rewording a question by translating it there and back: a maker of rows for `augment.py`.

What must not change goes through the translators as short codes (XQ0, XQ1, ...). A translation that lost, doubled or
reordered one is refused, never repaired by guessing. Not here: the translators (`translation.py`,
`models/translator.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pingjia.data.augment import Refusal, Task
from pingjia.data.settings import BackTranslationSettings
from pingjia.data.spans import Span, breach, protected_spans
from pingjia.data.translation import EndpointTranslator, Translator
from pingjia.errors import PingjiaError, UserError
from pingjia.language import identify
from pingjia.script import count_letters

# Latin letters and digits: every vocabulary has them, and they read as a name. The first that the text has not is used.
_PREFIXES = ("XQ", "ZK", "QV", "JX")
_CJK = re.compile("[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7a3\uff00-\uffef“”‘’…—]")
_MIN_RATIO, _MAX_RATIO = 0.4, 2.5  # characters of the new wording / of the old one


@dataclass(frozen=True, slots=True)
class Masked:
    """A text with codes `prefix`0, `prefix`1, ... in place of `pieces`."""

    text: str
    pieces: tuple[str, ...]
    prefix: str


class BackTranslation:
    """Words questions of the language `source` as `backward` returns what `forward` made of them.

    Negations are translated, not coded, and compared afterwards. One wording per text: a second copy is refused.
    """

    def __init__(self, forward: Translator, backward: Translator, source: str = "zh") -> None:
        self._forward = forward
        self._backward = backward
        self._source = source

    def make(self, tasks: Sequence[Task]) -> list[str | Refusal]:
        spans = [protected_spans(task.text, task.facts) for task in tasks]
        masked = [self._masked(task, s) for task, s in zip(tasks, spans, strict=True)]
        abroad = _each(self._forward, [m.text if isinstance(m, Masked) else m for m in masked])
        abroad = [_whole(m, text) for m, text in zip(masked, abroad, strict=True)]
        home = _each(self._backward, abroad)
        rows = zip(tasks, spans, masked, home, strict=True)
        return [_restored(task.text, s, m, text) for task, s, m, text in rows]

    def _masked(self, task: Task, spans: Sequence[Span]) -> Masked | Refusal:
        if task.copy > 1:
            return Refusal("no_variant", "a translator gives one wording of a text; use a ratio of at most 1")
        lang = identify(task.text).lang
        if lang not in (self._source, "mixed"):
            return Refusal("other_language", f"the question is in {lang}, the translators take {self._source}")
        masked = mask(task.text, spans)
        return masked or Refusal("nothing_to_translate", "everything in it is protected")


def mask(text: str, spans: Sequence[Span]) -> Masked | None:
    """Put codes in place of all spans but negations; spans that touch share one. None when no words would be left."""
    prefix = next((p for p in _PREFIXES if not re.search(rf"{p}\s?\d", text, re.IGNORECASE)), None)
    if prefix is None:
        return None
    parts: list[str] = []
    pieces: list[str] = []
    at = 0
    for start, end in _groups(text, [s for s in spans if s.kind != "negation"]):
        parts += [text[at:start], f" {prefix}{len(pieces)} "]
        pieces.append(text[start:end])
        at = end
    words = "".join([*parts[::2], text[at:]])
    whole = "".join([*parts, text[at:]]).strip()
    return Masked(re.sub(" {2,}", " ", whole), tuple(pieces), prefix) if count_letters(words) else None


def _groups(text: str, spans: Sequence[Span]) -> list[tuple[int, int]]:
    groups: list[tuple[int, int]] = []
    for span in spans:
        if groups and not text[groups[-1][1] : span.start].strip():
            groups[-1] = (groups[-1][0], span.end)
        else:
            groups.append((span.start, span.end))
    return groups


def unmask(masked: Masked, text: str) -> str | Refusal:
    """Put the pieces back, or say why a code does not let us."""
    damage = _damage(masked, text) or (
        None if _codes(masked, text) == [*range(len(masked.pieces))] else "in another order"
    )
    if damage:
        return Refusal("placeholders", f"the translation has a protected piece {damage}")
    return _code(masked).sub(lambda m: _spaced(masked.pieces[int(m[1])], m), text).strip()


def _code(masked: Masked) -> re.Pattern[str]:
    return re.compile(rf"[ \t]*(?<![A-Za-z]){masked.prefix}\s?(\d+)(?!\d)[ \t]*", re.IGNORECASE)


def _codes(masked: Masked, text: str) -> list[int]:
    return [int(m[1]) for m in _code(masked).finditer(text)]


def _damage(masked: Masked, text: str) -> str | None:
    codes = _codes(masked, text)
    if len(set(codes)) < len(codes):
        return "twice"
    if set(range(len(masked.pieces))) - set(codes):
        return "no more"
    num_alike = len(re.findall(masked.prefix, text, re.IGNORECASE))
    return "that it had not" if num_alike != len(masked.pieces) or len(codes) != len(masked.pieces) else None


def _spaced(piece: str, match: re.Match[str]) -> str:
    """The piece, with the spaces around its code only where no Chinese stands beside them."""
    left, right = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    lead = " " if match[0][0].isspace() and left and not _CJK.match(left) else ""
    trail = " " if match[0][-1].isspace() and right and not _CJK.match(right) else ""
    return lead + piece + trail


def _whole(masked: Masked | Refusal, text: str | Refusal) -> str | Refusal:
    """The first translation, if no code was damaged on the way; their order may differ abroad."""
    if isinstance(masked, Refusal) or isinstance(text, Refusal):
        return text
    damage = _damage(masked, text)
    return Refusal("placeholders", f"the first translation has a protected piece {damage}") if damage else text


def _restored(before: str, spans: Sequence[Span], masked: Masked | Refusal, text: str | Refusal) -> str | Refusal:
    if isinstance(masked, Refusal) or isinstance(text, Refusal):
        return text
    restored = unmask(masked, text)
    return restored if isinstance(restored, Refusal) else _fault(before, spans, restored) or restored


def _fault(before: str, spans: Sequence[Span], after: str) -> Refusal | None:
    if reason := breach(before, spans, after):
        return Refusal("spans", reason)
    ratio = len(after) / len(before)
    if not _MIN_RATIO <= ratio <= _MAX_RATIO or after.count("\n") != before.count("\n"):
        return Refusal("not_a_translation", f"{len(after)} characters came back for {len(before)}, or other lines")
    old, new = identify(before).lang, identify(after).lang
    return Refusal("other_language", f"sent in {old}, came back in {new}") if old != new else None


def _each(translator: Translator, texts: Sequence[str | Refusal]) -> list[str | Refusal]:
    """Translate what is a text; what is refused already, or fails, stays in its place as a refusal."""
    sent = [text for text in texts if isinstance(text, str)]
    answers = list(translator.translate(sent)) if sent else []
    if len(answers) != len(sent):
        raise PingjiaError(f"the translator was sent {len(sent)} texts and returned {len(answers)}")
    received = iter(answers)
    return [text if isinstance(text, Refusal) else _received(next(received)) for text in texts]


def _received(answer: str | PingjiaError) -> str | Refusal:
    if isinstance(answer, PingjiaError):
        return Refusal("translation_failed", str(answer))
    return answer if answer.strip() else Refusal("translation_failed", "the translation is empty")


# ---- from a recipe


def load_back_translation(
    settings: BackTranslationSettings, load: Callable[[str, str, str], Translator]
) -> BackTranslation:
    """The maker that a recipe asks for. `load(directory, from, to)` is `models.load_translator`."""
    languages = settings.source, settings.via
    if settings.endpoint is not None and settings.model is not None:
        key = os.environ.get(settings.api_key_env)
        home, via = (EndpointTranslator(settings.endpoint, settings.model, lang, key) for lang in languages)
        return BackTranslation(via, home, settings.source)
    if settings.forward is None or settings.backward is None:
        raise UserError(
            "prepare.augment.back_translation needs forward and backward (two model directories), or endpoint and model"
        )
    source, target = settings.codes or languages
    forward, backward = load(settings.forward, source, target), load(settings.backward, target, source)
    return BackTranslation(forward, backward, settings.source)
