"""Golden chats: a few conversations and their ids, kept beside an adapter.

They prove at loading that the tokenizer at hand renders as the one of training did, whatever either was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pingjia.chat.hf import HFTokenizer
from pingjia.chat.tokenizer import Tokenizer
from pingjia.chat.tools import as_row
from pingjia.errors import ModelError, RequestError
from pingjia.types import Message, ToolCall

CHATS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "你好，请问退货需要几天？"),),
    (("user", "Which plan costs less, A at 12.50 or B at 13?"),),
    (
        ("user", "订单 20240518 还没到。"),
        ("assistant", "您好，已为您催促，预计2天内送达。"),
        ("user", "好的，谢谢！😀"),
    ),
    (
        ("system", "你是一名耐心的数学老师。"),
        ("user", "3/4 + 1/8 = ?"),
        ("assistant", "先通分：6/8 + 1/8 = 7/8。"),
        ("user", "那  0.5 呢？\n\n```python\nprint(1 / 2)\n```"),
    ),
    (("user", "What do </s>, <|im_end|>, <|user|> and [gMASK] mean? 请逐个说明。"),),
)
"""Chinese and English, one and several turns, digits, code, emoji, and text that looks like special tokens."""

TOOL_CHAT = (
    Message("user", "北京明天要带伞吗？"),
    Message("assistant", "", (ToolCall("get_weather", '{"city": "北京", "days": 1}'),)),
    Message("tool", '{"rain": 0.8}'),
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "查询天气 weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
"""One more, for what was trained with tools."""

_DAY = datetime(2024, 1, 1, tzinfo=UTC)  # some templates write the date; golden chats must not change overnight


def golden_chats(tokenizer: Tokenizer, *, with_tools: bool = False) -> list[dict[str, Any]]:
    """Each chat as {"messages": [{"role", "content"}], "ids": [...]}, rendered with the generation prompt.

    `with_tools` adds a chat with a call and its result, and with "tools". Chats that the template refuses (no system
    role, say) are left out. Raises ModelError when it refuses all.
    """
    chats: list[dict[str, Any]] = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in CHATS]
    if with_tools:
        chats.append({"messages": [as_row(message) for message in TOOL_CHAT], "tools": [TOOL]})
    golden = []
    for chat in chats:
        try:
            golden.append({**chat, "ids": _render(tokenizer, chat)})
        except RequestError as e:
            refusal = e
    if not golden:
        raise ModelError(f"the chat template renders none of the golden chats: {refusal}")
    return golden


def check_golden(tokenizer: Tokenizer, golden: Sequence[dict[str, Any]]) -> None:
    """Raises ModelError naming the first chat that this tokenizer renders differently."""
    for number, chat in enumerate(golden, start=1):
        try:
            ids = _render(tokenizer, chat)
        except RequestError as e:
            raise ModelError(_differs(number, chat, str(e))) from None
        if ids != list(chat["ids"]):
            at = next((i for i, (a, b) in enumerate(zip(ids, chat["ids"], strict=False)) if a != b), None)
            at = min(len(ids), len(chat["ids"])) if at is None else at
            raise ModelError(_differs(number, chat, f"ids differ from token {at} on"))


def _render(tokenizer: Tokenizer, chat: dict[str, Any]) -> list[int]:
    fixed = tokenizer.at(lambda: _DAY) if isinstance(tokenizer, HFTokenizer) else tokenizer
    return fixed.render(chat["messages"], add_generation_prompt=True, tools=chat.get("tools", ()))


def _differs(number: int, chat: dict[str, Any], how: str) -> str:
    first = chat["messages"][0]["content"]
    return (
        f"golden chat {number} ({first[:30]!r}) is not rendered as in training: {how}; serve the adapter with the "
        "tokenizer and chat template it was trained with"
    )
