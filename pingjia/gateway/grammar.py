"""What a body says about the form of the answer -> a Grammar. Whether it can be met, only the engine knows.

Three dialects: OpenAI's `response_format`, vLLM's `structured_outputs`, and vLLM's older `guided_...` fields.
"""

from __future__ import annotations

from collections.abc import Iterator

from pingjia.errors import RequestError
from pingjia.gateway.bodies import ResponseFormat, SamplingBody, StructuredOutputs
from pingjia.types import Grammar


def grammar_of(body: SamplingBody) -> Grammar | None:
    """The one grammar a body asks for. Raises RequestError naming the field."""
    found = list(_grammars(body))
    if len(found) > 1:
        names = " and ".join(grammar.asked_as for grammar in found)
        raise RequestError(f"{names}: an answer has one form; give one of them", param=_field(found[1]))
    return found[0] if found else None


def _field(grammar: Grammar) -> str:
    return grammar.asked_as.partition(".")[0]


def _grammars(body: SamplingBody) -> Iterator[Grammar]:
    if body.response_format is not None:
        yield from _of_response_format(body.response_format)
    if body.structured_outputs is not None:
        yield from _of_structured_outputs(body.structured_outputs)
    if body.guided_json:
        yield Grammar.schema(body.guided_json, "guided_json")
    if body.guided_regex:
        yield Grammar.regex(body.guided_regex, "guided_regex")
    if body.guided_choice:
        yield Grammar.choice(body.guided_choice, "guided_choice")


def _of_response_format(wanted: ResponseFormat) -> Iterator[Grammar]:
    if wanted.type == "json_object":
        yield Grammar("json_object", asked_as="response_format")
    elif wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise RequestError("response_format: json_schema is missing", param="response_format", code="invalid_value")
        yield Grammar.schema(wanted.json_schema.schema_, "response_format.json_schema")


def _of_structured_outputs(wanted: StructuredOutputs) -> Iterator[Grammar]:
    if wanted.json_ is not None:
        yield Grammar.schema(wanted.json_, "structured_outputs.json")
    if wanted.regex is not None:
        yield Grammar.regex(wanted.regex, "structured_outputs.regex")
    if wanted.choice is not None:
        yield Grammar.choice(wanted.choice, "structured_outputs.choice")
    if wanted.json_object:
        yield Grammar("json_object", asked_as="structured_outputs")
