"""Constraints against what they stand for: walks through their masks give documents that fit the schema, and what cannot be enforced is told in time."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from server.errors import Busy, RequestError
from server.text import grammar_trial, token_mask
from server.text.grammar import Choice, GrammarSpec, GrammarText, JsonObject, JsonSchema, Regex, compile_constraint, inline_json
from server.text.grammar_trial import translated
from server.text.tokenizer import ByteTokenizer, Tokenizer
from server.text.vocabulary import from_metadata
from tests.text import schemas
from tests.text.conftest import Trained
from tests.text.schemas import allowed, takes, walk

BYTES = ByteTokenizer(vocab_size=258, stop_ids=[256, 257])
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}},
            "required": ["value"],
            "additionalProperties": False,
        }
    },
}


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trial's process, whose start takes longer than all else here."""
    monkeypatch.setattr(token_mask, "trial", lambda grammar, size, special: (translated(grammar), ""))


@pytest.fixture(scope="module")
def bpe(trained: Trained) -> Tokenizer:
    return from_metadata(trained.metadata)


def refusal(spec: GrammarSpec, tokenizer: Tokenizer = BYTES) -> RequestError:
    with pytest.raises(RequestError) as caught:
        compile_constraint(spec, tokenizer, after_think=False)
    return caught.value


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("seed", range(20))
def test_random_walks_through_random_schemas_fit_them(seed: int, bpe: Tokenizer) -> None:
    rng = random.Random(seed)
    for tokenizer in (BYTES, bpe) * 5:
        schema = schemas.schema(rng)
        text = walk(compile_constraint(JsonSchema(schema), tokenizer, after_think=False), tokenizer, rng)
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("schema", [PERSON, TREE, {"type": "object"}, {"type": "array", "items": {"type": "string", "format": "date"}, "maxItems": 3}], ids=str)
def test_walks_fit_whatever_the_temperature_of_the_model(schema: dict[str, Any], bpe: Tokenizer) -> None:
    for seed in range(8):
        spec = JsonObject() if schema == {"type": "object"} else JsonSchema(schema)
        text = walk(compile_constraint(spec, bpe, after_think=False), bpe, random.Random(seed))
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(text))


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"name": "Ada", "age": 36}', True),
        ('{"name":"Ada","age":0}', True),
        ('{\n    "name": "Łódź 北京 \\n \\"",\n    "age": 150\n}', True),
        ('{"name": "Ada", "age": 151}', False),
        ('{"name": "Ada", "age": 036}', False),
        ('{"name": "Ada"}', False),
        ('{"age": 36, "name": "Ada"}', False),  # properties come in the schema's order
        ('{"name": "Ada", "age": 36, "x": 1}', False),
        ('{"name": "Ada Ada Ada Ada Ada Ada", "age": 36}', False),
        ('{"name":  "Ada", "age": 36}', False),  # whitespace is bounded
        ('{"name": "Ada", "age": 36}\n', False),
        (' {"name": "Ada", "age": 36}', False),
        ("", False),
    ],
)
def test_exactly_what_fits_the_schema_can_be_said(text: str, fits: bool, bpe: Tokenizer) -> None:
    assert takes(JsonSchema(PERSON), BYTES, text) is fits
    assert takes(JsonSchema(PERSON), bpe, text) is fits


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (JsonObject(), ["{}", '{"a": [1, -2.5e3, null, {"b": "\\u00e9"}]}'.replace("\\u00e9", "é")], ["[]", "1", '"a"', "{", "{}{}"]),
        (JsonSchema({"type": "array", "items": {"type": "integer", "format": "int32"}, "uniqueItems": False}), ["[1,1]"], ["[1.5]"]),
        (JsonSchema(True), ["1", "[]", "null", '"x"'], ["nul", "[1"]),
        (JsonSchema({"$ref": "#/$defs/a/b~1c", "$defs": {"a": {"b/c": {"type": "null"}}}}), ["null"], ["1"]),
        (Regex(r"a/b\d+\"x"), ['a/b12"x'], ["a/b", 'a/bx"x']),
        (Choice(["yes", "no", 'é😀 / "q"\n']), ["yes", 'é😀 / "q"\n'], ["ye", "yesno", ""]),
        (GrammarText('root ::= "a" b*\nb ::= [0-9]+ | "x"\n'), ["a", "a12x3"], ["", "ab"]),
        (GrammarText('start: "<" WORD ">"\nWORD: /[a-z]+/'), ["<ab>"], ["<>", "ab"]),
        (GrammarText(f'start: "call " {inline_json(PERSON, "tools")} "!"'), ['call {"name": "a", "age": 1}!'], ["call {}!"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_form(spec: GrammarSpec, good: list[str], bad: list[str], bpe: Tokenizer) -> None:
    for tokenizer in (BYTES, bpe):
        assert [takes(spec, tokenizer, text) for text in good + bad] == [True] * len(good) + [False] * len(bad)


ANSWER = '{"name": "Ada", "age": 36}'


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("after_think", "text", "fits"),
    [
        (True, f'so {{"name" </thin x\n</think>\n\n{ANSWER}', True),
        (True, f"<think>so</think>{ANSWER}", True),  # some models repeat the tag
        (True, f"</think>\n{ANSWER}", True),
        (True, ANSWER, False),  # still a thought
        (True, f"so</think>\n\n\n\n{ANSWER}", False),
        (True, f"so</think>x{ANSWER}", False),
        (True, "so", False),  # the reply cannot end in its thought
        (False, ANSWER, True),
        (False, f"<think>so</think>\n\n{ANSWER}", True),
        (False, f"so</think>{ANSWER}", False),
    ],
)
def test_the_form_begins_behind_the_thought(after_think: bool, text: str, fits: bool, bpe: Tokenizer) -> None:
    assert takes(JsonSchema(PERSON), bpe, text, after_think=after_think) is fits
    if after_think:  # </think> need not be a token
        assert takes(JsonSchema(PERSON), BYTES, text, after_think=True) is fits


@pytest.mark.usefixtures("untried")
def test_a_model_without_the_tag_does_not_begin_a_thought() -> None:
    assert not takes(JsonSchema(PERSON), BYTES, f"<think>so</think>{ANSWER}")


@pytest.mark.usefixtures("untried")
def test_any_way_to_cut_the_text_into_tokens_is_allowed_and_no_control_token_is(bpe: Tokenizer) -> None:
    text, lengths = b"the tower, the river", []
    for start in range(1, len(text)):
        constraint = compile_constraint(Choice([text.decode()]), bpe, after_think=False)
        for byte in text[:start]:
            constraint.accept(bpe.encode(chr(byte))[0])
        ids = [token_id for token_id in range(bpe.vocab_size) if bpe.token_bytes(token_id) and text[start:].startswith(bpe.token_bytes(token_id))]
        assert allowed(constraint.mask()) == ids
        lengths.append(len(ids))
    assert max(lengths) > 2
    thought = compile_constraint(Choice(["a"]), bpe, after_think=True)
    hidden = {token_id for token_id in bpe.special_tokens.values() if not bpe.token_bytes(token_id)}
    assert hidden
    assert not hidden & set(allowed(thought.mask()))
    assert len(allowed(thought.mask())) > bpe.vocab_size - len(hidden) - 140  # all but those, and bytes that begin no character


@pytest.mark.usefixtures("untried")
def test_behind_the_end_only_ends_follow() -> None:
    constraint = compile_constraint(Choice(["a", "ab"]), BYTES, after_think=False)
    constraint.accept(ord("a"))
    assert allowed(constraint.mask()) == [ord("b"), 256, 257]
    constraint.accept(257)
    assert allowed(constraint.mask()) == [256, 257]
    constraint.accept(256)
    assert allowed(constraint.mask()) == [256, 257]


@pytest.mark.usefixtures("untried")
def test_what_is_not_allowed_is_an_error_and_stays_one() -> None:
    constraint = compile_constraint(Choice(["ab"]), BYTES, after_think=False)
    with pytest.raises(RequestError, match="allows nothing"):
        constraint.accept(ord("b"))
    with pytest.raises(RequestError, match="allows nothing"):
        constraint.mask()


@pytest.mark.usefixtures("untried")
def test_a_vocabulary_that_cannot_say_it_is_told_so() -> None:
    letters = ByteTokenizer(vocab_size=128, stop_ids=[0])
    assert "allows nothing that this model can say" in str(refusal(Choice(["é"]), letters))
    assert "no end-of-text token" in str(refusal(JsonObject(), ByteTokenizer(vocab_size=256)))


@pytest.mark.usefixtures("untried")
def test_a_grammar_that_grows_without_end_is_told_in_time() -> None:
    constraint = compile_constraint(Regex(r"(.*a.{16}b.*)|(.*c.{17}d.*)|(.*e.{18}f.*)"), BYTES, after_think=False)
    rng, times = random.Random(1), [time.perf_counter()]

    def go_on() -> None:
        for _ in range(20_000):
            constraint.mask()
            times.append(time.perf_counter())
            constraint.accept(rng.choice(b"abcdef"))

    with pytest.raises(RequestError, match="too large to follow"):
        go_on()
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 1


def union(*alternatives: dict[str, Any]) -> JsonSchema:
    return JsonSchema({"oneOf": [{"type": "object", **alternative} for alternative in alternatives]})


@pytest.mark.usefixtures("untried")
def test_one_of_is_exact_or_refused() -> None:
    told = [{"properties": {"kind": {"const": kind}, "x": {"type": "integer"}}, "required": ["kind"]} for kind in ("a", "b")]
    assert takes(union(*told), BYTES, '{"kind": "b", "x": 1}')
    assert not takes(union(*told), BYTES, '{"kind": "c"}')
    pets = {"Cat": told[0] | {"type": "object"}, "Dog": told[1] | {"type": "object"}}
    assert takes(JsonSchema({"oneOf": [{"$ref": f"#/$defs/{name}"} for name in pets], "$defs": pets}), BYTES, '{"kind": "a"}')
    assert takes(JsonSchema({"oneOf": [{"type": "string"}, {"type": "null"}]}), BYTES, "null")
    assert "oneOf with alternatives that cannot be told apart" in str(refusal(union(told[0], told[0])))
    assert "cannot be told apart" in str(refusal(union(told[0], {"properties": {"x": {"const": 1}}})))
    assert takes(JsonSchema({"type": "object", "properties": {"oneOf": {"enum": [{"oneOf": 1}]}}}), BYTES, '{"oneOf": {"oneOf":1}}')  # no keyword there


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"type": "array", "items": {"contains": {}, "uniqueItems": True}}, "uses contains, uniqueItems, which cannot be enforced"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "uses if, then, which"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "format": "frob"}, "uses the format frob, which cannot be enforced"),
        ({"$ref": "https://example.com/schema.json"}, "does not fetch"),
        ({"$ref": "#"}, "fits nothing at all"),
        ({"allOf": [{"const": 1}, {"const": 2}]}, "Unsatisfiable"),
        ("{}", "is an object. Send the schema itself"),
        ([], "is an object"),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_named(schema: Any, sentence: str) -> None:
    error = refusal(JsonSchema(schema, "response_format.json_schema.schema"))
    assert sentence in str(error)
    assert error.param == "response_format.json_schema.schema"
    assert "\n" not in str(error)


