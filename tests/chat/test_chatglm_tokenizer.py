"""ChatGLM's tokenizers against the published ones' outputs, and against the SentencePiece library itself."""

import io
import itertools
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from pingjia.chat import load_tokenizer
from pingjia.chat.chatglm import ChatGLM2Tokenizer, ChatGLM3Tokenizer, ChatGLMTokenizer
from pingjia.chat.sentencepieces import PieceStream, Vocabulary
from pingjia.chat.text_stages import (
    ChinesePunctuation,
    CleanUpSpaces,
    Replace,
    Strip,
    clean_up_spaces,
)
from pingjia.chat.tools import parse_tool_calls
from pingjia.errors import ModelError, RequestError
from pingjia.types import Example, Message, ToolCall

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures" / "chatglm"

LINES = [
    "你好，世界！今天的天气很好，我们去公园吧。问：答：",
    "清华大学是中国著名的综合性大学，位于北京市。",
    "[Round 0] [Round 1] The quick brown fox, don't you know? It's we're 've n't.",
    "def area(r): return 3.14159 * r ** 2  # name's",
    "price = {'a': 12.50, 'b': 13}; print(price['a'])",
] * 8


def train(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def v1_bytes() -> bytes:
    return train(
        model_type="unigram",
        vocab_size=560,
        normalization_rule_name="nmt_nfkc",
        pad_id=3,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        control_symbols=["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"],
        user_defined_symbols=["<n>", "<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))],
    )


@pytest.fixture(scope="module")
def v2_bytes() -> bytes:
    return train(
        model_type="bpe",
        vocab_size=420,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
    )


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory, v1_bytes: bytes) -> ChatGLMTokenizer:
    directory = tmp_path_factory.mktemp("v1")
    (directory / "ice_text.model").write_bytes(v1_bytes)
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, ChatGLMTokenizer)
    return tokenizer


def v2_directory(directory: Path, v2_bytes: bytes, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(v2_bytes)
    (directory / "config.json").write_text(
        json.dumps({"model_type": "chatglm", "padded_vocab_size": 512, "multi_query_group_num": 2} | config)
    )
    return directory


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory, v2_bytes: bytes) -> ChatGLM2Tokenizer:
    tokenizer = load_tokenizer(v2_directory(tmp_path_factory.mktemp("v2"), v2_bytes, seq_length=32768))
    assert type(tokenizer) is ChatGLM2Tokenizer
    return tokenizer


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory, v2_bytes: bytes) -> ChatGLM3Tokenizer:
    tokenizer = load_tokenizer(v2_directory(tmp_path_factory.mktemp("v3"), v2_bytes, seq_length=8192))
    assert isinstance(tokenizer, ChatGLM3Tokenizer)
    return tokenizer


