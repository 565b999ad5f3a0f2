"""Personal data: what is found, what is not, and that a masked row is the same row otherwise."""

from __future__ import annotations

import copy
import itertools
import random
from datetime import date, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.layouts import parse_row
from pingjia.data.personal import KINDS, find_personal, is_id_card, is_luhn, mask, mask_example, mask_row
from pingjia.types import Example, Message


def found(text: str) -> list[tuple[str, str]]:
    return [(text[p.start : p.end], p.kind) for p in find_personal(text)]


VISA = "4111111111111111"


# ---- phone numbers


@pytest.mark.parametrize(
    "number",
    [
        "13812345678",
        "138 1234 5678",
        "138-1234-5678",
        "+86 138 1234 5678",
        "+8613812345678",
        "8613812345678",
        "0086-13812345678",
        "(+86)13812345678",
        "１３８１２３４５６７８",
        "＋８６ １３８－１２３４－５６７８",
        "010-62345678",
        "021 62345678",
        "0755 8234 5678",
        "(021)62345678",
        "（０２１）62345678",
        "0571-8765432",
        "+86 10 6234 5678",
        "010-62345678转123",
        "021-62345678-801",
    ],
)
def test_phone_numbers_in_every_dress(number: str) -> None:
    assert found(f"我的电话是{number}，请回电。") == [(number, "phone")]
    assert found(f"Call me at {number}.") == [(number, "phone")]


def test_phone_numbers_beside_each_other() -> None:
    both = [("13812345678", "phone"), ("13912345678", "phone")]
    for between in ("、", "/", " ", ",", "或"):
        assert found(f"13812345678{between}13912345678") == both
    assert found("微信13812345678同号，tel13912345678") == both


@pytest.mark.parametrize(
    "text",
    [
        "客服400-812-3456",
        "4008123456",
        "800-810-1234",
        "请拨95588",
        "拨12315投诉，报警110，急救120，10086",
        "2023-10-12 13:45",
        "价格1380000元",
        "12345678901",
        "3.13812345678",
        "π=3.14159265358979",
        "0.0212345678",
        "ISBN 978-7-111-12345-6",
        "序列号SN13812345678，型号13812345678X",
        "20231012",
        "版本1.3.8.1234，IP 192.168.1.100",
        "QQ123456，邮编100080",
        "时间戳1700000000000",
        "138123456789",
        "销量 13800 00000 件",
    ],
)
def test_numbers_that_belong_to_nobody(text: str) -> None:
    assert found(text) == []


# ---- identity cards


@st.composite
def id_cards(draw: st.DrawFn) -> str:
    area = draw(st.sampled_from(["110105", "310104", "440305", "510107", "650102", "820000"]))
    born = date(1900, 1, 1) + timedelta(days=draw(st.integers(0, 45000)))
    body = f"{area}{born:%Y%m%d}{draw(st.integers(0, 999)):03d}"
    return body + _check_digit(body)


def _check_digit(body: str) -> str:
    """ISO 7064 MOD 11-2 by its recurrence, not by the table of weights that the code uses."""
    total = 0
    for digit in body:
        total = (total + int(digit)) * 2 % 11
    return "0123456789X"[(12 - total) % 11]


@given(id_cards(), st.sampled_from(["身份证号{}", "我的身份证是{}，请核对", "ID {}", "{}"]), st.booleans())
def test_identity_cards_are_found(number: str, frame: str, lower: bool) -> None:
    number = number.lower() if lower else number
    assert found(frame.format(number)) == [(number, "id_card")]


@given(id_cards(), st.integers(0, 17), st.integers(1, 9))
def test_no_changed_digit_is_an_identity_card(number: str, at: int, by: int) -> None:
    """The check digit notices every change of one digit."""
    old = 10 if number[at] == "X" else int(number[at])
    changed = number[:at] + str((old + by) % 10) + number[at + 1 :]
    if changed != number:
        assert not is_id_card(changed)
        assert ("id_card") not in {kind for _, kind in found(f"身份证号{changed}")}


