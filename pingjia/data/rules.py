"""Cheap rules on the words of a row: what a model should not learn, found without other rows or a network.

Every rule is made to be right when it speaks: an answer that merely looks odd is left alone. Empty fields are faults of
the layout (`layouts.py`) and not here.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from pingjia.data.problems import Finding
from pingjia.language import LATIN, MIXED, UNKNOWN, asks_for_other_language, identify
from pingjia.script import count_han
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
_MIN_TAIL_CHARS = 40
_LOOP = re.compile(r"(.{2,60}?)\1{4,}", re.DOTALL)
_SENTENCE_END = re.compile(r"[\n。！？!?；;]+|\.\s")
_REPEATS = 5
_LOOKED_AT = 20_000  # characters


def _repeated(example: Example) -> str | None:
    text = example.response[:_LOOKED_AT]
    if len(text) < _MIN_LOOP_CHARS or _is_code(text):
        return None
    return _repeated_sentence(text) or (_loop(text) if _may_loop(text) else None)


def _repeated_sentence(text: str) -> str | None:
    """The same sentences or lines over and over: one that is more than half of all, or all of them in turn."""
    sentences = [part.strip() for part in _SENTENCE_END.split(text) if len(part) >= 4]
    if len(sentences) < _REPEATS:
        return None
    counts = Counter(sentences)
    sentence, count = counts.most_common(1)[0]
    is_most = count * 2 > len(sentences) or len(counts) * _REPEATS <= len(sentences)
    if count >= _REPEATS and is_most and _num_letters(sentence) >= 4:
        return f"{_short(sentence)} stands {count} times in the answer"
    return None


def _may_loop(text: str) -> bool:
    """A quick no. A loop is a third of the text or its end, so one of these four places is in it."""
    places = (len(text) // 4, len(text) // 2, 3 * len(text) // 4, len(text.rstrip()) - 4)
    return any(_comes_again(text, at) for at in places)


def _comes_again(text: str, at: int) -> bool:
    """Whether the four characters at a place stand twice more behind or before it, at one distance of up to 60."""
    piece, is_there = text[at : at + 4], text.startswith
    return any(
        (is_there(piece, at + d) and is_there(piece, at + 2 * d))
        or (at >= 2 * d and is_there(piece, at - d) and is_there(piece, at - 2 * d))
        for d in range(2, 61)
    )


def _loop(text: str) -> str | None:
    """A piece that is said again at once: a third of the answer, or what it ends with."""
    for match in _LOOP.finditer(text):
        piece, size = match.group(1), len(match.group())
        is_end = len(text) - match.end() <= len(piece) and size >= _MIN_TAIL_CHARS
        if size >= _MIN_LOOP_CHARS and (size * 3 >= len(text) or is_end) and _num_letters(piece) >= 2:
            return f"{_short(piece)} is repeated {size // len(piece)} times without a break"
    return None


def _num_letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def _is_code(text: str) -> bool:
    return "```" in text or "\t" in text or text.lstrip().startswith(("{", "[", "|"))


# ---- refusal: the stock phrases of an assistant that does not answer

_AS_AI = re.compile(
    r"(?:作为|身为|我只?是)(?:一个|一名|一款)?[^，。！？\n]{0,12}?(?:AI|人工智能|大?语言模型|智能助手|聊天机器人)"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)"
    r"|\bI(?:'m| am) (?:just |only )?an? (?:ai|(?:large )?language model)",
    re.IGNORECASE,
)
_CANNOT = re.compile(
    r"(?:无法|不能|没有办法|没办法|不会|不便|没有能力)(?:够)?[^，。！？\n]{0,12}?"
    r"(?:回答|提供|完成|执行|协助|帮助|处理|访问|生成|浏览|查看|获取|进行|给出|发表|表达)"
    r"|没有(?:个人|自己|主观)的?(?:情感|感情|观点|意见|看法|喜好)"
    r"|\b(?:cannot|can't|can not|unable to|not able to|won't)\s+(?:\w+\s+){0,2}?"
    r"(?:answer|provide|complete|assist|help|fulfill?|access|generate|browse|comply|perform|do that)"
    r"|\b(?:do not|don't) have (?:any )?(?:personal|my own) (?:opinion|feeling|preference|experience|belief|emotion)",
    re.IGNORECASE,
)
_SORRY = re.compile(
    r"^\W*(?:(?:非常|很|十分)?(?:抱歉|对不起|遗憾)|不好意思"
    r"|(?:i'm |i am )?(?:very |so |really )?sorry\b|i apologi[sz]e\b)",
    re.IGNORECASE,
)
_THIS = "(?:问题|请求|要求)"
_REQUEST = re.compile(
    rf"(?:无法|不能)(?:够)?(?:回答|满足|完成|处理|响应|执行)(?:您|你)?的?(?:这个|该|此|这一)?{_THIS}"
    rf"|我(?:无法|不能)(?:够)?(?:协助|帮助)(?:您|你)?(?:完成|解决|处理|回答)?(?:您|你)?的?(?:这个|该|此|这一){_THIS}"
    r"|我(?:无法|不能)(?:够)?提供(?:您|你)?(?:所需要?|想要|要求|请求)的?(?:信息|内容|帮助|答案)"
    r"|\b(?:cannot|can't|unable to|not able to)\s+(?:\w+\s+){0,2}?"
    r"(?:answer|fulfill?|help(?: you)? with|assist(?: you)? with|comply with|complete|do|provide)\s+"
    r"(?:that|this|your)(?:\s+(?:request|question|information|content|topic)|\W|\Z)",
    re.IGNORECASE,
)
_AT_ONCE = re.compile(r"^\W*(?:i(?:'m| am)?|我)\s*(?:cannot|can't|unable|not able|无法|不能)", re.IGNORECASE)
_REFUSAL_HEAD = 120  # a refusal comes at once; what follows much later is part of an answer
_HELPFUL = 200  # Chinese characters, or what fills as much paper: who says that much does answer


def _refusal(example: Example) -> str | None:
    answer = example.response.strip().replace("’", "'")
    head = answer[:_REFUSAL_HEAD]
    cannot = _CANNOT.search(head)
    who, request = _AS_AI.search(head), _REQUEST.search(head)
    said = who or request
    if said is None or _is_quoted(head, said.start()) or _is_long(answer):
        return None
    if who and cannot:
        return f"a stock refusal: {_short(who.group() + ' … ' + cannot.group())}"
    if request and (_SORRY.search(head) or _AT_ONCE.search(head)):
        return f"a stock refusal: {_short(request.group())}"
    return None


def _is_quoted(text: str, at: int) -> bool:
    """Whether a quotation is open at a place of the text: then somebody else is speaking."""
    before = text[:at]
    return before.count('"') % 2 == 1 or any(before.count(a) > before.count(b) for a, b in ("“”", "「」", "『』"))


def _is_long(text: str) -> bool:
    num_han = count_han(text)
    return num_han + (len(text) - num_han) / 3 > _HELPFUL


# ---- markup: text that was damaged on its way

_TAG = re.compile(
    r"<(/?)(div|span|p|b|i|u|em|strong|font|table|tr|td|th|ul|ol|li|a|h[1-6])(?:\s[^<>]*=[^<>]*)?>", re.IGNORECASE
)
_MAY_STAY_OPEN = {"p", "li", "tr", "td", "th"}
_ENTITY = re.compile(r"&(?:nbsp|lt|gt|amp|quot|apos|#\d{2,5}|#x[0-9a-fA-F]{2,5});")
_SPECIAL = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|user|assistant|system|observation)\|>|\[gMASK\]|<sop>|<eop>|</s>"
)
_SLOT = re.compile(r"\{\{\s*\w[\w. ]{0,40}\}\}|\$\{\w{1,40}\}|\{%.{1,80}%\}|<%=?.{1,80}%>|\[\[训练时间\]\]")
_MOJIBAKE = re.compile(
    r"锟斤拷|烫烫烫|屯屯屯"
    # UTF-8 read as Latin-1 or Windows-1252, then GBK read as Latin-1: letters with accents and no plain one between.
    r"|(?:[\u00c2-\u00ef][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u2018-\u2022\u2026\u20ac\u2122]{1,2}){2,}"
    r"|â€[\u0080-\u2122]|[ÂÃ][\u00a1-\u00bf]"
    r"|[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff][\u00a1-\u00b6\u00b8-\u00d6\u00d8-\u00f6\u00f8-\u00ff]{4,}"
    # UTF-8 read as GBK: what full-width punctuation becomes.
    r"|[锛銆鈥].{0,80}[锛銆鈥]",
    re.DOTALL,
)
_ABOUT_CODE = re.compile(
    r"代码|编程|程序|模板|标签|转义|网页|前端|函数|变量|乱码|编码|占位"
    r"|\b(?:html|xml|css|jinja|template|code|entit|tag|vue|react|latex|python"
    r"|java|javascript|sql|regex|function|script|placeholder|encoding)",
    re.IGNORECASE,
)


_FORMULA = re.compile(r"[\\^_={]")


def _markup(example: Example) -> str | None:
    text = example.response
    asked = "\n".join(m.content for m in example.messages if m.role in ("user", "system"))
    damage = _damage(text, asked)
    if damage is not None:
        return damage
    if "```" in text:
        return "a code fence ``` is not closed" if text.count("```") % 2 else None
    if _ABOUT_CODE.search(asked) or _is_code(text):
        return None
    for what, pattern in (("an HTML entity", _ENTITY), ("a slot of a template", _SLOT)):
        if match := pattern.search(text):
            return f"{what} is left in the answer: {_short(match.group())}"
    if text.count("$$") % 2 and _FORMULA.search(text, text.rindex("$$")):  # $$ alone is a class of prices
        return "a formula $$ is not closed"
    return _unbalanced(text)


def _damage(text: str, asked: str) -> str | None:
    """What a text means to hold only when it is asked about."""
    if match := _SPECIAL.search(text):  # never meant: the tokenizer makes a control token of it
        return f"holds a model's special token {match.group()}"
    if "\ufffd" in text and "\ufffd" not in asked and not _ABOUT_DAMAGE.search(asked):
        return f"holds {text.count(chr(0xFFFD))} replacement characters U+FFFD, traces of a wrong encoding"
    match = _MOJIBAKE.search(text)
    if match and match.group() not in asked and not _ABOUT_DAMAGE.search(asked):
        return f"holds {_short(match.group())}, text that was decoded in a wrong encoding"
    return None


_ABOUT_DAMAGE = re.compile(
    r"乱码|编码|\b(?:encoding|unicode|utf-?8|mojibake|charset)\b|锟斤拷|烫烫烫|屯屯屯", re.IGNORECASE
)


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
    asked = example.messages[-2]
    if asked.role != "user" or _ASKS_TO_REPEAT.search(asked.content):
        return None
    question, response = _plain(asked.content), _LEAD_IN.sub("", example.response)
    head = _plain(response[:32])
    if not head or not question or head[: len(question)] != question[: len(head)]:  # so begins no echo
        return None
    if _GREETING.fullmatch(question):
        return None
    answer = _plain(response)
    times = len(answer) // len(question)
    if times == 1 and answer == question:
        return "the answer equals the question"
    if len(question) >= 6 and answer == question * times:
        return f"the answer is the question, {times} times"
    return None


_LEAD_IN = re.compile(
    r"^\s*(?:(?:您|你)(?:的)?(?:问的?|问题)是?|问题?|you asked|your question(?: is)?|question|q)\s*[:：,，]\s*",
    re.IGNORECASE,
)
_GREETING = re.compile(
    r"(?:您好|你好|大家好|早|早上好|上午好|下午好|晚上好|晚安|再见|拜拜|谢谢您?你?|辛苦了|不客气|.{0,4}快乐|恭喜发财|加油"
    r"|hello|hi|hey|good(?:morning|afternoon|evening|night)|(?:good)?bye|thanks|thankyou|cheers|happy.{0,12}|merrychristmas)+"
)
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
    if example.messages[-2].role != "user" or len(example.response) < 8 or _is_code(example.response):
        return None
    asked, answered = identify(question), identify(example.response)
    if asked.lang == answered.lang or {asked.lang, answered.lang} & {MIXED, UNKNOWN}:
        return None
    if min(asked.confidence, answered.confidence) < 0.7 or _ABOUT_CODE.search(question):
        return None
    if any(asks_for_other_language(m.content) for m in example.messages[:-1]):
        return None
    if _is_of_names(example.response) or _quotes(question, asked.lang, answered.lang):
        return None
    return f"the question is in {asked.lang}, the answer in {answered.lang}"


_LATIN_WORD = re.compile(r"[A-Za-z]{2,}")
_LOWER_WORD = re.compile(r"(?<![A-Za-z0-9])[a-z\u00df-\u00ff]{2,}(?![A-Za-z0-9])")


def _is_of_names(answer: str) -> bool:
    """Names, titles and formulas in Latin letters are in no language: Abbey Road, Help; NaCl + AgNO3."""
    return count_han(answer) == 0 and _LATIN_WORD.search(answer) is not None and len(_LOWER_WORD.findall(answer)) < 3


def _quotes(question: str, asked: str, answered: str) -> bool:
    """Whether words of the answer's script stand in the question: it may well be about them."""
    if asked in LATIN and answered in LATIN:
        return len(_LOWER_WORD.findall(question)) < 4  # too little to be sure which of them it is
    if answered == "zh":
        return count_han(question) > 0
    return answered in LATIN and _LATIN_WORD.search(question) is not None


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
