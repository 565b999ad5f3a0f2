"""How protected pieces look: patterns for numbers, negations, codes, addresses, placeholders, formulas, emoji.

A pattern that doubts protects. Runs are bounded, so that no text costs more than its length. Not here: names
(`spans.py`, they need a dictionary).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_HAN = "\u3400-\u9fff\U00020000-\U000323af"
_STOPS = f"\\s{_HAN}，。；！？、）》”"
_ENDINGS = (
    "py|js|ts|json|jsonl|yaml|yml|toml|txt|md|csv|xlsx?|docx?|pptx?|pdf|png|jpe?g|gif|mp[34]|zip|gz|exe|apk|html?|css|sql"
    "|sh|cfg|ini|log"
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_URL = re.compile(
    rf"(?:https?|ftp)://[^{_STOPS}]+|www\.[^{_STOPS}]+"
    r"|(?<![A-Za-z0-9@.-])(?:[A-Za-z0-9-]{1,63}\.){1,9}(?:com|cn|net|org|io|gov|edu|top|shop|info)(?![A-Za-z0-9])"
    r"(?:/[A-Za-z0-9_./?=&%#-]*)?"
)
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,9}[A-Za-z]{2,24}")
_PLACEHOLDER = re.compile(
    r"\{\{[^{}\n]*\}\}|\$?\{[^{}\n]*\}|</?[A-Za-z_|!][^<>\n]{0,80}>|\[\[[^\[\]\n]*\]\]|\[[^\[\]\n]{1,40}\]"
    r"|【[^【】\n]{1,40}】|〔[^〔〕\n]{1,40}〕|%(?:\([A-Za-z0-9_]+\))?[-+0#]?\d{0,3}(?:\.\d{1,3})?[sdifgxr](?![A-Za-z])"
    r"|\$[A-Za-z_][A-Za-z0-9_]*|%[A-Z_]+%|_{2,}[A-Za-z0-9_]*"
)
_QUOTED = re.compile(
    r"《[^《》\n]{1,300}》|〈[^〈〉\n]{1,300}〉|“[^“”\n]{1,300}”|「[^「」\n]{1,300}」|『[^『』\n]{1,300}』|‘[^‘’\n]{1,300}’"
    r"|\"[^\"\n]{1,300}\"|(?<![\w'])'[^'\n]{1,300}'(?![\w'])"
)
_PATH = re.compile(
    rf"(?:[A-Za-z]:\\|\\\\)[^{_STOPS}\"'<>|]+|(?<![A-Za-z0-9/.<])(?:~|\.{{1,2}})?/[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]*)*"
    rf"|(?<![A-Za-z0-9_/.-])[A-Za-z0-9_-]+(?:[/.][A-Za-z0-9_-]+)*\.(?:{_ENDINGS})(?![A-Za-z0-9])"
)
_SKU = re.compile(
    r"(?<![A-Za-z0-9])(?=[A-Za-z_./+-]{0,40}\d)(?=[0-9_./+-]{0,40}[A-Za-z])[A-Za-z0-9]+(?:[-_./+][A-Za-z0-9]+)*"
)
_TERM = "A-Za-z0-9α-ωΑ-Ω_.()（）%²³⁰-⁹₀-₉π∞'′"
_FORMULA = re.compile(
    rf"(?:[{_TERM}+\-*/]{{1,40}}\s?)?[=≤≥≠≈×÷√²³^±⁰-⁹₀-₉∑∫→](?:\s?[{_TERM}=≤≥≠≈×÷√^±∑∫→+\-*/]{{1,40}})*"
    r"|[A-Za-z0-9.)]{1,40}\s?[<>]\s?[A-Za-z0-9.(-]{1,40}"
)
_EMOJI = re.compile(
    "[\U0001f1e6-\U0001f1ff]{2}|[0-9#*]\ufe0f?\u20e3|"
    "[\U0001f300-\U0001faff\u2600-\u27bf\u2b00-\u2bff\u231a-\u23ff\u3030\u303d\u3297\u3299]"
    "[\ufe0f\U0001f3fb-\U0001f3ff]*(?:\u200d[\U0001f300-\U0001faff\u2600-\u27bf][\ufe0f\U0001f3fb-\U0001f3ff]*)*"
)
_FORMS = (
    ("code", _CODE),
    ("url", _URL),
    ("email", _EMAIL),
    ("placeholder", _PLACEHOLDER),
    ("quoted", _QUOTED),
    ("path", _PATH),
    ("sku", _SKU),
    ("formula", _FORMULA),
    ("emoji", _EMOJI),
)

# ---- numbers

_DIGITS = "[0-9０-９]"
_DIGIT_NUMBER = (
    r"(?:(?<![A-Za-z0-9０-９])[-+−])?(?:(?:[¥￥$€£]|RMB|CNY|USD|HK\$)\s?)?"
    rf"(?:{_DIGITS}{{1,3}}(?:[,，]{_DIGITS}{{3}})+|{_DIGITS}+)(?:[.．:：/／-]{_DIGITS}+)*"
)
_NUMERAL = "[零〇一二两俩三仨四五六七八九十百千万亿兆壹贰叁肆伍陆柒捌玖拾佰仟廿卅]"
_UNIT_ZH = (
    "小时|分钟|秒钟|刻钟|点钟|个半|个多|个月|年级|季度|平方米|立方米|平方厘米|立方厘米|平方|立方|公里|公斤|千米|厘米|毫米|千克|毫升|克拉"
    "|摄氏度|人民币|美元|美金|欧元|日元|英镑|港币|分之|[年月日号天周点时分秒岁元块角折倍成度米寸尺丈里亩吨斤两克升瓦伏页章节课题行段句字词条项"
    "款种类批次回遍趟个位名人口只头匹件套台部辆架艘栋间层楼室户家座把张本册支枝根颗粒片杯瓶罐盒箱包袋碗盘桌份双对组班级代届期格牛]"
)
_UNIT_EN = (
    r"(?:%|％|‰|℃|℉|°C?|k[gmwWhH]+|[kKmMgGtT]i?[bB](?:ps)?|mAh|ml|mL|cm|mm|kg|km|k?W|k?Wh|V|A|L|g|m|s|h|Hz|GHz|MHz|dB|px|fps"
    r"|years?|months?|weeks?|days?|hours?|minutes?|seconds?|percent|dollars?|yuan|inch(?:es)?|feet|miles?"
    r"|am|pm|a\.m\.|p\.m\.|st|nd|rd|th)(?![A-Za-z])"
)
_BEFORE = r"(?:(?:上午|下午|早上|晚上|中午|凌晨|傍晚|夜里|星期|礼拜|周|第|初|农历|百分之|千分之)\s?)?"
_QUANTITY = f"(?:{_DIGIT_NUMBER}|{_NUMERAL}+(?:点{_NUMERAL}+)?)"
_AMOUNT = rf"{_QUANTITY}(?:\s?{_UNIT_EN}|\s?{_UNIT_ZH}|[半多余整]|以[上下内]|{_QUANTITY})*"
# Words with a numeral in them that are no number.
_NO_NUMBERS = (
    "一般来说|一般而言|一下子|一下|一些|一样|一起|一同|一块儿|一般|一定|一直|一共|一边|一旦|一致|一切|一律|一向|一路|一再|一时|一会儿|一方面|一会"
    "|一味|一番|一概|一贯|一带|一连|一齐|一面|统一|唯一|万一|逐一|之一|专一|单一|万分|十分|千万(?=别|不|要)|万能|百分比|三明治|八卦|七夕|五官|四处|四周|四季"
    "|两边|两侧|两者|百科|百货|千方百计|一心|一目了然|乱七八糟|二手|二维码|五金|十足|万万|一体"
)
_NUMBER_WORDS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    "|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion|dozen"
    "|half|quarter|third|fourth|fifth|first|second|twice|once|double|triple|noon|midnight"
)
_NUMBER = re.compile(
    rf"(?P<skip>{_NO_NUMBERS})"
    rf"|(?P<number>{_BEFORE}{_AMOUNT}(?:\s?(?:[-~～—–:：]|到|至|to)\s?{_AMOUNT})*|半(?:小时|个|[年月天日价折斤亩])月?"
    rf"|[①-⑳㈠-㈩⑴-⒇Ⅰ-Ⅻ½¼¾⅓⅔]|(?<![A-Za-z])(?:{_NUMBER_WORDS})(?:[- ](?:{_NUMBER_WORDS}))*(?![A-Za-z]))",
    re.IGNORECASE,
)

# ---- negations

# 能不能, 有没有, 可不可以 ask; they deny nothing. Neither do these words.
_NO_NEGATIONS = (
    "非常|特别|分别|区别|差别|类别|性别|级别|派别|个别|别墅|别人|别的|别名|识别|辨别|鉴别|告别|离别|别致|未来|莫名|莫斯科|无论|不管|不论|不过|不但|不仅"
    "|不光|不锈钢|不断|不久|不同|不好意思|不客气|对不起|差不多|无线|无人机|没收|淹没|沉没|出没|非洲|莫非|要不然|要不|不得不|无非|莫不"
)
_NEGATION = re.compile(
    rf"(?P<skip>{_NO_NEGATIONS}|(?P<asked>[{_HAN}]{{1,2}})[不没](?P=asked))|(?P<negation>[不没無无非未别別勿莫甭毋]"
    r"|(?<![A-Za-z])(?:not|no|never|without|none|nothing|nobody|nowhere|nor|neither|cannot|except|unless|hardly|barely)"
    r"(?![A-Za-z])"
    r"|(?<=[a-z])n['’]t(?![A-Za-z]))",
    re.IGNORECASE,
)


def by_form(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, kind) of every protected piece that shows by its form; they may overlap."""
    for kind, form in _FORMS:
        yield from ((*m.span(), kind) for m in form.finditer(text))
    yield from ((*m.span("number"), "number") for m in _NUMBER.finditer(text) if m["number"])
    yield from ((*m.span("negation"), "negation") for m in _NEGATION.finditer(text) if m["negation"])
