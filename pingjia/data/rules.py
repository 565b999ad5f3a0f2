"""Cheap rules on the words of a row: what a model should not learn, found without other rows or a network.

Every rule is made to be right when it speaks: an answer that merely looks odd is left alone. Empty fields are faults of
the layout (`layouts.py`) and not here.
"""

from __future__ import annotations

import html
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from pingjia.data.language import MIXED, UNKNOWN, asks_for_other_language, identify
from pingjia.data.problems import Finding
from pingjia.data.script import count_han
from pingjia.types import Example


def check_rules(example: Example, off: Collection[str] = frozenset()) -> list[Finding]:
    """What the rules that are not `off` have against a row, in the order of RULES."""
    found = []
    for name, rule in RULES.items():
        if name not in off and (reason := rule(example)) is not None:
            found.append(Finding(name, "response", reason))
    return found


# ---- repeated: an answer that runs in circles

_MIN_LOOP_CHARS = 24
_LOOP = re.compile(r"(.{2,60}?)\1{4,}", re.DOTALL)
_LINE_REPEATS = 5


def _repeated(example: Example) -> str | None:
    text = example.response
    if len(text) < _MIN_LOOP_CHARS or _is_code(text):
        return None
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) >= 4]
    line, count = Counter(lines).most_common(1)[0] if lines else ("", 0)
    if count >= _LINE_REPEATS and count * 2 > len(lines):
        return f"the line {_short(line)} stands {count} times in the answer"
    if not _compresses_well(text):  # the search below is slow, and would find nothing
        return None
    for match in _LOOP.finditer(text[:20_000]):
        piece, size = match.group(1), len(match.group())
        if size >= _MIN_LOOP_CHARS and size * 3 >= len(text) and sum(map(str.isalpha, piece)) >= 2:
            return f"{_short(piece)} is repeated {size // len(piece)} times without a break"
    return None


def _compresses_well(text: str) -> bool:
    data = text[:20_000].encode("utf-8", "replace")
    return len(zlib.compress(data, 1)) < 0.6 * len(data)


def _is_code(text: str) -> bool:
    return "```" in text or "\t" in text or text.lstrip().startswith(("{", "[", "|"))


# ---- refusal: the stock phrases of an assistant that does not answer

_AS_AI = re.compile(
    r"(?:作为|身为|我是)(?:一个|一名|一款)?[^，。！？\n]{0,12}?(?:AI|人工智能|大?语言模型|智能助手|聊天机器人)"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)"
    r"|\bI(?:'m| am) (?:just )?an? (?:ai|language model)",
    re.IGNORECASE,
)
_CANNOT = re.compile(
    r"(?:无法|不能|没有办法|没办法|不会|不便|没有能力)(?:够)?[^，。！？\n]{0,12}?"
    r"(?:回答|提供|完成|执行|协助|帮助|处理|访问|生成|浏览|查看|获取|进行)"
    r"|\b(?:cannot|can't|can not|unable to|not able to|won't)\s+(?:\w+\s+){0,2}?"
    r"(?:answer|provide|complete|assist|help|fulfil|access|generate|browse|comply|perform|do that)",
    re.IGNORECASE,
)
_SORRY = re.compile(
    r"^\W*(?:(?:非常|很|十分)?(?:抱歉|对不起|遗憾)|不好意思"
    r"|(?:i'm |i am )?(?:very |so |really )?sorry\b|i apologi[sz]e\b)",
    re.IGNORECASE,
)
_REQUEST = re.compile(
    r"(?:无法|不能)(?:够)?(?:回答|满足|完成|处理|响应)(?:您|你)?的?(?:这个|该|此)?(?:问题|请求|要求)"
    r"|\b(?:cannot|can't|unable to)\s+(?:\w+\s+){0,2}?(?:answer|fulfil|help with|assist with|comply with)\s+"
    r"(?:that|this|your)\b",
    re.IGNORECASE,
)
_REFUSAL_HEAD = 120  # a refusal comes at once; what follows much later is part of an answer


def _refusal(example: Example) -> str | None:
    head = example.response.strip()[:_REFUSAL_HEAD]
    who, cannot = _AS_AI.search(head), _CANNOT.search(head)
    if who and cannot:
        return f"a stock refusal: {_short(who.group() + ' … ' + cannot.group())}"
    request = _REQUEST.search(head)
    if _SORRY.search(head) and request:
        return f"a stock refusal: {_short(request.group())}"
    return None


# ---- markup: text that was damaged on its way

