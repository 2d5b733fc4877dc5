"""A JSON schema made ready for the grammar library: checked for size and depth, and given whitespace that ends.

The library refuses what it cannot enforce and says which keyword. Two things are ours. Between the parts of a document it would allow any amount of
whitespace, in which a model can lose itself until its tokens are used up: here it is one space, or a new line and its indentation. And `oneOf` is read as
`anyOf` where a property tells its alternatives apart, as unions made by pydantic have one, for then no document fits two of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from server.errors import RequestError

MOST_BYTES = 128 * 1024  # of a schema as JSON
MOST_DEPTH = 48  # of schemas within schemas; the library reads JSON of up to 128 levels
_WHITESPACE = r"( |\n[ \t]{0,64})"
_SETTINGS = "x-guidance"  # where the library looks for its settings

# Where schemas stand within a schema (JSON Schema 2020-12, section 10, and the names of earlier drafts)
_ONE = frozenset({"additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then", "unevaluatedProperties"})
_LISTS = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
_MAPS = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})

Schema = Mapping[str, Any] | bool


def ready(schema: object, param: str) -> dict[str, Any]:
    """The schema as the library takes it. Raises RequestError, naming the field `param`, for what is no schema or too large."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise RequestError("A JSON schema is an object. Send the schema itself, not its text.", param=param)
    try:
        size = len(json.dumps(schema))
    except RecursionError:
        raise _too_deep(param) from None
    if size > MOST_BYTES:
        raise RequestError(f"The JSON schema has {size} bytes, and at most {MOST_BYTES} are taken. Send a smaller one.", param=param)
    rewritten = _Rewriter(schema, param).schema({key: value for key, value in schema.items() if key != _SETTINGS}, 0)
    return {**rewritten, _SETTINGS: {"whitespace_pattern": _WHITESPACE}}


class _Rewriter:
    """Walks the schemas of one document; what stands in `enum`, `const` or `default` is data and stays as it is."""

    def __init__(self, document: Mapping[str, Any], param: str) -> None:
        self._document = document
        self._param = param

    def schema(self, schema: Any, depth: int) -> Any:
        if not isinstance(schema, dict):
            return schema  # true and false; the library refuses the rest
        if depth > MOST_DEPTH:
            raise _too_deep(self._param)
        rewritten = {key: self._value(key, value, depth + 1) for key, value in schema.items() if (key, value) != ("uniqueItems", False)}
        if "oneOf" in rewritten and "anyOf" not in rewritten and self._told_apart(schema["oneOf"]):
            rewritten["anyOf"] = rewritten.pop("oneOf")
        return rewritten

    def _value(self, key: str, value: Any, depth: int) -> Any:
        if key in _MAPS and isinstance(value, dict):
            return {name: self.schema(part, depth) for name, part in value.items()}
        if key in _LISTS and isinstance(value, list):
            return [self.schema(part, depth) for part in value]
        return self.schema(value, depth) if key in _ONE else value

    def _told_apart(self, alternatives: Any) -> bool:
        """Whether a property that all alternatives require has other values in each of them."""
        found = [self._resolved(alternative) for alternative in alternatives] if isinstance(alternatives, list) else []
        tables = [_fixed_values(alternative) for alternative in found]
        return any(_disjoint([table[name] for table in tables]) for name in set.intersection(*map(set, tables))) if tables else False

    def _resolved(self, schema: Any) -> Any:
        """What a reference within the document points to; anything else as it is."""
        pointer = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(pointer, str) or not pointer.startswith("#/"):
            return schema
        found: Any = self._document
        for part in pointer[2:].split("/"):
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        return found


def _fixed_values(schema: Any) -> dict[str, set[str]]:
    """Of a schema of objects: the properties that must be there and have one of certain values, and those values as JSON."""
    if not isinstance(schema, dict) or schema.get("type") != "object":
        return {}
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    fixed = {name: _values(properties[name]) for name in required if isinstance(name, str) and name in properties}
    return {name: values for name, values in fixed.items() if values}


def _values(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return {json.dumps(value, sort_keys=True) for value in values} if isinstance(values, list) else set()


def _disjoint(sets: Iterable[set[str]]) -> bool:
    return all(a.isdisjoint(b) for a, b in itertools.combinations(sets, 2))


def _too_deep(param: str) -> RequestError:
    return RequestError(f"The JSON schema is nested more than {MOST_DEPTH} schemas deep. Send a flatter one, or use $defs and $ref.", param=param)
