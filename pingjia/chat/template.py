"""A chat template: a conversation in, text out.

Here: the sandbox that Jinja templates of model directories run in, and the plain form for models without one. Not
here: where a template is read from (`load.py`) and how its text becomes ids (`hf.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from pingjia.chat.dialect import Dialect, Row, Tools
from pingjia.errors import ModelError, RequestError
from pingjia.types import Message

PLAIN = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}答：{{ m.content }}{{ eos_token }}\n"
    "{% elif m.role == 'user' %}问：{{ m.content }}\n"
    "{% else %}{{ m.content }}\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}答：{% endif %}"
)
"""The form used for a model without a chat template, when asked for by `template="plain"`; never silently."""

Clock = Callable[[], datetime]


class ChatTemplate:
    """One Jinja template with its special-token strings. Compiled on first use; safe to use from several threads."""

    def __init__(self, source: str, tokens: Mapping[str, str], clock: Clock = datetime.now) -> None:
        """`tokens` are variables of the template, such as bos_token; `clock` is what strftime_now reads."""
        self.source = source
        self.tokens = dict(tokens)
        self._clock = clock

    def at(self, clock: Clock) -> ChatTemplate:
        """The same template on another clock."""
        return ChatTemplate(self.source, self.tokens, clock)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Tools = (),
        dialect: Dialect = Dialect(),  # noqa: B008  (immutable)
    ) -> str:
        """The text of a conversation. RequestError (param "messages") when the template refuses it."""
        return self.render_rows(dialect.rows(messages, tools), add_generation_prompt, dialect.variable(tools))

    def render_rows(self, rows: Sequence[Row], add_generation_prompt: bool, tools: Tools | None) -> str:
        """The same for what the template itself reads."""
        values = {"messages": rows, "add_generation_prompt": add_generation_prompt, "tools": tools, "documents": None}
        template = self._compiled
        try:
            return template.render(**values, **self.tokens)
        except _Refusal as e:
            raise RequestError(f"the chat template refuses this conversation: {e}", param="messages") from None
        except Exception as e:  # somebody else's program: whatever it trips over, the conversation is what we can name
            raise RequestError(f"the chat template fails on this conversation: {e}", param="messages") from None

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: self._clock().strftime(form)
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as e:
            raise ModelError(f"the model's chat template is not valid Jinja: {e}") from None


class _Refusal(jinja2.TemplateError):
    """What a template raises on purpose."""


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which a model never saw in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class _GenerationTag(jinja2.ext.Extension):
    """Reads `{% generation %}...{% endgeneration %}` as its body: we find the answers by our own cuts."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
