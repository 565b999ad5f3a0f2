"""The tokenizers of ChatGLM-6B (v1), ChatGLM2-6B (v2) and ChatGLM3-6B (v3), without their remote code.

Ids and decoding equal the published tokenizers' (tests/chat/test_chatglm_tokenizer.py). What differs on purpose:
special-token strings that a user typed into a *conversation* stay plain text, in v1 too, whose own tokenizer would
obey them; in raw text (`encode`, `render_text`) v1 does obey `<sop> <eop> <unk> <pad> [MASK]`, as published.

`decode` and `stream` give the plain text of tokens. `decode_answer` and `stream_answer` go on to what the published
chat() shows: stripped, `[[训练时间]]` filled in and, in v1, full-width punctuation beside Chinese.

Which generation a directory holds is told from its files and keys, never from its name:
- v1 has `ice_text.model`; v2 and v3 have `tokenizer.model`, the same file in both.
- v3 is what says so: `chat_format` in tokenizer_config.json (this package writes it), or role tokens such as <|user|>
  there (published later), or else `seq_length` 8192 in config.json (v2 was published with 32768). So an early copy of
  chatglm3-6b-32k, which has none of these, is taken for v2: put `"chat_format": "chatglm3"` into that file.

Tools: v3 has a form of its own, as published. v1 and v2 know neither a system message nor tools; the plain form
(`tools.py`) then is part of the first question, a call is an answer, and its result the next question.

Not here: the SentencePiece file itself (`sentencepieces.py`), post-processing of text (`text_stages.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pingjia.chat.calls import python_call
from pingjia.chat.sentencepieces import SPACE, PieceStream, Vocabulary
from pingjia.chat.text_stages import ChinesePunctuation, CleanUpSpaces, Replace, StagedStream, Strip, TextStage
from pingjia.chat.tokenizer import (
    StreamDecoder,
    Tokenizer,
    as_messages,
    check_example,
    check_text,
    learn_answers,
)
from pingjia.chat.tools import as_tools, linked, plain, uses_tools
from pingjia.errors import ModelError, RequestError, StorageError
from pingjia.types import Encoded, Example, Message

_V1_FILE, _V2_FILE = "ice_text.model", "tokenizer.model"
_V1_KEYS = ("inner_hidden_size", "position_encoding_2d", "max_sequence_length")
_V2_KEYS = ("multi_query_group_num", "padded_vocab_size", "ffn_hidden_size")
_V3_SEQ_LENGTH = 8192
_V3_TOOLS = "Answer the following questions as best as you can. You have access to the following tools:"  # as published
_TRAINING_TIME = {"[[训练时间]]": "2023年"}


def load(directory: Path) -> Tokenizer:
    """The tokenizer of a ChatGLM directory, of whichever generation it is.

    Raises ModelError when there is none, when it is another generation's than the network's, or when its special
    tokens are not those of config.json.
    """
    config = _read_json(directory / "config.json")
    tokenizer_config = _read_json(directory / "tokenizer_config.json")
    if (directory / _V1_FILE).is_file():
        _refuse_other(directory, _V1_FILE, "ChatGLM-6B", config, _V2_KEYS)
        return ChatGLMTokenizer(Vocabulary.read(directory / _V1_FILE), config)
    if not (directory / _V2_FILE).is_file():
        raise ModelError(f"{directory}: no ChatGLM tokenizer here: neither {_V1_FILE} (v1) nor {_V2_FILE} (v2, v3)")
    _refuse_other(directory, _V2_FILE, "ChatGLM2 or 3", config, _V1_KEYS)
    kind = ChatGLM3Tokenizer if _is_v3(directory, config, tokenizer_config) else ChatGLM2Tokenizer
    return kind(Vocabulary.read(directory / _V2_FILE), config)


def _is_v3(directory: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> bool:
    declared = tokenizer_config.get("chat_format")
    if declared is not None:
        if declared not in ("chatglm2", "chatglm3"):
            raise ModelError(
                f"{directory}: chat_format {declared!r} in tokenizer_config.json; not chatglm2 or chatglm3"
            )
        return bool(declared == "chatglm3")
    return "<|" in json.dumps(tokenizer_config) or config.get("seq_length") == _V3_SEQ_LENGTH


def _refuse_other(directory: Path, file: str, owner: str, config: Mapping[str, Any], keys: Sequence[str]) -> None:
    found = [key for key in keys if key in config]
    if found:
        raise ModelError(
            f"{directory}: {file} is the tokenizer of {owner}, but config.json describes another generation "
            f"({', '.join(found)}); copy the tokenizer that belongs to the network"
        )


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is not there."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise ModelError(f"{file}: cannot be read: {e}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: must hold one JSON object, not a {type(value).__name__}")
    return value


# ---- conversations as questions and answers


def _rounds(messages: Sequence[Message]) -> tuple[list[tuple[str, str]], str | None]:
    """(finished rounds, the open question or None). A system message goes in front of the first question.

    Raises RequestError for turns that do not alternate.
    """
    system = messages[0].content + "\n" if messages[0].role == "system" else ""
    turns = list(messages[1:] if system else messages)
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise _bad(f"messages[{i + bool(system)}].role is {turn.role!r} where this model needs {expected!r}")
    if not turns:
        raise _bad("messages holds only a system message; give at least one user message")
    turns[0] = Message("user", system + turns[0].content)
    finished = [(q.content, a.content) for q, a in zip(turns[0::2], turns[1::2], strict=False)]
    return finished, turns[-1].content if len(turns) % 2 else None


def _texts(
    messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[str | Mapping[str, Any]] = ()
) -> tuple[Message, ...]:
    """A conversation checked, with tools in the plain form."""
    turns, listed = as_messages(messages), as_tools(tools)
    if not listed and not uses_tools(turns):
        return turns
    return plain(linked(turns), listed, has_results=False)


def _open_question(messages: Sequence[Message]) -> tuple[list[tuple[str, str]], str]:
    finished, question = _rounds(messages)
    if question is None:
        raise _bad("the last message is an answer; end with a user message to be answered")
    return finished, question


def _bad(message: str) -> RequestError:
    return RequestError(message, param="messages")


# ---- what the three share


_SPECIAL_TEXTS = {"mask": "[MASK]", "gmask": "[gMASK]", "smask": "[sMASK]", "eos": "</s>"} | {
    role: f"<|{role}|>" for role in ("system", "user", "assistant", "observation")
}


class _SentencePieceTokenizer:
    """See `tokenizer.Tokenizer`, which the classes below satisfy."""

    family: str
    file_name: str
    pad_id: int
    vocab_size: int
    stop_ids: frozenset[int]

    def __init__(self, vocabulary: Vocabulary, special_ids: Mapping[str, int]) -> None:
        self._vocabulary = vocabulary
        self.special_ids = dict(special_ids)
        self._opening = [self.special_ids["gmask"], self.special_ids["sop"]]
        digest = hashlib.sha256(f"{self.family} {sorted(self.special_ids.items())} ".encode())
        digest.update(vocabulary.serialized)
        self.template_digest = digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of raw text, nothing added."""
        check_text(text, "text", "prompt")
        return self._vocabulary.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Plain text of ids, as the published tokenizer's decode."""
        return _whole(self.stream(), ids)

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Text of an answer, as the published chat() shows it."""
        return _whole(self.stream_answer(), ids)

    def stream(self) -> StreamDecoder:
        """Pieces of `decode`."""
        return StagedStream(PieceStream(self._vocabulary, self._silent_ids()), self._stages())

    def stream_answer(self) -> StreamDecoder:
        """Pieces of `decode_answer`."""
        return StagedStream(self.stream(), self._answer_stages())

    def special_text(self, token: int) -> str | None:
        name = next((name for name, special in self.special_ids.items() if special == token), None)
        return None if name is None else _SPECIAL_TEXTS.get(name, f"<{name}>")

    def token_bytes(self, token: int) -> bytes | None:
        is_text = 0 <= token < len(self._vocabulary) and token not in self._wordless
        piece = self._vocabulary.pieces[token] if is_text else None
        if piece is None or isinstance(piece, bytes):
            return piece or b""
        return self._restored.get(piece, piece.replace(SPACE, " ")).encode()

    @cached_property
    def _wordless(self) -> frozenset[int]:
        unknown = self._vocabulary.id_of("<unk>")
        return self._silent_ids().union(self.special_ids.values(), () if unknown is None else (unknown,))

    _restored: ClassVar[Mapping[str, str]] = {}

    def _silent_ids(self) -> frozenset[int]:
        return frozenset()

    def _stages(self) -> list[TextStage]:
        return []

    def _answer_stages(self) -> list[TextStage]:
        return [Strip(), Replace(_TRAINING_TIME)]

    def save(self, directory: Path) -> None:
        """Write the SentencePiece file and a tokenizer_config.json that names the family."""
        config = {"tokenizer_class": "ChatGLMTokenizer", "chat_format": self.family, "padding_side": "left"}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / self.file_name).write_bytes(self._vocabulary.serialized)
            text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
            (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
        except OSError as e:
            raise StorageError(f"{directory}: the tokenizer could not be written: {e.strerror or e}") from None


def _whole(stream: StreamDecoder, ids: Sequence[int]) -> str:
    return stream.feed(ids) + stream.flush()


def _check_size(vocabulary: Vocabulary, num_special: int, config: Mapping[str, Any], key: str) -> None:
    """The network must have a row for every id, and the file must fill at least half of its rows."""
    rows, ids = config.get(key), len(vocabulary) + num_special
    if isinstance(rows, int) and not ids <= rows <= 2 * ids:
        raise ModelError(
            f"{vocabulary.file}: {ids} tokens do not belong to a network of {rows} ({key} in config.json); copy the "
            "tokenizer that belongs to the network"
        )


# ---- v1


_BLANKS = range(2, 81)
_RESTORED = {"<n>": "\n", "<|tab|>": "\t"} | {f"<|blank_{n}|>": " " * n for n in _BLANKS}
_RUN_OF_SPACES = re.compile(" {2,}")


class ChatGLMTokenizer(_SentencePieceTokenizer):
    """ChatGLM-6B. A prompt is text, then [gMASK] and <sop>; an answer ends with <eop>.

    Only the last answer of an example is learnt: earlier ones lie in the prompt, which attends both ways. `<sop>` is
    not learnt: it ends every prompt and is never generated (the published training script counts it as a target).
    """

    family = "chatglm"
    file_name = _V1_FILE
    _PIECES: ClassVar[dict[str, str]] = {
        "pad": "<pad>", "mask": "[MASK]", "gmask": "[gMASK]", "sop": "<sop>", "eop": "<eop>", "unk": "<unk>",
    }  # fmt: skip
    _CONFIG_KEYS: ClassVar[dict[str, str]] = {
        "pad": "pad_token_id",
        "mask": "mask_token_id",
        "gmask": "gmask_token_id",
        "sop": "bos_token_id",
        "eop": "eos_token_id",
    }

    def __init__(self, vocabulary: Vocabulary, config: Mapping[str, Any]) -> None:
        found = {name: vocabulary.id_of(piece) for name, piece in self._PIECES.items()}
        absent = [self._PIECES[name] for name, token in found.items() if token is None]
        if absent:
            raise ModelError(f"{vocabulary.file}: not the tokenizer of ChatGLM-6B: it has no {', '.join(absent)}")
        special_ids = {name: token for name, token in found.items() if token is not None}
        self._check_config(vocabulary.file, special_ids, config)
        _check_size(vocabulary, 0, config, "vocab_size")
        super().__init__(vocabulary, special_ids)
        self.pad_id = self.special_ids["pad"]
        self.stop_ids = frozenset({self.special_ids["eop"]})
        self.vocab_size = len(vocabulary)
        obeyed = {self._PIECES[n]: self.special_ids[n] for n in ("sop", "eop", "unk", "pad", "mask")}
        self._obeyed = obeyed
        self._obeyed_pattern = re.compile("|".join(map(re.escape, obeyed)))

    def _check_config(self, file: Path, special_ids: Mapping[str, int], config: Mapping[str, Any]) -> None:
        for name, key in self._CONFIG_KEYS.items():
            if key in config and config[key] != special_ids[name]:
                raise ModelError(
                    f"{file}: {self._PIECES[name]} is {special_ids[name]}, but {key} in config.json is {config[key]}; "
                    "tokenizer and network do not belong together"
                )

    # text

    def encode(self, text: str) -> list[int]:
        """Ids of raw text, nothing added. White space around a special token in it is dropped, as published."""
        check_text(text, "text", "prompt")
        ids, end, after_special = list[int](), 0, False
        for special in self._obeyed_pattern.finditer(text):
            part = text[end : special.start()].rstrip()
            ids += self._encode_plain(part.lstrip() if after_special else part)
            ids.append(self._obeyed[special.group()])
            end, after_special = special.end(), True
        rest = text[end:]
        return ids + self._encode_plain(rest.lstrip() if after_special else rest)

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of text in which special-token strings are only text."""
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        return self._vocabulary.encode(_RUN_OF_SPACES.sub(lambda m: _blanks(len(m.group())), text))

    def stream(self) -> StreamDecoder:
        return _Without(self.pad_id, super().stream())

    _restored = _RESTORED

    def _stages(self) -> list[TextStage]:
        return [Replace(_RESTORED), CleanUpSpaces()]

    def _answer_stages(self) -> list[TextStage]:
        return [*super()._answer_stages(), ChinesePunctuation()]

    # conversations

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[str | Mapping[str, Any]] = (),
    ) -> list[int]:
        """Ids of a conversation; see `Tokenizer.render`. A system message is put before the first question.

        Without generation prompt: the answered conversation with its end, or the question without [gMASK] <sop>.
        """
        turns = _texts(messages, tools)
        if not add_generation_prompt and turns[-1].role == "assistant":
            return [*self.render(turns[:-1]), *self._encode_plain(turns[-1].content), self.special_ids["eop"]]
        ids = self._encode_plain(_v1_prompt(*_open_question(turns)))
        return [*ids, *self._opening] if add_generation_prompt else ids

    def render_text(self, text: str) -> list[int]:
        return [*self.encode(text), *self._opening]

    def encode_example(self, example: Example) -> Encoded:
        *prompt, last = _texts(check_example(example), example.tools)
        answer = [*self._encode_plain(last.content), self.special_ids["eop"]]
        return learn_answers(self.render(prompt), [answer], self.stop_ids, example.where)