def test_a_right_checksum_is_not_enough() -> None:
    for body in ("11010519490231002", "99010519491231002", "11010519491301002"):  # 31 February, no province, month 13
        assert found(f"身份证号{body}{_check_digit(body)}") == []


def test_identity_cards_in_groups_and_wide_digits() -> None:
    assert found("身份证 110105 19491231 002X。") == [("110105 19491231 002X", "id_card")]
    assert found("１１０１０５１９４９１２３１００２Ｘ") == [("１１０１０５１９４９１２３１００２Ｘ", "id_card")]


def test_old_identity_cards_need_the_word() -> None:
    assert found("老身份证号130503670401001") == [("130503670401001", "id_card")]
    assert found("流水130503670401001，商品130503670401001") == []
    assert found("身份证号130503670431001") == []  # 31 April


# ---- bank cards


def _with_luhn(body: str) -> str:
    return next(body + d for d in "0123456789" if _luhn_sum(body + d) % 10 == 0)


def _luhn_sum(digits: str) -> int:
    """From the table of doubled digits, independent of the code."""
    return sum(int("0246813579"[int(d)] if i % 2 else d) for i, d in enumerate(reversed(digits)))


CARDS = [("622202", 19), ("621700", 19), ("622588", 16), ("4", 16), ("51", 16), ("2223", 16), ("37", 15), ("36", 14)]


@st.composite
def bank_cards(draw: st.DrawFn) -> str:
    start, size = draw(st.sampled_from(CARDS))
    middle = draw(st.text("0123456789", min_size=size - len(start) - 1, max_size=size - len(start) - 1))
    return _with_luhn(start + middle)


@given(bank_cards(), st.sampled_from(["卡号{}", "my card is {}, thanks", "{}"]))
def test_bank_cards_are_found(number: str, frame: str) -> None:
    assert found(frame.format(number)) == [(number, "bank_card")]


@given(bank_cards(), st.sampled_from([" ", "-"]))
def test_bank_cards_in_groups_of_four(number: str, between: str) -> None:
    if len(number) >= 16:
        grouped = between.join(number[i : i + 4] for i in range(0, len(number), 4))
        assert found(f"卡号 {grouped}。") == [(grouped, "bank_card")]


@given(bank_cards(), st.integers(1, 9))
def test_a_wrong_check_digit_is_no_bank_card(number: str, by: int) -> None:
    changed = number[:-1] + str((int(number[-1]) + by) % 10)
    assert not is_luhn(changed)
    assert "bank_card" not in {kind for _, kind in found(f"卡号{changed}")}


def test_what_stands_behind_a_card_is_no_part_of_it() -> None:
    assert found(f"{VISA} 12/26") == [(VISA, "bank_card")]
    assert found("4111 1111 1111 1111 2 件") == [("4111 1111 1111 1111", "bank_card")]


@pytest.mark.parametrize("number", ["0000000000000000", "1234567890123452", "20231012000100016", f"{VISA}.5"])
def test_other_long_numbers_are_no_bank_cards(number: str) -> None:
    assert found(f"编号 {number}") == []


def test_a_barcode_is_no_old_visa_card() -> None:
    code = _with_luhn("490123456789")
    assert found(f"条码{code}") == []
    assert found(f"银行卡{code}") == [(code, "bank_card")]


# ---- mail


@pytest.mark.parametrize(
    "address", ["zhang.san@qq.com", "a_b+c@mail.example.com.cn", "13812345678@163.com", "zhangsan＠163.com"]
)
def test_addresses(address: str) -> None:
    assert found(f"邮箱是{address}，谢谢") == [(address, "email")]


@pytest.mark.parametrize(
    "text", ["张三@微博", "npm i foo@1.2.3", "git@github.com:a/b.git", "a@b.c", "help@a.com", "@all"]
)
def test_no_addresses_of_a_person(text: str) -> None:
    assert found(text) == []


# ---- order numbers


