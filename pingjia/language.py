"""Which language a text is in, offline. Scripts decide where they can; only Latin letters need statistics.

Chinese characters are told from kana, hangul and the others by counting, which has no trouble with two-character
questions. For text in Latin letters the bundled model of py3langid is asked. It is not believed when the text is short
or it is not sure: then the text is English, unless a common word of another language stands in it. docs/data.md has
the measured accuracy.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from pingjia.errors import DataError
from pingjia.script import count_han, count_letters

UNKNOWN = "und"
MIXED = "mixed"

# Chinese is written on without a space, so links and addresses end at the first character that is not ASCII.
_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|(?:https?://|www\.)[\x21-\x7e]+|</?[A-Za-z][^<>\n]{0,200}>|&[a-z]{2,8};"
    r"|(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+"
    r"|\$[^$\n\u4e00-\u9fff]*[\\^_=][^$\n\u4e00-\u9fff]*\$|\\[A-Za-z]+",
    re.DOTALL,
)
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
_QUOTED = re.compile('[“‘「"][^“”‘’「」"\u4e00-\u9fff]{1,200}[”’」"]')  # “do away with”是什么意思 is Chinese
LATIN = (
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
_LETTERS_PER_WORD = 3  # the same of other scripts; low, for the frame of a sentence says more than the words in it
_MIXED_SHARE = 0.25  # of both languages, in words
_SURE = 0.9
_SURE_WITH_ACCENT = 0.6
_ENOUGH = 60  # words; more do not make it surer
_PLAINLY_ENGLISH = 4  # more common words of English than of another language: the model need not be asked

# Common words that belong to one of these languages alone, and are no English words or usual names.
_LANG_OF_WORD = {
    word: lang
    for lang, words in {
        "en": "the is are my your to and of what how do does can i you it in for with this that where when please not",
        "fr": "bonjour bonsoir merci je vous nous est dans avec votre combien quand pourquoi quel quelle livraison",
        "de": "guten danke bitte ich nicht und ist wie viel wo wann das ein eine mein meine haben kann auf bestellung",
        "es": "hola gracias buenos buenas quiero necesito cuanto donde cómo está pedido usted muchas una ustedes",
        "it": "ciao grazie buongiorno buonasera vorrei sono della questo mio ordine posso",
        "pt": "olá obrigado obrigada você não meu minha onde preciso encomenda",
        "nl": "bedankt hoeveel waar mijn bestelling graag het een niet kunnen wanneer",
    }.items()
    for word in words.split()
}
_CHINESE_ONLY = re.compile("[的吗呢吧您你们这么怎什钱]")  # not written in Japanese


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

    A Chinese sentence stays Chinese with names, product codes and quotations in it (iPhone 15 多少钱). "mixed" takes
    ordinary lower-case words of English, at least two, and Chinese characters, each at least a quarter of the text
    counted in words. Chinese characters without kana are Chinese; Cyrillic letters are Russian.
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
    if other is not None and _outweighs(other, count, num_han, prose):
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


def _outweighs(lang: str, count: int, num_han: int, text: str) -> bool:
    """Whether `count` letters of another script make the sentence; names in Latin letters in it do not count.

    Japanese is written with Chinese characters too: a tenth of kana is enough, but for 鲜の果汁多少钱.
    """
    num_words = len(_PLAIN_WORD.findall(text))
    if lang == "ja":
        is_chinese = count * 4 < num_han and _CHINESE_ONLY.search(text) is not None
        return count * 9 >= num_han and not is_chinese and count + num_han >= _HAN_PER_WORD * num_words
    return count > num_han and count >= _LETTERS_PER_WORD * num_words


def _with_han(text: str, num_han: int, share: float) -> tuple[str, float]:
    text = _QUOTED.sub(" ", text)
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
    words = [match.group() for match in islice(_WORD.finditer(text), _ENOUGH)]
    if not words:
        return UNKNOWN, 1.0
    has_accent = _ACCENT.search("".join(words)) is not None
    other, lead = _telling([word.lower() for word in words])
    if lead <= -_PLAINLY_ENGLISH:
        return "en", 1.0
    if len(words) < 3 and not has_accent:
        return (other, _SURE) if lead > 0 else ("en", 0.5)
    lang, confidence = _classifier()(" ".join(words))
    if lang == "en" or confidence >= (_SURE_WITH_ACCENT if has_accent else _SURE):
        return lang, confidence
    return (other, max(confidence, 0.5)) if lead > 0 else ("en", 1 - confidence)


def _telling(words: Sequence[str]) -> tuple[str, int]:
    """The language, other than English, of most common words among these, and how many more they are than English."""
    counts = Counter(_LANG_OF_WORD[word] for word in words if word in _LANG_OF_WORD)
    num_english = counts.pop("en", 0)
    other, count = counts.most_common(1)[0] if counts else ("en", 0)
    return other, count - num_english


@functools.cache
def _classifier() -> Callable[[str], tuple[str, float]]:
    """py3langid over languages in Latin letters; it loads its model, 0.2 s, at the first text that needs it."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # its model is a file of numbers, no pickle
    except ImportError:
        raise DataError("telling languages apart needs py3langid: pip install py3langid") from None

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(LATIN))

    def classify(text: str) -> tuple[str, float]:
        lang, confidence = identifier.classify(text)
        return str(lang), float(confidence)

    return classify


_TONGUES = (
    "english|chinese|mandarin|cantonese|french|german|japanese|korean|russian|spanish|italian|portuguese|arabic|latin"
)
_ABOUT_LANGUAGE = re.compile(
    r"译|[中英汉日法德韩俄泰外双粤][语文]|英汉|(?:西班牙|葡萄牙|意大利|阿拉伯|越南|拉丁)(?:语|文)"
    r"|单词|拼音|怎么说|语言|字母"
    rf"|translat|pinyin|bilingual|\blanguages?\b|\b(?:{_TONGUES})\b",
    re.IGNORECASE,
)


def asks_for_other_language(question: str) -> bool:
    """Whether a question is about language (translate, 英文怎么说), so that the answer may be in another one."""
    return _ABOUT_LANGUAGE.search(question) is not None
