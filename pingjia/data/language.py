"""Which language a text is in, offline. Scripts decide where they can; only Latin letters need statistics.

Chinese characters are told from kana, hangul and the others by counting, which has no trouble with two-character
questions. For text in Latin letters the bundled model of py3langid is asked, and not believed when the text is short:
then it is English. docs/data.md has the measured accuracy.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pingjia.data.script import count_han, count_letters

UNKNOWN = "und"
MIXED = "mixed"

_NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|www\.\S+|\S+@\S+\.\w+|<[^<>\n]{1,200}>", re.DOTALL)
_SCRIPTS: Mapping[str, re.Pattern[str]] = {
    "ja": re.compile("[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\uff66-\uff9d]"),
    "ko": re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]"),
    "ru": re.compile("[\u0400-\u052f]"),
    "ar": re.compile("[\u0600-\u06ff\u0750-\u077f]"),
    "th": re.compile("[\u0e01-\u0e3a\u0e40-\u0e4e]"),
    "hi": re.compile("[\u0900-\u097f]"),
    "el": re.compile("[\u0370-\u03ff]"),
    "he": re.compile("[\u05d0-\u05ea]"),
}
_ANY_OTHER = re.compile("|".join(pattern.pattern for pattern in _SCRIPTS.values()))
_WORD = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+(?:['’][A-Za-z]+)?")
_PLAIN_WORD = re.compile(r"(?<![A-Za-z0-9_.-])[a-z\u00df-\u00ff]{2,}(?:['’][a-z]+)?(?![A-Za-z0-9_.-]*[A-Z0-9_])")
_LATIN = (
    "en",
    "fr",
    "de",
    "es",
    "it",
    "pt",
    "nl",
    "pl",
    "tr",
    "vi",
    "id",
    "ms",
    "sv",
    "da",
    "no",
    "fi",
    "cs",
    "ro",
    "hu",
)
_ACCENT = re.compile("[\u00c0-\u024f\u1e00-\u1eff]")
_HAN_PER_WORD = 1.5  # Chinese characters that say as much as one English word
_MIXED_SHARE = 0.25  # of both languages, in words
_SURE = 0.9
_ENOUGH = 400  # characters; more do not make it surer


@dataclass(frozen=True, slots=True)
class Language:
    """`lang`: an ISO 639-1 code, "mixed" (Chinese and English in one text) or "und" (no letters).

    `confidence` 0 to 1. `zh_share`: Chinese characters among the letters, 0 without any.
    """

    lang: str
    confidence: float
    zh_share: float


def identify(text: str) -> Language:
    """The language of a text; code, links and tags do not count.

    A Chinese sentence stays Chinese with names and product codes in it (iPhone 15 多少钱). "mixed" takes ordinary
    lower-case words of English and Chinese characters, each at least a quarter of the text counted in words.
    """
    prose = _NOT_PROSE.sub(" ", text)
    num_letters = count_letters(prose)
    if num_letters == 0:
        return Language(UNKNOWN, 1.0, 0.0)
    num_han = count_han(prose)
    share = num_han / num_letters
    if prose.isascii():
        return Language(*_latin(prose), 0.0)
    other, count = _other_script(prose)
    if other is not None and _outweighs(other, count, num_han, num_letters):
        return Language(other, count / (count + num_han) if other != "ja" else 1.0, share)
    if num_han == 0:
        return Language(*_latin(prose), 0.0)
    return Language(*_with_han(prose, num_han, share), share)


def _other_script(text: str) -> tuple[str | None, int]:
    if not _ANY_OTHER.search(text):
        return None, 0
    counts = {lang: len(pattern.findall(text)) for lang, pattern in _SCRIPTS.items()}
    lang = max(counts, key=lambda name: counts[name])
    return (lang, counts[lang]) if counts[lang] else (None, 0)


def _outweighs(lang: str, count: int, num_han: int, num_letters: int) -> bool:
    """Japanese is written with Chinese characters too: a tenth of kana is enough. Others must be the larger part."""
    if lang == "ja":
        return count * 9 >= num_han and (count + num_han) * 2 >= num_letters
    return count > num_han and count * 2 >= num_letters - num_han


def _with_han(text: str, num_han: int, share: float) -> tuple[str, float]:
    plain = len(_PLAIN_WORD.findall(text))
    chinese = num_han / _HAN_PER_WORD
    if plain >= 2 and min(plain, chinese) >= _MIXED_SHARE * (plain + chinese):
        return MIXED, min(plain, chinese) / (plain + chinese) * 2
    if plain > chinese:
        return _latin(_without_han(text))
    return "zh", max(share, chinese / (plain + chinese))


def _without_han(text: str) -> str:
    return " ".join(_WORD.findall(text))


def _latin(text: str) -> tuple[str, float]:
    words = _WORD.findall(text)
    if not words:
        return UNKNOWN, 1.0
    if len(words) < 3 and not _ACCENT.search(text):
        return "en", 0.5
    lang, confidence = _classifier()(" ".join(words))
    if lang != "en" and confidence < _SURE and not _ACCENT.search(text):
        return "en", 1 - confidence
    return lang, confidence


@functools.cache
def _classifier() -> Callable[[str], tuple[str, float]]:
    """py3langid over languages in Latin letters; it loads its model, 0.2 s, at the first text that needs it."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # its model is a file of numbers, no pickle

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(_LATIN))

    def classify(text: str) -> tuple[str, float]:
        lang, confidence = identifier.classify(text[:_ENOUGH])
        return str(lang), float(confidence)

    return classify


_TONGUES = "english|chinese|mandarin|cantonese|french|german|japanese|korean|russian|spanish|italian"
_ABOUT_LANGUAGE = re.compile(
    r"翻译|译成|译为|译文|英文|英语|中文|汉语|日文|日语|法语|德语|韩语|俄语|西班牙语"
    r"|外语|双语|单词|拼音|怎么说|语言"
    rf"|translat|pinyin|bilingual|\blanguages?\b|\b(?:{_TONGUES})\b",
    re.IGNORECASE,
)


def asks_for_other_language(question: str) -> bool:
    """Whether a question is about language (translate, 英文怎么说), so that the answer may be in another one."""
    return _ABOUT_LANGUAGE.search(question) is not None