def _v1_prompt(finished: Sequence[tuple[str, str]], question: str) -> str:
    if not finished:
        return question
    past = "".join(f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(finished))
    return f"{past}[Round {len(finished)}]\n问：{question}\n答："


def _blanks(num_spaces: int) -> str:
    full, rest = divmod(num_spaces, _BLANKS[-1])
    last = f"<|blank_{rest}|>" if rest in _BLANKS else " " * rest
    return f"<|blank_{_BLANKS[-1]}|>" * full + last


class _Without:
    """StreamDecoder to which one id (padding) is as if it were not there."""

    def __init__(self, absent: int, stream: StreamDecoder) -> None:
        self._absent = absent
        self._stream = stream

    def feed(self, ids: Sequence[int]) -> str:
        return self._stream.feed([i for i in ids if i != self._absent])

    def flush(self) -> str:
        return self._stream.flush()


# ---- v2


class ChatGLM2Tokenizer(_SentencePieceTokenizer):
    """ChatGLM2-6B. [gMASK] and <sop> stand before the text; every prompt, the first too, is a round; answers end with
    </s>. Only the last answer of an example is learnt, as in the published training script.
    """

    family = "chatglm2"
    file_name = _V2_FILE
    _SPECIALS: ClassVar[tuple[str, ...]] = ("mask", "gmask", "smask", "sop", "eop")

    def __init__(self, vocabulary: Vocabulary, config: Mapping[str, Any]) -> None:
        first = len(vocabulary)
        end = vocabulary.id_of("</s>")
        if end is None or vocabulary.id_of("<sop>") is not None:
            raise ModelError(f"{vocabulary.file}: not the tokenizer of ChatGLM2 or 3 (that of ChatGLM-6B, renamed?)")
        _check_size(vocabulary, len(self._SPECIALS), config, "padded_vocab_size")
        super().__init__(vocabulary, {name: first + i for i, name in enumerate(self._SPECIALS)} | {"eos": end})
        self.pad_id = 0
        self.vocab_size = first + len(self._SPECIALS)
        self.stop_ids = frozenset({end})

    def _silent_ids(self) -> frozenset[int]:
        return frozenset({self.pad_id})  # <unk> pads

    def _stages(self) -> list[TextStage]:
        return [CleanUpSpaces()]

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[str | Mapping[str, Any]] = (),
    ) -> list[int]:
        """Ids of a conversation; see `Tokenizer.render`. A system message is put before the first question.

        Without generation prompt: the answered conversation with its end, or the question without 答：.
        """
        turns = _texts(messages, tools)
        if not add_generation_prompt and turns[-1].role == "assistant":
            return [*self.render(turns[:-1]), *self.encode(turns[-1].content), self.special_ids["eos"]]
        text = _v2_prompt(*_open_question(turns))
        return self.render_text(text if add_generation_prompt else text.removesuffix("\n\n答："))

    def render_text(self, text: str) -> list[int]:
        return [*self._opening, *self.encode(text)]

    def encode_example(self, example: Example) -> Encoded:
        *prompt, last = _texts(check_example(example), example.tools)
        answer = [*self.encode(last.content), self.special_ids["eos"]]
        return learn_answers(self.render(prompt), [answer], self.stop_ids, example.where)