@pytest.mark.parametrize(
    ("before", "number"),
    [
        ("订单号：", "202310120001234"),
        ("订单号是", "E20231012-0001"),
        ("我的订单 ", "202310120001"),
        ("快递单号", "SF1234567890123"),
        ("运单号 ", "YT8812345678901"),
        ("订单编号为", "1234567890"),
        ("订单号", "13812345678"),
        ("订单号：【", "202310120001"),
        ("订单号：", "20231012"),
        ("order no. ", "12345678"),
        ("Order #", "A1234567"),
        ("order number is ", "112-3456789-1234567"),
        ("Tracking number: ", "1Z999AA10123456784"),
    ],
)
def test_order_numbers(before: str, number: str) -> None:
    assert found(f"{before}{number}") == [(number, "order_number")]


@pytest.mark.parametrize(
    "text",
    [
        "订单满99999元包邮",
        "订单金额12345元",
        "订单123456元起送",
        "订单号是什么，在哪里看",
        "订单 20231012 已下",
        "菜单号1234567",
        "运单号请打10086问",
        "your order 2 days ago",
        "order number can be found here",
    ],
)
def test_no_order_numbers(text: str) -> None:
    assert found(text) == []


# ---- kinds, overlaps, masks


def test_only_the_kinds_asked_for() -> None:
    text = "13812345678，a1@qq.com，身份证11010519491231002X，订单号E20231012"
    assert [p.kind for p in find_personal(text)] == ["phone", "email", "id_card", "order_number"]
    for kind in KINDS:
        assert {p.kind for p in find_personal(text, [kind])} <= {kind}
    assert mask(text, []) == (text, {})


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("手机13812345678", "手机【手机号】"),
        ("call 13812345678", "call [PHONE]"),
        ("身份证11010519491231002X", "身份证【身份证号】"),
        (f"卡{VISA}，订单号E2023101", "卡【银行卡号】，订单号【订单号】"),
        ("write to li.si@163.com", "write to [EMAIL]"),
    ],
)
def test_masks_say_what_stood_there(text: str, masked: str) -> None:
    assert mask(text)[0] == masked


PIECES = [
    "13812345678",
    VISA,
    "4111 1111 1111 1111",
    "11010519491231002X",
    "130503670401001",
    "zhangsan@qq.com",
    "@qq.com",
    "订单号",
    "身份证",
    "卡",
    "order no. ",
    "E2023101",
    "010-",
    "(021)",
    "62345678",
    "+86 ",
    *" -.，/aX9张",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join)


@given(texts)
def test_places_are_in_order_and_apart(text: str) -> None:
    places = find_personal(text)
    assert all(0 <= p.start < p.end <= len(text) for p in places)
    assert all(a.end <= b.start for a, b in itertools.pairwise(places))


@given(texts, st.sampled_from([None, True, False]))
def test_masking_leaves_nothing_to_mask(text: str, english: bool | None) -> None:
    once, count = mask(text, english=english)
    assert find_personal(once) == []
    assert mask(once, english=english) == (once, {})
    assert (once == text) == (not count)


@given(texts)
def test_what_is_not_personal_stays(text: str) -> None:
    """The characters outside the spans are those of the masked text outside the masks."""
    places = find_personal(text)
    rest = text
    for p in reversed(places):
        rest = rest[: p.start] + "\0" + rest[p.end :]
    masked = mask(text, english=True)[0]
    for kind in ("PHONE", "ID CARD", "BANK CARD", "EMAIL", "ORDER NUMBER"):
        masked = masked.replace(f"[{kind}]", "\0")
    if len(places) == sum(mask(text)[1].values()):
        assert masked == rest


# ---- whole rows

QUESTION = "我的订单号E20231012，手机13812345678，到哪了？"
ANSWER = "您的E20231012已发出，会打13812345678联系您。"


def example(**fields: Any) -> Example:
    return Example((Message("user", QUESTION), Message("assistant", ANSWER)), **fields)