def chat(query: str, history: list[list[str]]) -> list[dict[str, str]]:
    turns = [(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": text} for role, text in [*turns, ("user", query)]]


def streamed(stream: Any, ids: list[int], rng: random.Random) -> list[str]:
    pieces, start = [], 0
    while start < len(ids):
        stop = start + rng.randint(1, 3)
        pieces.append(stream.feed(ids[start:stop]))
        start = stop
    return [*pieces, stream.flush()]


# ---- against the published tokenizers


def expected(name: str) -> dict[str, Any]:
    if not SHARED.is_dir():
        pytest.skip(f"no reference outputs beside the repository: {SHARED}")
    return json.loads((SHARED / name).read_text(encoding="utf-8"))


def test_v1_ids_and_text_equal_the_published_tokenizer_on_every_case() -> None:
    cases = expected("tokenizer/expected_tokens.json")["cases"]
    tokenizer = load_tokenizer(SHARED / "tokenizer")
    assert len(cases) >= 30
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids_plain"], case["text"]
        assert tokenizer.render_text(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids_plain"]) == case["decode_plain"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decode"], case["text"]


def test_v1_pairs_and_decoding_of_special_ids_equal_the_published_tokenizer() -> None:
    reference = expected("tokenizer/expected_tokens.json")
    tokenizer = load_tokenizer(SHARED / "tokenizer")
    for pair in reference["pairs"]:
        built = [*tokenizer.render_text(pair["a"]), *tokenizer.encode(pair["b"]), *tokenizer.stop_ids]
        assert built == pair["ids"]
    for case in reference["decode"]:
        assert tokenizer.decode(case["ids"]) == case["decode"], case["ids"]
    for name, token in reference["specials"].items():
        ours = {"bos": "sop", "eos": "eop"}.get(name, name)
        assert tokenizer.special_ids.get(ours, token) == token  # type: ignore[attr-defined]
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (3, 130344)


def test_v1_padding_and_truncation_of_the_published_tokenizer_follow_from_ours() -> None:
    reference = expected("tokenizer/expected_tokens.json")
    tokenizer = load_tokenizer(SHARED / "tokenizer")
    for batch in reference["batch"]:
        rendered = [tokenizer.render_text(text) for text in batch["texts"]]
        width = max(map(len, rendered))
        assert [[tokenizer.pad_id] * (width - len(ids)) + ids for ids in rendered] == batch["input_ids"]
    for case in reference["trunc"]:
        kept = tokenizer.encode(case["text"])[: case["max_length"] - 2]
        assert [*kept, *tokenizer.render_text("")] == case["ids"]


def test_v1_chats_equal_the_published_chat() -> None:
    reference = expected("tiny_v1_chat/expected.json")
    tokenizer = load_tokenizer(SHARED / "tiny_v1_chat")
    assert isinstance(tokenizer, ChatGLMTokenizer)
    for case in reference["chat"]:
        assert tokenizer.render(chat(case["query"], case["history"])) == case["prompt_ids"]
        assert tokenizer.decode(case["output_ids"]) == case["decoded"]
        assert tokenizer.decode_answer(case["output_ids"]) == case["response"]


def test_v1_answers_are_post_processed_as_published() -> None:
    for case in expected("tiny_v1_chat/expected.json")["process_response"]:
        text = case["in"]
        for stage in (Strip(), Replace({"[[训练时间]]": "2023年"}), ChinesePunctuation()):
            text = stage.feed(text) + stage.flush()
        assert text == case["out"]


def test_v2_ids_and_text_equal_the_published_tokenizer_on_every_case() -> None:
    reference = expected("tiny_v2/expected_tokens.json")
    tokenizer = load_tokenizer(SHARED / "tiny_v2")
    assert tokenizer.family == "chatglm2"
    for case in reference["cases"]:
        assert tokenizer.render_text(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decode"], case["text"]
    for case in reference["chat"]:
        assert tokenizer.render(chat(case["query"], case["history"])) == case["ids"]
    for case in expected("tiny_v2/expected.json")["chat"]:
        assert tokenizer.render(chat(case["query"], case["history"])) == case["prompt_ids"]


@pytest.mark.parametrize("name", ["tokenizer", "tiny_v2"])
def test_streams_equal_the_whole_on_every_published_case(name: str) -> None:
    cases = expected(f"{name}/expected_tokens.json")["cases"]
    tokenizer = load_tokenizer(SHARED / name)
    rng = random.Random(1)
    for case in cases:
        pieces = streamed(tokenizer.stream(), case["ids"], rng)
        assert "".join(pieces) == case["decode"]
        assert "\ufffd" not in "".join(pieces)


# ---- against the SentencePiece library


@pytest.mark.parametrize("generation", [1, 2])
def test_piece_streams_equal_the_library(generation: int, v1_bytes: bytes, v2_bytes: bytes) -> None:
    data = v1_bytes if generation == 1 else v2_bytes
    vocabulary = Vocabulary(Path("any"), data)
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    rng = random.Random(generation)
    bytes_ = [i for i in range(library.get_piece_size()) if library.is_byte(i)]
    spaces = [library.piece_to_id("▁")] * 40
    spelt = [bytes_[b] for b in "世界👋é".encode()] * 4
    pool = [*range(library.get_piece_size()), *spaces, *spelt]
    for _ in range(3000):
        ids = [rng.choice(pool) for _ in range(rng.randint(0, 9))]
        assert "".join(streamed(PieceStream(vocabulary), ids, rng)) == library.decode(ids), ids


def test_the_two_kinds_of_vocabulary_treat_leading_spaces_differently(v1_bytes: bytes, v2_bytes: bytes) -> None:
    for data, text in ((v1_bytes, ""), (v2_bytes, " ")):
        vocabulary = Vocabulary(Path("any"), data)
        space = vocabulary.id_of("▁")
        assert space is not None
        stream = PieceStream(vocabulary)
        assert stream.feed([space, space]) + stream.flush() == text


# ---- stages: pieces equal the whole

SPACED_TEXT = st.text(alphabet=" '.,?!ntmsver\nx", max_size=24)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def through(stage: Any, text: str, cuts: list[int]) -> str:
    return "".join([stage.feed(piece) for piece in pieces_of(text, cuts)]) + stage.flush()


CUTS = st.lists(st.integers(0, 30), max_size=24)


@given(SPACED_TEXT, CUTS)
def test_cleaning_spaces_by_pieces(text: str, cuts: list[int]) -> None:
    whole = text
    for old in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        whole = whole.replace(old, old.strip())
    assert clean_up_spaces(text) == whole
    assert through(CleanUpSpaces(), text, cuts) == whole


@given(st.text(alphabet="好a,!:;? ，", max_size=16), CUTS)
def test_chinese_punctuation_by_pieces(text: str, cuts: list[int]) -> None:
    whole = text
    for half, full in zip(",!:;?", "，！：；？", strict=True):
        whole = re.sub(rf"([\u4e00-\u9fff])\{half}", rf"\1{full}", whole)
        whole = re.sub(rf"\{half}([\u4e00-\u9fff])", rf"{full}\1", whole)
    assert through(ChinesePunctuation(), text, cuts) == whole


@given(st.text(alphabet=" \n\ta好", max_size=12), CUTS)
def test_stripping_by_pieces(text: str, cuts: list[int]) -> None:
    assert through(Strip(), text, cuts) == text.strip()


@given(st.lists(st.sampled_from(["<", "n", ">", "<n>", "<|", "tab|>", "<|blank_", "1", "2|>", "0|>", "好"])), CUTS)
def test_restoring_white_space_by_pieces(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    markers = {"<n>": "\n", "<|tab|>": "\t"} | {f"<|blank_{n}|>": " " * n for n in range(2, 81)}
    whole = text
    for old, new in markers.items():
        whole = whole.replace(old, new)
    assert through(Replace(markers), text, cuts) == whole


def test_stages_hold_back_no_more_than_they_must() -> None:
    assert CleanUpSpaces().feed("hello.") == "hello."
    assert CleanUpSpaces().feed("hello ") == "hello"
    assert ChinesePunctuation().feed("好,") == "好，"
    assert ChinesePunctuation().feed("ok,") == "ok"
    assert Replace({"[[训练时间]]": "2023年"}).feed("在[[训") == "在"


# ---- v1 without reference outputs


def test_v1_round_trips_white_space_and_rare_characters(v1: ChatGLMTokenizer) -> None:
    for text in ("a\tb\n\nc", "x" + " " * 83 + "y", "for i in x:\n        print(i)", "龘👋🏽é", "\n", "  "):
        assert v1.decode(v1.encode(text)) == text


def test_v1_prompts_end_with_gmask_and_sop(v1: ChatGLMTokenizer) -> None:
    ids = v1.render([{"role": "user", "content": "你好"}])
    assert ids == [*v1.encode("你好"), v1.special_ids["gmask"], v1.special_ids["sop"]]


def test_v1_history_makes_rounds_from_zero(v1: ChatGLMTokenizer) -> None:
    ids = v1.render(chat("再见", [["你好", "世界"]]))
    assert v1.decode(ids) == "[Round 0]\n问:你好\n答:世界\n[Round 1]\n问:再见\n答:"


def test_v2_rounds_count_from_one(v2: ChatGLM2Tokenizer) -> None:
    ids = v2.render(chat("再见", [["你好", "世界"]]))
    assert ids[:2] == [v2.special_ids["gmask"], v2.special_ids["sop"]]
    assert v2.decode(ids) == "[Round 1]\n\n问：你好\n\n答：世界\n\n[Round 2]\n\n问：再见\n\n答："


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_a_system_message_goes_before_the_first_question(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    with_system = [{"role": "system", "content": "简短"}, *chat("再见", [["你好", "世界"]])]
    assert tokenizer.render(with_system) == tokenizer.render(chat("再见", [["简短\n你好", "世界"]]))


def test_v1_obeys_special_tokens_in_raw_text_but_not_in_conversations(v1: ChatGLMTokenizer) -> None:
    sop, eop, mask = (v1.special_ids[n] for n in ("sop", "eop", "mask"))
    typed = "a <sop> b<eop>[MASK]"
    assert {sop, eop, mask} <= set(v1.encode(typed))
    ids = v1.render([{"role": "user", "content": typed}])
    assert (ids.count(sop), ids.count(eop), ids.count(mask)) == (1, 0, 0)
    assert v1.decode(ids) == typed


@pytest.mark.parametrize("name", ["v2", "v3"])
def test_typed_role_tokens_stay_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    plain = tokenizer.render([{"role": "user", "content": "a b"}])
    typed = tokenizer.render([{"role": "user", "content": "a <|assistant|></s>[gMASK] b"}])
    special = set(tokenizer.special_ids.values())
    assert [i for i in typed if i in special] == [i for i in plain if i in special]


# ---- examples


def example(*turns: tuple[str, str]) -> Example:
    return Example(tuple(Message(role, content) for role, content in turns), where="file:1")


TWO_ROUNDS = example(("user", "你好"), ("assistant", "世界"), ("user", "天气"), ("assistant", "很好"))


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_the_prompt_of_training_is_the_prompt_of_serving(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    encoded = tokenizer.encode_example(TWO_ROUNDS)
    prompt = tokenizer.render(TWO_ROUNDS.prompt)
    assert list(encoded.ids[: len(prompt)]) == prompt
    learnt = [i for i, learn in zip(encoded.ids[len(prompt) :], encoded.learn[len(prompt) :], strict=True) if learn]
    assert learnt[-1] in tokenizer.stop_ids
    assert tokenizer.decode_answer(learnt) == "很好"
    assert encoded.where == "file:1"


TOOLS = ('{"name": "price", "parameters": {"type": "object"}}',)
WITH_TOOLS = (
    Message("system", "简短"),
    Message("user", "天气"),
    Message("assistant", "世界", (ToolCall("price", '{"area": 13}'), ToolCall("price", "{}"))),
    Message("tool", "13"),
    Message("tool", "14"),
    Message("assistant", "很好"),
    Message("user", "你好"),
    Message("assistant", "", (ToolCall("price", '{"area": "世界"}'),)),
)


@pytest.mark.parametrize("size", [3, 6, 8])
@pytest.mark.parametrize("tools", [(), TOOLS])
@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_so_it_is_with_tools(
    name: str, system: bool, tools: tuple[str, ...], size: int, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    row = Example(WITH_TOOLS[not system : size], tools=tools)
    encoded = tokenizer.encode_example(row)
    prompt = tokenizer.render(row.prompt, tools=tools)
    assert list(encoded.ids[: len(prompt)]) == prompt
    assert not encoded.learn[len(prompt) - 1]
    assert all(encoded.learn[len(prompt) :])
    assert encoded.ids[-1] in tokenizer.stop_ids
    assert tuple(tokenizer.render(row.messages, False, tools)) == encoded.ids


def test_v1_and_v2_have_tools_as_questions_and_answers(v1: ChatGLMTokenizer, v2: ChatGLM2Tokenizer) -> None:
    """Neither knows a role for tools: the list stands in the first question, results are the next one."""
    listed = '# 工具 / Tools\n{"name": "price", "parameters": {"type": "object"}}\n# 调用 / Call\n'
    form = '{"name": "...", "arguments": {...}}'
    call = '{"name": "price", "arguments": {"area": 13}}\n{"name": "price", "arguments": {}}'
    results = "# 结果 / Result (price)\n13\n# 结果 / Result (price)\n14"
    texts = [[f"简短\n\n{listed}{form}\n天气", f"世界\n{call}"]]
    for tokenizer in (v1, v2):
        assert tokenizer.render(WITH_TOOLS[:5], tools=TOOLS) == tokenizer.render(chat(results, texts))


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_an_earlier_answer_may_be_read_only(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    turns = [Message(m.role, m.content, learn=i != 1) for i, m in enumerate(TWO_ROUNDS.messages)]
    encoded, whole = tokenizer.encode_example(Example(tuple(turns))), tokenizer.encode_example(TWO_ROUNDS)
    start = len(tokenizer.render(turns[:3]))
    assert encoded.ids == whole.ids
    assert encoded.learn == (False,) * start + whole.learn[start:]


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_earlier_answers_are_part_of_the_prompt(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    encoded = tokenizer.encode_example(TWO_ROUNDS)
    assert not any(encoded.learn[: len(tokenizer.render(TWO_ROUNDS.prompt))])


def test_v3_learns_every_answer_and_how_it_ends(v3: ChatGLM3Tokenizer) -> None:
    encoded = v3.encode_example(TWO_ROUNDS)
    learnt = [i for i, learn in zip(encoded.ids, encoded.learn, strict=True) if learn]
    line_break = v3.encode("\n")
    first = [*line_break, *v3.encode("世界"), v3.special_ids["user"]]
    assert learnt == [*first, *line_break, *v3.encode("很好"), v3.special_ids["eos"]]


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_rendering_without_generation_prompt_is_what_an_example_holds(
    name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    closed = tokenizer.render(TWO_ROUNDS.messages, add_generation_prompt=False)
    assert tuple(closed) == tokenizer.encode_example(TWO_ROUNDS).ids
    open_ = tokenizer.render(TWO_ROUNDS.prompt, add_generation_prompt=False)
    assert len(open_) < len(tokenizer.render(TWO_ROUNDS.prompt))


# ---- v3 roles and tools


CALL = ToolCall("price", '{"area": 13, "near": ["北京", null, true], "a b": "x"}')


def test_v3_roles(v3: ChatGLM3Tokenizer) -> None:
    """A call is a message of its own: the tool's name in the line of the role, then Python, as published."""
    s, line_break = v3.special_ids, v3.encode("\n")
    ids = v3.render(
        [
            Message("system", "简短"),
            Message("user", "天气"),
            Message("assistant", "世界", (CALL,)),
            Message("tool", "13"),
        ]
    )
    code = '```python\ntool_call(area=13, near=["北京", None, True], **{"a b": "x"})\n```'
    assert ids == [
        *(s["gmask"], s["sop"]),
        *(s["system"], *line_break, *v3.encode("简短")),
        *(s["user"], *line_break, *v3.encode("天气")),
        *(s["assistant"], *line_break, *v3.encode("世界")),
        *(s["assistant"], *v3.encode("price\n"), *v3.encode(code)),
        *(s["observation"], *line_break, *v3.encode("13")),
        s["assistant"],
    ]


def test_v3_special_ids_follow_the_pieces_in_the_published_order(v3: ChatGLM3Tokenizer) -> None:
    """ChatGLM3-6B has 64,789 pieces; its prompts begin 64790, 64792, 64795 and end 64796."""
    pieces = v3.vocab_size - 9
    offsets = {name: v3.special_ids[name] - pieces for name in ("gmask", "sop", "user", "assistant", "observation")}
    assert offsets == {"gmask": 1, "sop": 3, "user": 6, "assistant": 7, "observation": 8}
    ids = v3.render([{"role": "user", "content": "你好"}])
    assert [i - pieces for i in (*ids[:3], ids[-1])] == [1, 3, 6, 7]


def test_v3_tools_are_listed_in_the_system_message(v3: ChatGLM3Tokenizer) -> None:
    tool = {"name": "天气", "parameters": {}}
    published = "Answer the following questions as best as you can. You have access to the following tools:"
    for system, head in (([Message("system", "简短")], "简短"), ([], published)):
        ids = v3.render([*system, Message("user", "?")], tools=[tool])
        listed = v3.encode(f"{head}\n" + json.dumps([tool], indent=4, ensure_ascii=False))
        assert ids[2] == v3.special_ids["system"]
        assert ids[3 + len(v3.encode("\n")) :][: len(listed)] == listed


def test_v3_a_call_ends_where_the_result_begins(v3: ChatGLM3Tokenizer) -> None:
    """Both when the result follows and when the call is the last answer."""
    turns = (Message("user", "天气"), Message("assistant", "世界", (CALL,)))
    for messages in (turns, (*turns, Message("tool", "13"), Message("assistant", "很好"))):
        encoded = v3.encode_example(Example(messages))
        ids = [i for i, learn in zip(encoded.ids, encoded.learn, strict=True) if learn]
        end = ids.index(v3.special_ids["observation"])
        assert parse_tool_calls(v3.decode_answer(ids[:end])) == ("世界", (CALL,))
        assert not v3.stop_ids.intersection(ids[:end])


def test_v3_stops_at_the_end_at_a_user_and_at_an_observation(v3: ChatGLM3Tokenizer) -> None:
    assert v3.stop_ids == {v3.special_ids["eos"], v3.special_ids["user"], v3.special_ids["observation"]}


@pytest.mark.parametrize(
    "message",
    [{"role": "user", "content": "a", "tools": []}, {"role": "assistant", "content": "a", "metadata": "x"}],
)
def test_v3_refuses_extras_that_do_not_belong(v3: ChatGLM3Tokenizer, message: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"messages\[0\]") as refused:
        v3.render([message])
    assert refused.value.param == "messages"


# ---- refusals


@pytest.mark.parametrize("name", ["v1", "v2"])
@pytest.mark.parametrize(
    "turns",
    [
        [("user", "a"), ("user", "b")],
        [("assistant", "a")],
        [("system", "a")],
        [("user", "a"), ("tool", "b")],
        [("user", "a"), ("assistant", "b")],
    ],
)
def test_conversations_that_cannot_be_rendered(
    name: str, turns: list[tuple[str, str]], request: pytest.FixtureRequest
) -> None:
    with pytest.raises(RequestError) as refused:
        request.getfixturevalue(name).render([Message(*turn) for turn in turns])
    assert refused.value.param == "messages"


def test_tokenizers_of_another_generation_are_refused(tmp_path: Path, v1_bytes: bytes, v2_bytes: bytes) -> None:
    v1_config = {"model_type": "chatglm", "inner_hidden_size": 8, "position_encoding_2d": True}
    cases: list[tuple[str, bytes, dict[str, Any], str]] = [
        ("ice_text.model", v1_bytes, {"multi_query_group_num": 2, "model_type": "chatglm"}, "another generation"),
        ("tokenizer.model", v2_bytes, v1_config, "another generation"),
        ("ice_text.model", v2_bytes, v1_config, r"has no .*\[MASK\]"),
        ("tokenizer.model", v1_bytes, {"model_type": "chatglm"}, "renamed"),
        ("ice_text.model", v1_bytes, v1_config | {"bos_token_id": 9}, "bos_token_id in config.json is 9"),
        ("ice_text.model", v1_bytes, v1_config | {"vocab_size": 130528}, "network of 130528"),
        ("tokenizer.model", v2_bytes, {"model_type": "chatglm", "padded_vocab_size": 64}, "network of 64"),
        ("ice_text.model", v1_bytes[:5000], v1_config, "truncated"),
        ("ice_text.model", b"version https://git-lfs.github.com/spec/v1", v1_config, "git lfs pull"),
    ]
    for i, (file, data, config, message) in enumerate(cases):
        directory = tmp_path / str(i)
        directory.mkdir()
        (directory / file).write_bytes(data)
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=message) as refused:
            load_tokenizer(directory)
        assert "\n" not in str(refused.value)


def test_v3_is_told_from_v2_by_what_the_files_say(tmp_path: Path, v2_bytes: bytes) -> None:
    def family(name: str, tokenizer_config: dict[str, Any], **config: Any) -> str:
        directory = v2_directory(tmp_path / name, v2_bytes, **config)
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        return load_tokenizer(directory).family

    assert family("chatglm3-6b", {}, seq_length=32768) == "chatglm2"  # the directory's name says nothing
    assert family("a", {}, seq_length=8192) == "chatglm3"
    assert family("b", {"chat_template": "<|{{ role }}|>"}, seq_length=32768) == "chatglm3"
    assert family("c", {"chat_format": "chatglm3"}, seq_length=32768) == "chatglm3"
    assert family("d", {"chat_format": "chatglm2"}, seq_length=8192) == "chatglm2"
    with pytest.raises(ModelError, match="chat_format"):
        family("e", {"chat_format": "chatglm4"})


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_saved_tokenizers_are_equal(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.family == tokenizer.family
    assert again.template_digest == tokenizer.template_digest
    assert again.render(chat("再见", [["你好", "世界"]])) == tokenizer.render(chat("再见", [["你好", "世界"]]))
    shutil.rmtree(tmp_path / "saved")


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_ids_beyond_the_vocabulary_give_no_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.decode([10**6, *tokenizer.encode("你好"), 10**6, -5]) == tokenizer.decode(tokenizer.encode("你好"))
    assert tokenizer.decode([10**6, -5]) == ""


@given(text=st.text(alphabet="你好世界👋é <n>|tab'.,!?nvs\n\t", max_size=30), seed=st.integers(0, 9))
def test_answers_stream_as_they_decode(v1: ChatGLMTokenizer, text: str, seed: int) -> None:
    ids = v1.encode(text)
    rng = random.Random(seed)
    assert "".join(streamed(v1.stream(), ids, rng)) == v1.decode(ids)
    pieces = streamed(v1.stream_answer(), ids, rng)
    assert "".join(pieces) == v1.decode_answer(ids)
    assert not any("\ufffd" in piece for piece in pieces)
