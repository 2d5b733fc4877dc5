"""Forms that a reply must have: OpenAI's response_format, and the fields of vLLM and llama.cpp that ask for the same and for more."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from server.api.schemas.body import Body
from server.api.sentences import type_name
from server.errors import RequestError
from server.text.grammar import Choice, GrammarSpec, GrammarText, JsonObject, JsonSchema, Regex


def _schema(value: object) -> dict[str, Any] | bool | None:
    """A JSON schema, or the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"is a text that is no JSON: {error}. Send the schema itself.") from error
    if value is not None and not isinstance(value, dict | bool):
        raise ValueError(f"must be a JSON schema, which is an object, not {type_name(value)}.")
    return value


Schema = Annotated[dict[str, Any] | bool | None, PlainValidator(_schema, json_schema_input_type=dict[str, Any] | bool | str | None)]


class NamedSchema(Body):
    """`response_format.json_schema`. Its name and `strict` change nothing: the schema is always followed."""

    json_schema: Schema = Field(alias="schema", default=None)


class ResponseFormat(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    object_schema: Schema = Field(alias="schema", default=None)  # llama.cpp's, beside json_object

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.json_schema is None) and self.object_schema is None:
            raise ValueError("has the type json_schema, so it needs 'json_schema' with a 'schema' in it.")
        return self

    def form(self) -> GrammarSpec | None:
        """What it asks for; None for plain text."""
        schema = self.json_schema.json_schema if self.json_schema is not None else self.object_schema
        if self.type == "text":
            return None
        return JsonObject() if schema is None else JsonSchema(schema)


class StructuredOutputs(Body):
    """vLLM's newer name of its guided_* fields: one of these."""

    json_schema: Schema = Field(alias="json", default=None)
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None

    def forms(self) -> list[GrammarSpec]:
        """What is asked for."""
        return _forms("structured_outputs", self.json_schema, self.regex, self.choice, self.grammar)


class Formed(Body):
    """The fields that ask for a form. At most one form can be asked for."""

    response_format: ResponseFormat | None = None
    grammar: str | None = None  # Lark or GBNF
    json_schema: Schema = None  # llama.cpp's
    guided_json: Schema = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _check_forms(self) -> Self:
        if len(self._forms()) > 1:
            asked = [form.param for form in self._forms()]
            raise RequestError(f"The reply cannot have several forms at once, but {' and '.join(asked)} each ask for one. Send one of them.", param=asked[1])
        return self

    def form(self) -> GrammarSpec | None:
        """The form that the reply must have."""
        return next(iter(self._forms()), None)

    def _forms(self) -> list[GrammarSpec]:
        asked = [self.response_format.form()] if self.response_format is not None else []
        forms = [form for form in asked if form is not None]
        forms += _forms("json_schema", self.json_schema, None, None, None) + _forms("grammar", None, None, None, self.grammar)
        forms += _forms("guided_json", self.guided_json, None, None, None) + _forms("guided_grammar", None, None, None, self.guided_grammar)
        forms += _forms("guided_regex", None, self.guided_regex, None, None) + _forms("guided_choice", None, None, self.guided_choice, None)
        return forms + (self.structured_outputs.forms() if self.structured_outputs is not None else [])


def _forms(param: str, schema: dict[str, Any] | bool | None, regex: str | None, choice: list[str] | None, grammar: str | None) -> list[GrammarSpec]:
    """Those that are there; an empty grammar or expression asks for nothing."""
    forms: list[GrammarSpec | None] = [
        JsonSchema(schema, param) if schema is not None else None,
        Regex(regex, param) if regex else None,
        Choice(tuple(choice), param) if choice else None,
        GrammarText(grammar, param) if grammar else None,
    ]
    return [form for form in forms if form is not None]