def test_all_texts_of_an_example_are_masked_alike() -> None:
    masked, count = mask_example(example(facts=("E20231012", "13812345678"), reference="打13812345678"))
    assert masked.messages[0].content == "我的订单号【订单号】，手机【手机号】，到哪了？"
    assert masked.response == "您的【订单号】已发出，会打【手机号】联系您。"
    assert masked.facts == ("【订单号】", "【手机号】")
    assert masked.reference == "打【手机号】"
    assert count == {"order_number": 2, "phone": 2}  # facts and reference repeat what the turns say


def test_a_fact_that_is_a_part_of_a_number_still_stands_in_the_answer() -> None:
    for fact in ("5678", "20231012", "已发出", "会打13812345678联系"):
        masked, _ = mask_example(example(facts=(fact,)))
        assert masked.facts[0] in masked.response, fact
    masked, _ = mask_example(example(facts=("已发出",)))
    assert masked.facts == ("已发出",)


def test_an_example_without_personal_data_is_the_same_object() -> None:
    clean = Example((Message("user", "几点开门？"), Message("assistant", "九点。")), facts=("九点",))
    assert mask_example(clean) == (clean, {})
    assert mask_example(clean)[0] is clean


ROW: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": QUESTION, "13812345678": 1},
        {"role": "assistant", "content": ANSWER},
    ],
    "history": [["电话？", "13812345678"]],
    "facts": ["E20231012", "5678"],
    "id": 13812345678,
    "lang": None,
}


def test_rows_are_masked_at_any_depth_and_keys_stay() -> None:
    before = copy.deepcopy(ROW)
    masked = mask_row(ROW)
    assert before == ROW
    assert [*masked] == [*ROW]
    assert masked["messages"][0] == {
        "role": "user",
        "content": "我的订单号【订单号】，手机【手机号】，到哪了？",
        "13812345678": 1,
    }
    assert masked["history"] == [["电话？", "【手机号】"]]  # in the language of the row
    assert masked["facts"] == ["【订单号】", "【手机号】"]
    assert (masked["id"], masked["lang"]) == (13812345678, None)


def test_a_row_and_its_example_get_the_same_masks() -> None:
    question, answer = "Call me: 13812345678", "We will call 13812345678."
    masked_row = mask_row({"prompt": question, "response": answer, "facts": ["5678"], "topic": "电话"})
    turns = (Message("user", question), Message("assistant", answer))
    masked, _ = mask_example(Example(turns, facts=("5678",), topic="电话"))
    assert [masked_row["prompt"], masked_row["response"]] == [m.content for m in masked.messages]
    assert tuple(masked_row["facts"]) == masked.facts == ("[PHONE]",)


def test_masking_a_row_twice_changes_nothing_more() -> None:
    chance = random.Random(4)
    for _ in range(300):
        row = {name: "".join(chance.choices(PIECES, k=4)) for name in ("prompt", "response", "note")}
        once = mask_row(row)
        assert mask_row(once) == once


CALL = {"name": "call", "arguments": '{"phone": 13812345678, "who": "13912345678", "n": 3}'}


def test_calls_of_tools_are_masked_and_stay_json() -> None:
    """In the row as it was, and in what becomes of it: a number that is personal becomes a string."""
    turns = [
        {"role": "user", "content": "请打电话"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
        {"role": "tool", "content": '{"dialled": 13812345678}'},
        {"role": "assistant", "content": "好的"},
    ]
    row = {"messages": turns}
    example = parse_row(row, "f:1").example
    assert example is not None
    masked, count = mask_example(example)
    assert count == {"phone": 3}
    assert masked.messages[1].tool_calls[0].arguments == '{"phone": "【手机号】", "who": "【手机号】", "n": 3}'
    assert masked.messages[2].content == '{"dialled": "【手机号】"}'
    again = parse_row(mask_row(row), "f:1").example
    assert again == masked


def test_arguments_that_are_an_object_are_masked_too() -> None:
    call = {"name": "call", "arguments": {"phone": 13812345678}}
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": call}]}
    assert mask_row(row)["conversations"][1]["value"]["arguments"] == {"phone": "[PHONE]"}