_TAG = re.compile(
    r"<(/?)(div|span|p|b|i|u|em|strong|font|table|tr|td|th|ul|ol|li|a|h[1-6])(?:\s[^<>]*)?>", re.IGNORECASE
)
_MAY_STAY_OPEN = {"p", "li", "tr", "td", "th"}
_ENTITY = re.compile(r"&(?:nbsp|lt|gt|amp|quot|apos|#\d{2,5}|#x[0-9a-fA-F]{2,5});")
_SPECIAL = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|user|assistant|system|observation)\|>|\[gMASK\]|<sop>|<eop>|</s>"
)
_SLOT = re.compile(r"\{\{\s*\w[\w. ]{0,40}\}\}|\{%.{1,80}%\}|<%=?.{1,80}%>|\[\[训练时间\]\]")
_MOJIBAKE = re.compile(
    r"锟斤拷|烫烫烫|屯屯屯"
    r"|(?:[\u00c2-\u00ef][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u2018-\u2022\u2026\u20ac\u2122]{1,2}){2,}"
)
_ABOUT_CODE = re.compile(
    r"代码|编程|程序|模板|标签|转义|网页|前端|函数|变量|乱码|编码|占位"
    r"|\b(?:html|xml|css|jinja|template|code|entit|tag|vue|react|latex|python"
    r"|java|javascript|sql|regex|function|script|placeholder|encoding)",
    re.IGNORECASE,
)


def _markup(example: Example) -> str | None:
    text = example.response
    damage = _damage(text)
    if damage is not None:
        return damage
    about_code = any(_ABOUT_CODE.search(m.content) for m in example.messages if m.role in ("user", "system"))
    if "```" in text:
        return "a code fence ``` is not closed" if text.count("```") % 2 else None
    if about_code or _is_code(text):
        return None
    for what, pattern in (("an HTML entity", _ENTITY), ("a slot of a template", _SLOT)):
        if match := pattern.search(text):
            return f"{what} is left in the answer: {_short(match.group())}"
    if text.count("$$") % 2:
        return "a formula $$ is not closed"
    return _unbalanced(text)


def _damage(text: str) -> str | None:
    """What no text means to hold, whatever it is about."""
    if "\ufffd" in text:
        return f"holds {text.count(chr(0xFFFD))} replacement characters U+FFFD, traces of a wrong encoding"
    if match := _SPECIAL.search(text):
        return f"holds a model's special token {match.group()}"
    if match := _MOJIBAKE.search(text):
        return f"holds {_short(match.group())}, text that was decoded in a wrong encoding"
    return None


def _unbalanced(text: str) -> str | None:
    opened: list[str] = []
    for match in _TAG.finditer(text):
        name = match.group(2).lower()
        if not match.group(1):
            opened.append(name)
        elif name in opened:
            while (last := opened.pop()) != name:
                if last not in _MAY_STAY_OPEN:
                    return f"the tag <{last}> is not closed"
        else:
            return f"the tag </{name}> was never opened"
    left = [name for name in opened if name not in _MAY_STAY_OPEN]
    return f"the tag <{left[0]}> is not closed" if left else None


# ---- echo: the answer says the question again


def _echo(example: Example) -> str | None:
    if len(example.response) > 3 * len(example.messages[-2].content) and len(example.response) > 400:
        return None  # a long answer is no echo, and the comparison is slow
    question, answer = _plain(example.messages[-2].content), _plain(example.response)
    if not answer or not question:
        return None
    if answer == question:
        return None if _ASKS_TO_REPEAT.search(example.messages[-2].content) else "the answer equals the question"
    if len(question) >= 6 and answer == question * (len(answer) // len(question)):
        return f"the answer is the question, {len(answer) // len(question)} times"
    return None


_ASKS_TO_REPEAT = re.compile(
    r"重复|复述|跟我读|照抄|原样|改写|润色|纠正|修改|翻译|\b(?:repeat|echo|say|rewrite|correct|translate|edit)\b",
    re.IGNORECASE,
)


def _plain(text: str) -> str:
    """Letters and digits only, in one form: how a text reads, not how it is set."""
    return "".join(c for c in unicodedata.normalize("NFKC", html.unescape(text)).lower() if c.isalnum())


# ---- language: asked in one language, answered in another


def _language(example: Example) -> str | None:
    question = example.messages[-2].content
    if example.messages[-2].role != "user" or len(example.response) < 8:
        return None
    asked, answered = identify(question), identify(example.response)
    if asked.lang == answered.lang or {asked.lang, answered.lang} & {MIXED, UNKNOWN}:
        return None
    if min(asked.confidence, answered.confidence) < 0.7 or _is_code(example.response):
        return None
    if any(asks_for_other_language(m.content) or _quotes(m.content, answered.lang) for m in example.messages[:-1]):
        return None
    return f"the question is in {asked.lang}, the answer in {answered.lang}"


_LATIN_WORD = re.compile(r"[A-Za-z]{2,}")


def _quotes(question: str, lang: str) -> bool:
    """Whether words of the answer's script stand in the question: it may well be about them."""
    return count_han(question) > 0 if lang == "zh" else _LATIN_WORD.search(question) is not None and lang != "ja"


Rule = Callable[[Example], str | None]
RULES: Mapping[str, Rule] = {
    "repeated": _repeated,
    "refusal": _refusal,
    "markup": _markup,
    "echo": _echo,
    "language": _language,
}


def _short(text: str, limit: int = 40) -> str:
    flat = " ".join(text.split())
    return f"“{flat if len(flat) <= limit else flat[: limit - 1] + '…'}”"
