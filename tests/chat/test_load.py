"""Where a tokenizer is found, what is read from which file, and what is said when it is not there."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers

from pingjia.chat import load_tokenizer
from pingjia.chat.hf import HFTokenizer
from pingjia.errors import ModelError, StorageError
from pingjia.types import Example, Message

CHAT = [Message("user", "hi")]
Writer = Callable[..., Path]


def _text(tokenizer: Any, messages: list[Message] | None = None) -> str:
    return tokenizer._vocabulary.decode(tokenizer.render(messages or CHAT), skip_special_tokens=False)


# ---- weight of the imports


def test_neither_torch_nor_transformers_is_imported(smollm2_path: Path) -> None:
    code = (
        "import sys, pingjia.chat, pingjia.data\n"
        "pingjia.chat.load_tokenizer('smollm2').render([{'role': 'user', 'content': 'hi'}])\n"
        "heavy = {'torch', 'transformers', 'gguf', 'numpy', 'sentencepiece'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "pingjia.data.check_files([])\n"
        "heavy -= {'numpy'}  # remembers rows in it\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_face_is_light() -> None:
    code = (
        "import sys, pingjia.chat, pingjia.data, pingjia.data.settings\n"
        "assert not {'tokenizers', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_are_not_there() -> None:
    import pingjia.chat
    import pingjia.data

    for room in (pingjia.chat, pingjia.data):
        with pytest.raises(AttributeError, match="nothing"):
            room.nothing  # noqa: B018


# ---- what a directory says


def test_stop_ids_come_from_all_files(tmp_path: Path, train_bpe: Any, model_writer: Writer) -> None:
    vocabulary = train_bpe(["<a>", "<b>", "<c>", "<d>", "<e>"])
    a, b, c, d, _ = (vocabulary.token_to_id(t) for t in ("<a>", "<b>", "<c>", "<d>", "<e>"))
    path = model_writer(
        tmp_path,
        vocabulary,
        {"eos_token": {"content": "<a>"}, "stop_tokens": ["<b>"]},
        generation_config={"eos_token_id": [c, a]},
        config={"eos_token_id": d},
    )
    assert load_tokenizer(path).stop_ids == {a, b, c, d}


def test_stop_ids_that_are_not_in_the_vocabulary_are_left_out(
    tmp_path: Path, byte_level: tokenizers.Tokenizer, model_writer: Writer
) -> None:
    path = model_writer(tmp_path, byte_level, {"eos_token": "<none>"}, config={"eos_token_id": 10**6})
    tokenizer = load_tokenizer(path)
    assert tokenizer.stop_ids == frozenset()
    assert tokenizer.pad_id == 0


def test_an_eos_not_marked_special_becomes_special(make_model: Any, train_bpe: Any) -> None:
    vocabulary = train_bpe([])
    vocabulary.add_tokens([tokenizers.AddedToken("<eos>", special=False, normalized=False)])
    eos = vocabulary.token_to_id("<eos>")
    template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    tokenizer = make_model(vocabulary, template, eos_token="<eos>")
    assert tokenizer.render([Message("user", "<eos>")], False).count(eos) == 1
    assert tokenizer.vocab_size == vocabulary.get_vocab_size()


@pytest.mark.parametrize("how", ["string", "list", "file"])
def test_template_sources(tmp_path: Path, byte_level: tokenizers.Tokenizer, model_writer: Writer, how: str) -> None:
    sources: dict[str, Any] = {
        "string": "OWN",
        "list": [{"name": "tool_use", "template": "TOOL"}, {"name": "default", "template": "OWN"}],
        "file": "FROM CONFIG",
    }
    path = model_writer(tmp_path, byte_level, {"chat_template": sources[how]})
    if how == "file":
        (path / "chat_template.jinja").write_text("OWN", encoding="utf-8")
    assert _text(load_tokenizer(path)) == "OWN"
    assert _text(load_tokenizer(path, template="MINE {{ messages[0].content }}")) == "MINE hi"


def test_named_templates_without_a_default(
    tmp_path: Path, byte_level: tokenizers.Tokenizer, model_writer: Writer
) -> None:
    path = model_writer(tmp_path, byte_level, {"chat_template": [{"name": "rag", "template": "x"}]})
    with pytest.raises(ModelError, match="rag"):
        load_tokenizer(path)


def test_plain_form_only_when_asked(tmp_path: Path, byte_level: tokenizers.Tokenizer, model_writer: Writer) -> None:
    path = model_writer(tmp_path, byte_level, {"eos_token": "<|endoftext|>"})
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(path).render(CHAT)
    tokenizer = load_tokenizer(path, template="plain")
    turns = [Message("system", "S"), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert _text(tokenizer, turns) == "S\n问：a\n答：b<|endoftext|>\n问：c\n答："
    encoded = tokenizer.encode_example(Example(tuple(turns[:3])))
    assert encoded.num_learnt == len(tokenizer.encode("b")) + 1


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path, train_bpe: Any, model_writer: Writer) -> None:
    vocabulary = train_bpe(["<pad>"])
    vocabulary.enable_truncation(4)
    vocabulary.enable_padding(length=8, pad_token="<pad>")
    tokenizer = load_tokenizer(model_writer(tmp_path, vocabulary))
    assert len(tokenizer.encode("xyzxyzxyz")) > 4
    assert len(tokenizer.encode("x")) == 1


def test_older_formats_are_converted(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    """vocab.json and merges.txt, as GPT-2 and the first Qwen2 files have them."""
    model = json.loads(byte_level.to_str())["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"])
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    vocab = {**model["vocab"], "<|endoftext|>": byte_level.token_to_id("<|endoftext|>")}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    for text in ("Hello, 世界 123", "def f():\n    pass"):
        assert tokenizer.encode(text) == byte_level.encode(text, add_special_tokens=False).ids
    assert tokenizer.stop_ids == {byte_level.token_to_id("<|endoftext|>")}


# ---- ChatGLM is another room's key


@pytest.mark.parametrize(
    "files",
    [
        {"ice_text.model": "x"},
        {"tokenizer.model": "x", "config.json": '{"model_type": "chatglm"}'},
        {"tokenizer.model": "x", "tokenizer_config.json": '{"tokenizer_class": "ChatGLMTokenizer"}'},
    ],
)
def test_chatglm_directories_go_to_chatglm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    fake = SimpleNamespace(load=lambda directory: ("chatglm", directory))
    monkeypatch.setitem(sys.modules, "pingjia.chat.chatglm", fake)
    monkeypatch.setattr(sys.modules["pingjia.chat"], "chatglm", fake, raising=False)
    assert load_tokenizer(tmp_path) == ("chatglm", tmp_path)  # type: ignore[comparison-overlap]
    with pytest.raises(ModelError, match="one fixed form"):
        load_tokenizer(tmp_path, template="plain")


def test_glm4_with_its_own_code_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("x")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLM4Tokenizer"}')
    with pytest.raises(ModelError, match="-hf"):
        load_tokenizer(tmp_path)


# ---- what is not there, or broken: one line each


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no tokenizer here"),
        ({"config.json": "{}"}, "no tokenizer here"),
        ({"tokenizer.json": "not json"}, "not a readable tokenizer.json"),
        ({"tokenizer.json": "{}"}, "not a readable tokenizer.json"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "cannot be read as JSON"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "expected a JSON object, found a list"),
        ({"tokenizer.model": "junk"}, "cannot convert|no tokenizer.json form"),
        ({"vocab.json": "{}"}, "cannot convert|no tokenizer.json form"),
    ],
)
def test_broken_directories_are_one_line(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=reason) as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": 5},
        {"chat_template": [1]},
        {"chat_template": [{"name": "default", "template": 1}]},
        {"stop_tokens": "x"},
        {"stop_tokens": [1]},
    ],
)
def test_configuration_of_wrong_types_is_one_line(
    tmp_path: Path, byte_level: tokenizers.Tokenizer, model_writer: Writer, config: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=r"tokenizer_config\.json") as e:
        load_tokenizer(model_writer(tmp_path, byte_level, config))
    assert "\n" not in str(e.value)


# ---- saving


@pytest.fixture
def saved(smollm2: HFTokenizer, tmp_path: Path) -> Path:
    smollm2.save(tmp_path / "saved")
    return tmp_path / "saved"


MESSAGES = [Message("user", "你好 123  4 <|im_end|>"), Message("assistant", "您好！😀"), Message("user", "code:\n\tx")]


def test_saved_files_load_again(smollm2: HFTokenizer, saved: Path) -> None:
    again = load_tokenizer(saved)
    assert again.render(MESSAGES) == smollm2.render(MESSAGES)
    assert (again.stop_ids, again.pad_id, again.vocab_size) == (smollm2.stop_ids, smollm2.pad_id, smollm2.vocab_size)
    assert again.template_digest == smollm2.template_digest
    assert again.render_text("a  1") == smollm2.render_text("a  1")


def test_saved_files_load_in_transformers(smollm2: HFTokenizer, saved: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(saved)
    rows = [{"role": m.role, "content": m.content.replace("<|im_end|>", "")} for m in MESSAGES]
    assert theirs.apply_chat_template(rows, add_generation_prompt=True, return_dict=False) == smollm2.render(rows)
    for text in ("a  1, b ½", "中文 2024", "x\r\n\ty"):
        assert theirs.encode(text, add_special_tokens=False) == smollm2.encode(text)
        assert theirs.decode(smollm2.encode(text)) == smollm2.decode(smollm2.encode(text))
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (2, 2, 1)


def test_a_template_given_at_loading_is_saved(
    tmp_path: Path, byte_level: tokenizers.Tokenizer, model_writer: Writer
) -> None:
    path = model_writer(tmp_path / "base", byte_level, {"eos_token": "<|endoftext|>"})
    tokenizer = load_tokenizer(path, template="plain")
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.render(CHAT) == tokenizer.render(CHAT)
    assert again.stop_ids == tokenizer.stop_ids
    assert again.template_digest == tokenizer.template_digest


def test_saving_where_a_file_stands_is_a_storage_error(smollm2: HFTokenizer, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(StorageError, match="could not be written"):
        smollm2.save(tmp_path / "taken" / "deep")
    assert (tmp_path / "taken").read_text() == "x"
