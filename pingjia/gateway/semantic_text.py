"""What two questions must have in common before an encoder may even be asked whether they mean the same. Pure.

Vectors do not tell 3 days from 5, "is" from "is not", or who pays whom. So everything that tells must be equal and in
the same order: every word, number, unit, sign, quoted string and name. Left out are only words of courtesy, articles
and the frame of a question ("could you tell me how to" is "how"); a few words count as one (怎么, 如何). This misses
many equal questions; it is made to give no wrong answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MAX_CHARS = 1_000

Telling = tuple[str, ...]
"""What tells a question apart, in order; the kinds of question first."""

_EN_CONTRACTED = (
    (r"\bcan(?:no|['’]?n?['’])t\b", "can not"), (r"\bwon['’]t\b", "will not"), (r"n['’]t\b", " not"),
    (r"\b(what|how|where|who|when|that|it)['’]s\b", r"\1 is"), (r"\bi['’]m\b", "i am"), (r"\bi['’]d\b", "i would"),
)  # fmt: skip
# What may stand around a question without changing it.
_EN_OPENING = (
    r"(?:hi|hello|hey)(?: there)?(?=\s*[,.!])",
    r"(?:could|can|would|will) you (?:please |kindly )?(?:tell me|let me know)",
    r"(?:please |kindly )?(?:tell me|let me know)",
    r"do you know(?= (?:how|what|when|where|who|why|which|if|whether)\b)",
    r"i (?:would like|want|need) to know", r"please", r"kindly",
)  # fmt: skip
_EN_HOW = r"how (?:do i|can i|to)"
_EN_CLOSING = r"(?:please|thanks|thank you|thank you very much|many thanks|thx)"
_EN_ARTICLES = frozenset({"an", "the", "The"})  # without "a": vitamin a

_ZH_OPENING = (
    "(?:您好|你好)(?=[,，.。!！])|请问一下|请问|麻烦问一下|麻烦(?=您|你|帮)|我想请问|我想问一下|我想问|想请问|想问一下|想问|"
    "我想知道|想知道|(?:请|能|可以|请你|请您)?告诉我(?!们)"
)
_ZH_CLOSING = "谢谢你|谢谢您|谢谢|多谢"
_ZH_PARTICLE = re.compile("(?<=[怎什多哪几谁啥何样么])(.{0,30})[呢啊呀](?=[?？]?$)")
# Questions about words: there a word of courtesy may be the very thing that is asked about.
_ABOUT_WORDS = re.compile(
    "\\b(?:say|says|said|mean|means|meaning|translate|translation|spell|pronounce|write|word|words|phrase|in [A-Z])|"
    "[说講讲譯译读讀写寫念拼词詞字叫]|意思",
)
_OPENING = re.compile(rf"^(?:(?:{'|'.join(_EN_OPENING)})\b|{_ZH_OPENING})[\s,，.。!！:：]*", re.IGNORECASE)
_CLOSING = re.compile(rf"[\s,，.。!！?？]*(?:\b{_EN_CLOSING}|{_ZH_CLOSING})[\s.。!！?？~～]*$", re.IGNORECASE)
_ZH_ONE = (("如何|怎样|咋(?!样)|怎么(?!样|了)", "怎么"), ("啥", "什么"), ("是多少", "多少"), ("您", "你"))

_QUOTED = re.compile(r"\"[^\"]{0,300}\"|“[^”]{0,300}”|「[^」]{0,300}」|『[^』]{0,300}』|《[^》]{0,300}》|`[^`]{0,300}`")
_TOKEN = re.compile(
    r"\x00\d+\x00|[a-z0-9][\w.+-]*@[\w.-]+|https?://\S+|[-+−]?\d+(?:[.,:/-]\d+)*|[^\W\d_\u3400-\u9fff]+|[\u3400-\u9fff]|\S",
    re.IGNORECASE,
)
_ENDS = frozenset("?!.。？！，,;；、…~～")


def telling(text: str) -> Telling | None:
    """None for a text that is too long or says nothing. Two texts that give the same may mean the same."""
    if len(text) > MAX_CHARS:
        return None
    plain, quoted = _aside(_folded(text))
    plain, is_how = _unframed(plain)
    words = [_word(word, quoted) for word in _TOKEN.findall(plain)]
    said = [word for word in words if word not in _EN_ARTICLES and word not in _ENDS]
    return (("how" if is_how else ""), *said) if said else None


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _aside(text: str) -> tuple[str, list[str]]:
    """The text with a mark for every quoted string, and these, word for word."""
    quoted: list[str] = []

    def keep(match: re.Match[str]) -> str:
        quoted.append(match[0])
        return f" \0{len(quoted) - 1}\0 "

    return _QUOTED.sub(keep, text.replace("\0", "")), quoted


def _unframed(text: str) -> tuple[str, bool]:
    """Without courtesy at both ends and the frame of a question; whether that asked how."""
    if _ABOUT_WORDS.search(text):
        return text, False
    for written, plain in _EN_CONTRACTED:
        text = re.sub(written, plain, text, flags=re.IGNORECASE)
    for frame in (_OPENING, _CLOSING):
        while (shorter := frame.sub("", text)) != text and shorter.strip():
            text = shorter
    text = _ZH_PARTICLE.sub(r"\1", text)
    found = re.match(rf"{_EN_HOW}\b", text, re.IGNORECASE)
    text = text[found.end() :] if found else text
    for written, one in _ZH_ONE:
        text = re.sub(written, one, text)
    return _small_first(text), found is not None


def _small_first(text: str) -> str:
    """The first word has a capital for standing first; names keep theirs."""
    first = re.match(r"\s*([A-Z][a-z]+)\b", text)
    if first is None or first[1].lower() not in _COMMON_FIRST:
        return text
    return text[: first.start(1)] + first[1].lower() + text[first.end(1) :]


_COMMON_FIRST = frozenset(
    """
    what when where who whom whose which why how is are was were do does did can could should would might have
    has had am if i my we our it in on at for from to with there reset change cancel track return delete update open
    close find get give list show explain describe write translate summarize make set turn add remove
    """.split()  # noqa: SIM905
)


def _word(word: str, quoted: list[str]) -> str:
    """As it is compared: names and abbreviations by their capitals, quoted strings word for word."""
    if word.startswith("\0"):
        return quoted[int(word.strip("\0"))]
    return word.lower() if word == "I" else word


def equal_numbers(one: str, other: str) -> bool:
    """Whether two answers name the same numbers."""
    return _numbers(one) == _numbers(other)


def _numbers(text: str) -> Iterable[str]:
    return sorted(re.findall(r"\d+(?:[.,:]\d+)*", unicodedata.normalize("NFKC", text)))
