"""What a reply must look like: the form that a request asks for, and the calls that it forces, as a grammar of the model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from server.api.schemas.openai import ChatRequest
from server.api.schemas.tools import Named, ToolDefinition
from server.errors import RequestError
from server.text.grammar import GrammarSpec, GrammarText, JsonObject, JsonSchema, compile_constraint, inline_json
from server.text.tokenizer import Tokenizer
from server.text.tools.calls import Tool
from server.text.tools.forced import CallGrammar
from server.text.tools.formats import ToolFormat, ToolRules
from server.types import TokenMask

Constrain = Callable[[], TokenMask]  # a new constraint for each reply of a request


def tool_rules(body: ChatRequest, offered: Sequence[ToolDefinition], form: ToolFormat) -> ToolRules | None:
    """Which calls are looked for in the reply; None when no tools are offered."""
    if not offered:
        return None
    tools = tuple(Tool(tool.function.name, tool.function.parameters or {}, bool(tool.function.strict)) for tool in offered)
    return ToolRules(form, tools, parallel=body.parallel_tool_calls is not False and form.separator is not None)


def form_constraint(form: GrammarSpec | None, tokenizer: Tokenizer, *, after_think: bool) -> Constrain | None:
    """What makes the constraints of a request's replies; None for a request whose replies are free."""
    return None if form is None else lambda: compile_constraint(form, tokenizer, after_think=after_think)


def chat_constraint(body: ChatRequest, rules: ToolRules | None, tokenizer: Tokenizer, *, after_think: bool) -> Constrain | None:
    """The same for a chat, whose replies may have to be calls. RequestError for a form beside tools that cannot both be had."""
    if rules is None:
        return form_constraint(body.form(), tokenizer, after_think=after_think)
    if body.form() is None and body.tool_choice in (None, "auto") and not any(tool.strict for tool in rules.tools):
        return None
    return lambda: _with_calls(body, rules, tokenizer, after_think)


def _with_calls(body: ChatRequest, rules: ToolRules, tokenizer: Tokenizer, after_think: bool) -> TokenMask:
    """Calls by their functions' schemas. Where those cannot be followed, functions that are not strict take any object."""
    try:
        return compile_constraint(_spec(body, rules), tokenizer, after_think=after_think)
    except RequestError:
        loose = tuple(tool if tool.strict else replace(tool, parameters={"type": "object"}) for tool in rules.tools)
        if loose == rules.tools:
            raise
        return compile_constraint(_spec(body, replace(rules, tools=loose)), tokenizer, after_think=after_think)


def _spec(body: ChatRequest, rules: ToolRules) -> GrammarSpec:
    """The grammar of a whole reply that may hold calls, or must."""
    named = body.tool_choice.name if isinstance(body.tool_choice, Named) else None
    tools = [tool for tool in rules.tools if named in (None, tool.name)]
    grammar = CallGrammar(rules.format, tools, lambda schema: inline_json(schema, "tools"), parallel=rules.parallel and named is None)
    match body.form():
        case None if named is not None or body.tool_choice == "required":
            return GrammarText(grammar.forced(), "tools")
        case None:
            return GrammarText(grammar.free(), "tools")
        case form if named is not None or body.tool_choice == "required":
            raise RequestError(f"The reply cannot be a call and have a form of its own: leave out '{form.param}', or 'tool_choice'.", param=form.param)
        case JsonObject():
            return GrammarText(grammar.or_json({"type": "object"}), "tools")
        case JsonSchema(schema) if isinstance(schema, dict):
            return GrammarText(grammar.or_json(schema), "tools")
        case form:
            raise RequestError(f"'{form.param}' cannot stand beside 'tools': leave one of them out, or ask for JSON by 'response_format'.", param=form.param)