def _v2_prompt(finished: Sequence[tuple[str, str]], question: str) -> str:
    past = "".join(f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(finished, 1))
    return f"{past}[Round {len(finished) + 1}]\n\n问：{question}\n\n答："


# ---- v3


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """ChatGLM3-6B. `<|role|>`, metadata, a line break, content; every answer of an example is learnt.

    Tools are listed in the system message. A call is a message of its own with the tool's name as metadata; text before
    it is another one. The role "tool" is `<|observation|>`, which also ends a call.
    """

    family = "chatglm3"
    _SPECIALS = (*ChatGLM2Tokenizer._SPECIALS, "system", "user", "assistant", "observation")

    def __init__(self, vocabulary: Vocabulary, config: Mapping[str, Any]) -> None:
        super().__init__(vocabulary, config)
        self.stop_ids |= {self.special_ids["user"], self.special_ids["observation"]}

    def _stages(self) -> list[TextStage]:
        return []

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[str | Mapping[str, Any]] = (),
    ) -> list[int]:
        """Ids of a conversation; see `Tokenizer.render`.

        Without generation prompt an answer at the end is closed with </s>, a call with <|observation|>.
        """
        turns = _v3_turns(as_messages(messages), as_tools(tools))
        ids = [*self._opening, *(i for turn in turns for i in self._turn(turn))]
        if add_generation_prompt:
            return [*ids, self.special_ids["assistant"]]
        return [*ids, self._end_of(turns[-1])] if turns[-1].role == "assistant" else ids

    def _turn(self, turn: _Turn) -> list[int]:
        role = self.special_ids[turn.role]
        parts = ((role, *self.encode(f"{metadata}\n"), *self.encode(content)) for metadata, content in turn.parts)
        return [i for part in parts for i in part]

    def _end_of(self, answer: _Turn) -> int:
        metadata, _ = answer.parts[-1]
        return self.special_ids["observation" if metadata else "eos"]

    def encode_example(self, example: Example) -> Encoded:
        messages = check_example(example)
        turns = _v3_turns(messages, as_tools(example.tools))
        first = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
        prompt = [*self._opening, *(i for turn in turns[:first] for i in self._turn(turn))]
        answers: list[list[int]] = []
        for turn in turns[first:]:
            if turn.role == "assistant":
                answers.append([])
            answers[-1] += self._turn(turn)
        wanted = [m.learn for m in messages if m.role == "assistant"]
        shifted = self._shifted(answers, self._end_of(turns[-1]))
        return learn_answers([*prompt, self.special_ids["assistant"]], shifted, self.stop_ids, example.where, wanted)

    def _shifted(self, answers: Sequence[list[int]], last_end: int) -> list[list[int]]:
        """Move each answer's role token to the end of the one before it: it is part of the prompt it belongs to."""
        ends = [self.special_ids["assistant"]] * (len(answers) - 1) + [last_end]
        return [[*answer[1:], end] for answer, end in zip(answers, ends, strict=True)]


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn as v3 writes it: messages (metadata, content) of one role."""

    role: str
    parts: tuple[tuple[str, str], ...]


def _v3_turns(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[_Turn]:
    turns = [_v3_turn(m) for m in linked(messages)]
    if not tools:
        return turns
    has_system = turns[0].role == "system"
    head = turns[0].parts[0][1] if has_system else _V3_TOOLS
    listed = json.dumps([tool["function"] for tool in tools], indent=4, ensure_ascii=False)
    return [_Turn("system", (("", f"{head}\n{listed}"),)), *(turns[1:] if has_system else turns)]


def _v3_turn(message: Message) -> _Turn:
    role = "observation" if message.role == "tool" else message.role
    text = [("", message.content)] if message.content or not message.tool_calls else []
    return _Turn(role, (*text, *((call.name, python_call(call)) for call in message.tool_calls)))