def test_what_fits_nothing_is_told_before_the_thought(bpe: Tokenizer) -> None:
    for after_think in (True, False):
        with pytest.raises(RequestError, match="fits nothing at all"):
            compile_constraint(JsonSchema({"$ref": "#"}), bpe, after_think=after_think)


def chain(length: int) -> dict[str, Any]:
    """References behind each other, which a recursive reader follows one within the other."""
    links = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"type": "null"}]} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "integer"}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (JsonSchema({"enum": [f"value {i}" for i in range(20_000)]}), "has 288900 bytes, and at most 131072"),
        (JsonSchema(nested(60)), "nested more than 48 schemas deep"),
        (JsonSchema(nested(5000)), "nested more than 48 schemas deep"),
        (JsonSchema(chain(1900)), "too large or too deeply nested"),
        (JsonSchema({"type": "integer", "multipleOf": 99_999_989}), "takes longer than 2 s to compile"),
        (GrammarText("start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(3000)) + 'r3000: "a"\n'), "too large or too deeply nested"),
        (GrammarText("start: " + "(" * 5000 + '"a"' + ")" * 5000), "too deeply nested"),
        (GrammarText('start: "' + "a" * 300_000 + '"'), "at most 262144"),
        (GrammarText("start: R20\nR0: /a.*/\n" + "".join(f'R{i}: R{i - 1} R{i - 1} "x"\n' for i in range(1, 21))), "too big"),
        (GrammarText("nothing"), "neither Lark"),
        (GrammarText("start: <[999999]>"), "range end too large"),
        (Regex("(" * 500 + "a" + ")" * 500), "cannot be followed"),
        (Regex("(a"), "unclosed group"),
        (Choice([]), "nothing to choose from"),
        (GrammarText("root ::= r1\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(1, 9000)) + 'r9000 ::= "a"\n'), "takes longer than 2 s"),
        (GrammarText("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000), "nor GBNF that can be read"),
        (Choice(["\ud800"]), "half of a surrogate pair"),
        (Regex("\ud800"), "half of a surrogate pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_too_much_is_answered_in_time(spec: GrammarSpec, sentence: str) -> None:
    began = time.perf_counter()
    error = refusal(spec)
    assert time.perf_counter() - began < 16  # two seconds of a core, on a machine that does other things too
    assert sentence in str(error)
    assert len(str(error)) < 500


def test_bombs_within_the_bounds_compile(bpe: Tokenizer) -> None:
    """Large counts are no large grammars: the library unrolls nothing that is not reached."""
    for schema in (
        {"type": "array", "minItems": 100_000, "items": {"type": "integer"}},
        {"type": "string", "minLength": 100_000, "maxLength": 1_000_000_000},
        {"type": "string", "pattern": "^((((a{1,100}){1,100}){1,100}){1,100})$"},
        nested(40),
    ):
        assert allowed(compile_constraint(JsonSchema(schema), bpe, after_think=False).mask())


def test_a_machine_too_busy_to_tell_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer(vocab_size=257, stop_ids=[256])
    with monkeypatch.context() as patch:
        patch.setattr(grammar_trial, "_PATIENCE_S", 1e-3)
        with pytest.raises(Busy, match=r"grammars are being compiled\. Try again in 5 s"):
            compile_constraint(Choice(["a"]), tokenizer, after_think=False)
    compile_constraint(Choice(["a"]), tokenizer, after_think=False)


def test_few_wait_for_their_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds one of the threads that read all requests."""
    tokenizer = ByteTokenizer(vocab_size=257, stop_ids=[256])
    monkeypatch.setattr(grammar_trial, "_places", threading.BoundedSemaphore(1))
    with grammar_trial._places, pytest.raises(Busy):
        compile_constraint(Choice(["c"]), tokenizer, after_think=False)
    compile_constraint(Choice(["c"]), tokenizer, after_think=False)


def test_who_asks_for_a_grammar_that_is_being_tried_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, tried = ByteTokenizer(vocab_size=257, stop_ids=[256]), []

    def slow(grammar: str, size: int, special: object) -> tuple[str, str]:
        tried.append(grammar)
        time.sleep(0.05)
        return grammar, ""

    monkeypatch.setattr(token_mask, "trial", slow)
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: compile_constraint(Choice(["a"]), tokenizer, after_think=False), range(20)))
    assert len(tried) == 1


def test_a_grammar_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, tried = ByteTokenizer(vocab_size=257, stop_ids=[256]), []
    monkeypatch.setattr(token_mask, "trial", lambda grammar, size, special: tried.append(grammar) or (grammar, ""))
    for _ in range(3):
        compile_constraint(Choice(["a"]), tokenizer, after_think=False)
    compile_constraint(Choice(["b"]), tokenizer, after_think=False)
    assert len(tried) == 2
    assert re.search(r'\\"a\\"', tried[0])
