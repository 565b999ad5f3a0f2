"""Has an answer the form it should have? Its language, JSON where JSON is expected, a refusal only where one is.

Every check compares with the expected answer, so what is right is the user's own to say. None: it does not apply.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pingjia.language import UNKNOWN, identify

# Someone who refuses says so at once, in the first sentences; later the same words are often advice to the user.
_OPENING = 120  # characters
_CANNOT = r"(?:can(?:'|no)?t|cannot|can not|won'?t|will not|not able to|unable to|must decline|have to decline)"
_HELP = r"(?:help|assist|provide|answer|do|write|create|share|support|comply|fulfil+|give|discuss|tell|that|this)"
_REFUSAL = re.compile(
    r"(?:抱歉|对不起|不好意思|很遗憾)[^。！\n]{0,20}(?:不能|无法|不可以|没办法|没法|不便)"
    r"|(?:我|本助手)(?:不能|无法|不可以|没办法|没法|不会|不便|拒绝)(?:为您|为你|帮您|帮你|向您|向你)?"
    r"(?:提供|回答|协助|帮助|满足|完成|生成|编写|写|教|透露|参与|继续|支持|这样做|这么做|帮)"
    r"|恕我?(?:不能|无法)|(?:不能|无法)(?:为您|为你|帮您|帮你)?(?:提供|回答|协助|满足)(?:这|该|此|您的|你的|相关)"
    rf"|\bI(?:'m| am)? {_CANNOT}\b[^.!\n]{{0,24}}\b{_HELP}\b"
    rf"|\b(?:I'm|I am) (?:sorry|afraid)[^.!\n]{{0,30}}\b{_CANNOT}"
    rf"|\bI (?:must )?(?:decline|refuse)\b|\bas an AI\b[^.!\n]{{0,40}}\b{_CANNOT}",
    re.IGNORECASE,
)


def language_match(answer: str, expected: str) -> float | None:
    """1 where the answer is in the language of the expected one; None where that has none (a number, code)."""
    wanted = identify(expected).lang
    if wanted == UNKNOWN:
        return None
    return float(identify(answer).lang == wanted)


def is_refusal(text: str) -> bool:
    """Whether a text begins by refusing, in Chinese or English. Judged by its words: a polite silence is not seen."""
    return bool(_REFUSAL.search(text.strip()[:_OPENING].replace("’", "'")))


def refusal_match(answer: str, expected: str) -> float | None:
    """1 where both refuse or neither does."""
    return float(is_refusal(answer) == is_refusal(expected)) if expected.strip() else None


def json_valid(answer: str, expected: str) -> float | None:
    """1 where the whole answer is a JSON object or list, as the expected one is: no fence, no words around it."""
    if _json(expected) is None:
        return None
    return float(_json(answer) is not None)


def json_equal(answer: str, expected: str) -> float | None:
    """1 where the answer is JSON of the same value; the order of keys and white space do not count."""
    wanted = _json(expected)
    if wanted is None:
        return None
    found = _json(answer)
    return float(found is not None and _canonical(found) == _canonical(wanted))


def _json(text: str) -> dict[str, Any] | list[Any] | None:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
