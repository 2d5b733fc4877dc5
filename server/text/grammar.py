"""Replies that must have a form: a JSON object, a JSON schema, a grammar, a regular expression, or one of some texts.

`compile_constraint` makes of such a wish the TokenMask that the engine's samplers ask before each token. A model that thinks may do so first: the form holds
from behind </think> on, and until then the reply cannot end.

The library is llguidance: one wheel of 3 MB that needs nothing else (xgrammar, the other one that is well kept, wants torch, transformers, Triton and an
FFI). It compiles in milliseconds and computes masks when they are asked for, in microseconds, where xgrammar computes tables of the whole vocabulary
beforehand (for a schema of 400 properties, minutes); it bounds the work of a step; and it reads Lark, GBNF and regular expressions too.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import llguidance

from server.errors import Busy, RequestError
from server.text import json_schema
from server.text.grammar_trial import NO_GRAMMAR
from server.text.reasoning import THINK_CLOSE, THINK_OPEN
from server.text.token_mask import GrammarMask, vocabulary_of
from server.text.tokenizer import Tokenizer

RETRY_S = 5  # when others are in the way
MOST_BYTES = 256 * 1024  # of a grammar, in whatever form
_NOT_ENFORCED = "which cannot be enforced while a reply is drawn. Leave it out, and check the reply for it."
_SETTINGS = '%llguidance {"no_forcing": true}\n'  # the model may cut text that is forced into tokens as it likes
_SHOWN = 300  # characters of what the library says


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Any JSON object."""

    param: str = "response_format"  # the request's field, for errors


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A document that fits a JSON schema (2020-12), as far as the library can enforce it; it says what it cannot."""

    schema: json_schema.Schema
    param: str = "response_format"


@dataclass(frozen=True, slots=True)
class GrammarText:
    """A grammar in the library's Lark, where some line begins with `start:`, or else in GBNF as llama.cpp reads it."""

    text: str
    param: str = "grammar"


@dataclass(frozen=True, slots=True)
class Regex:
    """All of the reply matches this (Rust's syntax: no look-around, no back-references)."""

    pattern: str
    param: str = "guided_regex"


@dataclass(frozen=True, slots=True)
class Choice:
    """The reply is one of these."""

    texts: Sequence[str]
    param: str = "guided_choice"


GrammarSpec = JsonObject | JsonSchema | GrammarText | Regex | Choice


def compile_constraint(spec: GrammarSpec, tokenizer: Tokenizer, *, after_think: bool) -> GrammarMask:
    """The constraint of one request. To be called off the event loop: it takes milliseconds, for a new grammar a tenth of a second, at worst a few seconds.

    after_think: the prompt ended inside <think>. Otherwise the reply may open a thought of its own, if the model has a token for it.
    Raises RequestError, with the field's name, for what cannot be read, cannot be enforced, is too large, or fits nothing; Busy where others are in the way.
    """
    try:
        vocabulary = vocabulary_of(tokenizer)
        form, complaint = vocabulary.trial(_alone(_form(spec), spec.param))  # without a thought, or one that fits nothing would only show behind it
        _check(complaint, spec)
        matcher = vocabulary.matcher(_behind(_beginning(tokenizer, after_think), form))
        _check(matcher.get_error(), spec)  # what depends on the vocabulary
        constraint = GrammarMask(vocabulary, matcher)
        constraint.mask()
    except RequestError as error:
        error.param = error.param or spec.param
        raise
    except subprocess.TimeoutExpired as error:
        raise Busy("other grammars are being compiled", RETRY_S) from error
    except UnicodeEncodeError:
        raise RequestError("The grammar holds half of a surrogate pair, which is not valid Unicode. Send the whole pair.", param=spec.param) from None
    return constraint


def inline_json(schema: json_schema.Schema, param: str) -> str:
    """A schema as a rule of a Lark grammar, `%json {...}`, with the checks that a JsonSchema gets. Raises RequestError."""
    return f"%json {json.dumps(json_schema.ready(schema, param), ensure_ascii=False)}"


def _form(spec: GrammarSpec) -> dict[str, object]:
    """The library's description of what was asked for."""
    match spec:
        case JsonObject(param):
            return {"json_schema": json_schema.ready({"type": "object"}, param)}
        case JsonSchema(schema, param):
            return {"json_schema": json_schema.ready(schema, param)}
        case GrammarText(text):
            return {"lark_grammar": text}
        case Regex(pattern):
            return {"lark_grammar": f"start: /{llguidance.regex_to_lark(pattern, 'd')}/"}
        case Choice(texts, param):
            if not texts:
                raise RequestError("There is nothing to choose from. Give at least one text.", param=param)
            return {"lark_grammar": "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)}


def _alone(form: dict[str, object], param: str) -> str:
    """The grammar of a reply that is the form and nothing else."""
    grammar = json.dumps({"grammars": [{"name": "reply", "lark_grammar": f"{_SETTINGS}start: @form"}, {"name": "form", **form}]}, ensure_ascii=False)
    size = len(grammar.encode())
    if size > MOST_BYTES:
        raise RequestError(f"The grammar has {size} bytes, and at most {MOST_BYTES} are taken. Send a smaller one.", param=param)
    return grammar


def _beginning(tokenizer: Tokenizer, after_think: bool) -> str:
    """Lark for what may stand before the form, which is called @form there."""
    thought = "\nthought: inside GAP?\ninside[lazy]: /(.|\\n)*<\\/think>/\nGAP: /\\n{1,3}/"
    if after_think:
        return f"{_SETTINGS}start: thought @form{thought}"
    if len(tokenizer.encode(THINK_CLOSE)) == 1:
        return f'{_SETTINGS}start: ("{THINK_OPEN}" thought)? @form{thought}'
    return f"{_SETTINGS}start: @form"


def _behind(beginning: str, alone: str) -> str:
    """The grammar of a form behind a beginning."""
    grammar = json.loads(alone)
    grammar["grammars"][0]["lark_grammar"] = beginning
    return json.dumps(grammar, ensure_ascii=False)


def _check(complaint: str, spec: GrammarSpec) -> None:
    """Raise what the library says about a grammar, if it does, as a sentence to the one who sent it."""
    if not complaint:
        return
    what = "JSON schema" if isinstance(spec, JsonSchema) else "grammar"
    raise RequestError(f"The {what} {_reason(complaint)}", param=spec.param)


def _reason(complaint: str) -> str:
    _, unknown, names = complaint.partition("Unimplemented keys: ")
    if unknown:
        keys = ", ".join(json.loads(names.split("\n")[0]))
        return f"uses {keys}, {_NOT_ENFORCED}"
    _, unknown, name = complaint.partition("Unknown format: ")
    if unknown:
        return f"uses the format {name.split()[0]}, {_NOT_ENFORCED}"
    if complaint.startswith(NO_GRAMMAR):
        return f"is neither Lark (no line begins with `start:`) nor GBNF that can be read: {complaint.removeprefix(NO_GRAMMAR)[:_SHOWN]}"
    if "oneOf constraints" in complaint:
        return "uses oneOf with alternatives that cannot be told apart. Write anyOf, or give each a required property with a value of its own."
    if complaint.startswith("NoExtension"):
        return "fits nothing at all: each way through it needs itself first. Look for a reference or a rule that only leads back to itself."
    text = " ".join(complaint.replace("<non-verbose/>", "").split())
    return f"cannot be followed: {text[:_SHOWN]}{'...' if len(text) > _SHOWN else ''}"
