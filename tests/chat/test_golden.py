"""Golden chats find a tokenizer that renders differently from the one of training."""

import json
from typing import Any

import pytest
import tokenizers

from pingjia.chat import check_golden, golden_chats, load_tokenizer
from pingjia.chat.hf import HFTokenizer
from pingjia.errors import ModelError


def test_chats_cover_what_differs_between_tokenizers(smollm2: HFTokenizer) -> None:
    golden = golden_chats(smollm2)
    text = "".join(m["content"] for chat in golden for m in chat["messages"])
    assert len(golden) == 5
    assert any(len(chat["messages"]) > 2 for chat in golden)
    for part in ("你好", "12.50", "  0.5", "\n\n```python", "😀", "<|im_end|>"):
        assert part in text
    assert golden[0]["ids"] == smollm2.render(golden[0]["messages"])


def test_the_same_tokenizer_passes(smollm2: HFTokenizer) -> None:
    check_golden(load_tokenizer("smollm2"), golden_chats(smollm2))


def test_another_template_is_found(smollm2: HFTokenizer) -> None:
    other = load_tokenizer("smollm2", template="plain")
    with pytest.raises(ModelError, match=r"golden chat 1 \('你好.*ids differ from token 0 on"):
        check_golden(other, golden_chats(smollm2))


def test_another_vocabulary_is_found(smollm2: HFTokenizer, reference: Any, tmp_path: Any) -> None:
    """transformers' reading of the GGUF differs only in "  0.5": the fourth chat is there for that."""
    reference.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="golden chat 4"):
        check_golden(load_tokenizer(tmp_path), golden_chats(smollm2))


def test_a_shorter_rendering_is_found(smollm2: HFTokenizer) -> None:
    golden = golden_chats(smollm2)
    golden[2] = {**golden[2], "ids": golden[2]["ids"][:-1]}
    with pytest.raises(ModelError, match=r"golden chat 3.*ids differ from token"):
        check_golden(smollm2, golden)


def test_a_template_that_now_refuses_is_found(smollm2: HFTokenizer, make_model: Any, byte_level: Any) -> None:
    other = make_model(byte_level, "{{ raise_exception('never') }}")
    with pytest.raises(ModelError, match=r"golden chat 1.*never"):
        check_golden(other, golden_chats(smollm2))


def test_chats_the_template_refuses_are_left_out(make_model: Any, byte_level: tokenizers.Tokenizer) -> None:
    no_system = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    assert len(golden_chats(make_model(byte_level, no_system))) == 4


def test_a_template_that_refuses_all_is_an_error(make_model: Any, byte_level: tokenizers.Tokenizer) -> None:
    with pytest.raises(ModelError, match="none of the golden chats"):
        golden_chats(make_model(byte_level, "{{ raise_exception('never') }}"))


def test_golden_chats_do_not_depend_on_the_day(make_model: Any, byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = make_model(byte_level, "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    assert tokenizer.decode(golden_chats(tokenizer)[0]["ids"]).startswith("01 Jan 2024")
    assert not tokenizer.decode(tokenizer.render([{"role": "user", "content": "x"}])).startswith("01 Jan 2024")


def test_a_chat_with_tools_for_what_was_trained_with_them(smollm2: HFTokenizer) -> None:
    golden = json.loads(json.dumps(golden_chats(smollm2, with_tools=True)))
    assert golden[:-1] == golden_chats(smollm2)
    assert '"name": "get_weather", "description": "查询天气' in smollm2.decode(golden[-1]["ids"])
    check_golden(smollm2, golden)
    del golden[-1]["tools"]
    with pytest.raises(ModelError, match="golden chat 6"):
        check_golden(smollm2, golden)


def test_another_form_of_calls_is_found(make_model: Any, byte_level: tokenizers.Tokenizer) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    )
    golden = golden_chats(make_model(byte_level, "{{ tools }}" + template), with_tools=True)
    plain = make_model(byte_level, "{{ tools }}" + template.replace("tool_calls", "no_calls"))
    check_golden(make_model(byte_level, "{{ tools }}" + template), golden)
    with pytest.raises(ModelError, match="golden chat 6"):
        check_golden(plain, golden)
