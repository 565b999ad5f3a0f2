"""The tokenizer of every model that a `tokenizers` vocabulary and a Jinja template describe.

One rendering serves training, serving and evaluation. The conversation is rendered as text; the text is cut where each
answer begins; the pieces are encoded one by one and joined. So the ids of a prompt are an exact prefix of the ids of
the same conversation with its answer, which is the state a model is in when it answers. Against encoding the whole
text at once this differs only where the vocabulary would merge the end of the generation prompt with the start of the
answer (an answer that begins with a line break after a prompt that ends with one), or where it marks the start of
every text (SentencePiece's dummy prefix).

Not here: finding and reading files (`load.py`), the template sandbox (`template.py`), typed special tokens
(`specials.py`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pingjia.chat.dialect import Dialect, Tools, find_dialect
from pingjia.chat.pieces import stream_factory, token_bytes
from pingjia.chat.specials import Marked, Specials
from pingjia.chat.template import ChatTemplate, Clock
from pingjia.chat.tokenizer import StreamDecoder, as_messages, check_example, check_text, learn_answers
from pingjia.chat.tools import as_tools, linked, plain, uses_tools
from pingjia.errors import ModelError, RequestError, StorageError
from pingjia.types import Encoded, Example, Message

if TYPE_CHECKING:
    import tokenizers

_NO_TEMPLATE = (
    "this model has no chat template (a base model?); load it with template='plain' for the form 问：…/答：…, "
    "or give a Jinja template"
)


@dataclass(frozen=True, slots=True)
class Parts:
    """What `load.py` read: the vocabulary and what surrounds it."""

    vocabulary: tokenizers.Tokenizer
    template: ChatTemplate | None
    tokens: dict[str, str]  # bos_token, eos_token, ... as far as the model names them
    stop_ids: frozenset[int]
    pad_id: int


class HFTokenizer:
    """See `tokenizer.Tokenizer`, which this satisfies.

    Every assistant turn of an example is learnt, those of the history too: each is an answer the user vouches for.
    """

    family = "hf"

    def __init__(self, parts: Parts) -> None:
        self._vocabulary = parts.vocabulary
        self._template = parts.template
        self._tokens = parts.tokens
        self.pad_id = parts.pad_id
        self.vocab_size: int = parts.vocabulary.get_vocab_size(with_added_tokens=True)
        self._specials = Specials(_special_ids(parts.vocabulary))
        self._special_ids = frozenset(self._specials.ids.values())
        self._new_stream = stream_factory(parts.vocabulary, self._special_ids)
        self._bos_ids = _leading_ids(parts.vocabulary)
        self.stop_ids = parts.stop_ids | self._end_of_turn()

    def at(self, clock: Clock) -> HFTokenizer:
        """The same tokenizer with another clock, for templates that write the date."""
        twin = copy.copy(self)
        twin._template = self._template and self._template.at(clock)
        return twin

    @property
    def vocabulary(self) -> tokenizers.Tokenizer:
        """The `tokenizers` object. Whoever changes it makes a copy first."""
        return self._vocabulary

    def with_vocabulary(self, vocabulary: tokenizers.Tokenizer) -> HFTokenizer:
        """The same template, named tokens and stop tokens over another vocabulary that holds them at the same ids."""
        return HFTokenizer(Parts(vocabulary, self._template, self._tokens, self.stop_ids, self.pad_id))

    @cached_property
    def template_digest(self) -> str:
        source = self._template.source if self._template else ""
        parts = [source, json.dumps(self._named(), sort_keys=True), self._vocabulary.to_str()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _named(self) -> dict[str, str]:
        """The named tokens, without a pad token that is only the eos token again."""
        named = dict(self._tokens)
        if named.get("pad_token") == named.get("eos_token"):
            named.pop("pad_token", None)
        return named

    # ---- text

    def encode(self, text: str) -> list[int]:
        """Ids of raw text. Special-token strings in it do become special tokens: the caller vouches for the text."""
        check_text(text, "text", "prompt")
        return list(self._vocabulary.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        stream = self._new_stream()
        return stream.feed(ids) + stream.flush()

    def stream_answer(self) -> StreamDecoder:
        return self.stream()

    def stream(self) -> StreamDecoder:
        return self._new_stream()

    def render_text(self, text: str) -> list[int]:
        return self._bos_ids + self.encode(text)

    def special_text(self, token: int) -> str | None:
        return self._vocabulary.id_to_token(token) if token in self._special_ids else None

    def token_bytes(self, token: int) -> bytes | None:
        text = None if token in self._special_ids else self._vocabulary.id_to_token(token)
        if self._to_bytes is None:
            return None
        return b"" if text is None else self._to_bytes(text)

    @cached_property
    def _to_bytes(self) -> Callable[[str], bytes] | None:
        return token_bytes(self._vocabulary)

    # ---- conversations

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[str | Mapping[str, Any]] = (),
    ) -> list[int]:
        """Ids of a conversation; see `Tokenizer.render`.

        Raises ModelError for a model without a chat template.
        """
        marked = self._marked(as_messages(messages), as_tools(tools))
        text = self._text(marked.messages, add_generation_prompt, marked.tools)
        cuts = sorted((c for c in self._prompts(marked) if text.startswith(c)), key=len)
        return [i for piece in _pieces([*cuts, text]) for i in self._encode_piece(piece, marked.mark)]

    def encode_example(self, example: Example) -> Encoded:
        """Ids and learning mask of an example.

        Raises ModelError when the template rewrites earlier turns (the prompt of training could not be the prompt of
        serving) or does not end answers with a stop token.
        """
        messages = check_example(example)
        marked = self._marked(messages, as_tools(example.tools))
        texts = [*self._prompts(marked), self._closed_text(marked, has_calls=bool(messages[-1].tool_calls))]
        if not all(later.startswith(earlier) for earlier, later in pairwise(texts)):
            raise ModelError(
                f"{example.where or 'example'}: the chat template does not keep the prompt in front of its answer (it "
                "rewrites earlier turns or puts something else in the answer's place), so training and serving would "
                "see different prompts; load the tokenizer with another template"
            )
        prompt, *answers = (self._encode_piece(p, marked.mark) for p in _pieces(texts))
        wanted = [m.learn for i, m in enumerate(marked.messages) if i and m.role == "assistant"]
        return learn_answers(prompt, answers, self.stop_ids, example.where, wanted)

    def _marked(self, messages: Sequence[Message], tools: Tools) -> Marked:
        """A conversation as the template reads it: in the plain form where it knows nothing of tools."""
        if tools or uses_tools(messages):
            messages, dialect = linked(messages), self._dialect
            if not dialect.is_native:
                has_results = dialect.results is not None
                messages = plain(messages, tools, has_results=has_results, has_system=dialect.system)
                tools = ()
        return self._specials.mark(messages, tools)

    @cached_property
    def _dialect(self) -> Dialect:
        if self._template is None:
            raise ModelError(_NO_TEMPLATE)
        template = self._template
        return find_dialect(template.render_rows, lambda text: len(self._specials.written(text)))

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools = ()) -> str:
        if self._template is None:
            raise ModelError(_NO_TEMPLATE)
        dialect = self._dialect if tools or uses_tools(messages) else Dialect()
        return self._template.render(messages, add_generation_prompt, tools, dialect)

    def _prompts(self, chat: Marked) -> list[str]:
        """For each answer, the text of the prompt that it answers."""
        answers = (i for i, m in enumerate(chat.messages) if i and m.role == "assistant")
        return [self._text(chat.messages[:i], True, chat.tools) for i in answers]

    def _closed_text(self, chat: Marked, *, has_calls: bool) -> str:
        """The text of an example with the last answer's end in it.

        Some templates (GLM-4) end an answer only by beginning the next turn, which says whether a question or a result
        is waited for; then one more turn is rendered.
        """
        text = self._text(chat.messages, False, chat.tools)
        prompt = self._text(chat.messages[:-1], True, chat.tools)
        if any(i in self.stop_ids for i in self._specials.written(text[len(prompt) :])):
            return text
        role = "tool" if has_calls and self._dialect.results else "user"
        longer = self._text(linked([*chat.messages, Message(role, "?")]), False, chat.tools)
        return longer if longer.startswith(text) else text

    def _end_of_turn(self) -> frozenset[int]:
        """The special token that the template itself puts right after an answer, though no file calls it a stop."""
        probe = (Message("user", "?"), Message("assistant", "ok"))
        try:
            prompt, text = self._text(probe[:1], True), self._text(probe, False)
        except (ModelError, RequestError):
            return frozenset()
        _, _, after = text[len(prompt) :].partition("ok")
        found = self._specials.first_at_start(after)
        return frozenset() if found is None else frozenset({found})

    # ---- ids

    def _encode_piece(self, text: str, mark: str | None) -> list[int]:
        """Ids of rendered text in which typed special-token strings are marks."""
        written = self._specials.written(text)
        if mark is None or mark not in text:
            ids = self.encode(text)
            if [i for i in ids if i in self._special_ids] == written:
                return ids
        return self._encode_guarded(text, mark or "")

    def _encode_guarded(self, text: str, mark: str) -> list[int]:
        """Special tokens only where the template wrote them; all between is plain text, whatever it looks like."""
        ids: list[int] = []
        for i, part in enumerate(self._specials.split(text)):
            if i % 2:
                ids.append(self._specials.ids[part])
            else:
                ids += self._encode_plain(self._specials.restore(part, mark) if mark else part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ids = list(self._plain_vocabulary.encode(text, add_special_tokens=False).ids)
        typed = next((s for s in self._specials.split(text)[1::2]), None)
        if typed is None or len(typed) < 2 or not self._special_ids.intersection(ids):
            return ids
        # A unigram vocabulary may hold the special string as an ordinary piece: keep its halves apart.
        middle = text.index(typed) + len(typed) // 2
        return self._encode_plain(text[:middle]) + self._encode_plain(text[middle:])

    @cached_property
    def _plain_vocabulary(self) -> tokenizers.Tokenizer:
        """A second tokenizer that takes special-token strings for text. Made when first needed."""
        import tokenizers

        plain = tokenizers.Tokenizer.from_str(self._vocabulary.to_str())
        plain.encode_special_tokens = True
        return plain

    # ---- files

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `load_tokenizer` and transformers both read."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self._tokens}
        config["clean_up_tokenization_spaces"] = False
        config["stop_tokens"] = [self._vocabulary.id_to_token(i) for i in sorted(self.stop_ids)]
        if "eos_token" in config:
            config.setdefault("pad_token", config["eos_token"])
        if self._template is not None:
            config["chat_template"] = self._template.source
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._vocabulary.save(str(directory / "tokenizer.json"))
            text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
            (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
        except Exception as e:  # tokenizers raises bare Exception when the disk refuses
            raise StorageError(f"{directory}: the tokenizer could not be written: {e}") from None


def _pieces(texts: Sequence[str]) -> list[str]:
    """What each text adds to the one before it."""
    return [later[len(earlier) :] for earlier, later in pairwise(["", *texts])]


def _special_ids(vocabulary: tokenizers.Tokenizer) -> dict[str, int]:
    added = vocabulary.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.special}


def _leading_ids(vocabulary: tokenizers.Tokenizer) -> list[int]:
    """What the vocabulary's own post-processing puts before a text (bos), and not what it puts after."""
    bare = vocabulary.encode("a", add_special_tokens=False).ids
    full = vocabulary.encode("a", add_special_tokens=True).ids
    start = next((k for k in range(len(full)) if full[k : k + len(bare)] == bare), 0)
    return list(full[:start])
