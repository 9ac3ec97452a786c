"""Answers to 200 JSON schemas of the kinds in the published test suite, against the sarai at SARAI_URL with a model `plain`: whole, streamed, and
in Ollama's API.

Each answer that ends by itself must validate. Schemas that are refused are refused with the place in them; where no answer kept its
schema, that is said.
"""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai

PATTERNS = ["^[a-z]{2,5}$", "^(red|green)-[0-9]{1,3}$", "^[A-F0-9]{4}$", r"^\d{3}-\d{2}$", r"^\w+@(a|b)\.org$", "x[yz]$", r"^[^\d,]{1,4}$", r"^v1\.?$", "^[^,-]{1,3}$", "^[ -~]{1,6}$", r"^\[\d\]$", r"^\(.{1,4}\)$"]
COUNT, AT_ONCE = 200, 8
URL = os.environ["SARAI_URL"]
CLIENT = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=300)


def leaf(chosen):
    return chosen.choice(
        [
            lambda: {"type": "string", "maxLength": chosen.randint(1, 8)},
            lambda: {"type": "string", "minLength": 2, "maxLength": 4},
            lambda: {"type": "string", "pattern": chosen.choice(PATTERNS)},
            lambda: {"type": "string", "format": chosen.choice(["date", "time", "uuid", "email", "ipv4", "hostname", "duration"])},
            lambda: {"type": "integer", "minimum": chosen.randint(-20, 5), "maximum": chosen.randint(6, 300)},
            lambda: {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": chosen.randint(2, 40)},
            lambda: {"type": "boolean"},
            lambda: {"type": "null"},
            lambda: {"enum": chosen.sample(["low", "high", 3, 4.5, True, None, "ü\"q"], 3)},
            lambda: {"const": chosen.choice(["only", 7, False, {"a": [1]}])},
            lambda: {"type": ["integer", "null"]},
            lambda: {"type": "number"},
            lambda: {"type": "number", "minimum": 0, "maximum": chosen.choice([1, 0.5, 100, 2.75])},
            lambda: {"type": "number", "exclusiveMinimum": chosen.choice([-1, 0, 9.99])},
            lambda: {"type": ["number", "null"], "minimum": -90, "exclusiveMaximum": chosen.choice([-10, 0, 90])},
            lambda: {"type": "integer", chosen.choice(["minimum", "exclusiveMinimum"]): chosen.choice([100, 1900, 15])},
            lambda: {"type": "integer", chosen.choice(["maximum", "exclusiveMaximum"]): chosen.choice([0, -1, -100])},
            lambda: {"type": "integer", "minimum": 1, "maximum": 99, "multipleOf": chosen.choice([3, 5, 10])},
        ]
        if chosen.random() < 0.9
        # No grammar follows these.
        else [
            lambda: {"type": "number", "multipleOf": chosen.choice([0.5, 0.25, 7, 0.1]), "minimum": 0, "maximum": 50},
            lambda: {"type": "string", "pattern": "^(?=.)[a-z ]{1,9}", "maxLength": 40},
            lambda: {"type": "string", "pattern": r"^[^\x00-\x1f]{1,30}$"},
            lambda: {"type": "string", "not": {"maxLength": 1}, "maxLength": 9},
            lambda: {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 3, "uniqueItems": True},
            lambda: {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 1, "maxItems": 3, "contains": {"const": "a"}},
            lambda: {"type": "integer", "if": {"minimum": 10}, "then": {"maximum": 500}, "else": {"maximum": 5}},
            lambda: {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 40}, {"type": "integer", "minimum": 30, "maximum": 90}]},
            lambda: {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 2},
        ]
    )()


def schema(chosen, depth=0):
    kind = chosen.choice(["object", "object", "array", "union", "tuple", "leaf"]) if depth < 2 else "leaf"
    inner = lambda: schema(chosen, depth + 1)
    match kind:
        case "object":
            names = chosen.sample(["name", "size", "tags", "when", "a b", "größe", "x-1"], chosen.randint(1, 3))
            required = chosen.sample(names, chosen.randint(0, len(names)))
            made = {"type": "object", "properties": {name: inner() for name in names}, "required": required}
            return made | {"additionalProperties": chosen.choice([False, False, True, {"type": "integer"}])}
        case "array":
            least = chosen.randint(0, 2)
            made = {"type": "array", "items": inner(), "minItems": least, "maxItems": least + chosen.randint(0, 2)}
            return made | ({"uniqueItems": True} if chosen.random() < 0.1 else {})
        case "tuple":
            return {"type": "array", "prefixItems": [inner(), inner()], "items": False}
        case "union":
            return {"anyOf": [inner(), inner()]}
        case _:
            return leaf(chosen)


def top(seed):
    chosen = random.Random(seed)
    if chosen.random() < 0.2:
        # A reference, and one to itself.
        node = {"type": "object", "properties": {"value": leaf(chosen), "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
        node |= {"required": ["value", "next"], "additionalProperties": False}
        return {"$defs": {"node": node}, "type": "object", "properties": {"list": {"$ref": "#/$defs/node"}}, "required": ["list"]}
    kind = chosen.random()
    short = lambda: {"type": "integer", "minimum": 0, "maximum": chosen.randint(1, 99)}
    if kind < 0.1:
        # All of several.
        parts = [{"type": "object", "properties": {name: short()}, "required": [name]} for name in ("a", "b", "c")[: chosen.randint(2, 3)]]
        return {"allOf": parts}
    if kind < 0.2:
        # One of several, told apart by a constant.
        one = lambda name: {"type": "object", "properties": {"kind": {"const": name}, name: short()}, "required": ["kind", name], "additionalProperties": False}
        return {"oneOf": [one(name) for name in ("circle", "square", "line")[: chosen.randint(2, 3)]]}
    if kind < 0.3:
        # Whatever of many.
        made = {"type": "object", "properties": {f"p{n}": short() for n in range(chosen.randint(6, 14))}, "additionalProperties": False}
        return made | {"required": chosen.sample(list(made["properties"]), 2)}
    if kind < 0.34:
        # No grammar follows it.
        return {"type": "object", "properties": {"value": {"not": {"type": "string"}}}, "required": ["value"]}
    made = schema(chosen)
    return made if made.get("type") == "object" else {"type": "object", "properties": {"value": made}, "required": ["value"]}


LIMIT = 40


def whole(messages, wanted, seed):
    answer = CLIENT.chat.completions.create(**asked(messages, wanted, seed))
    choice = answer.choices[0]
    return choice.message.content, choice.finish_reason, answer.usage.completion_tokens, answer.sarai["degraded"]


def streamed(messages, wanted, seed):
    text, finish, tokens, lost = "", None, 0, None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in CLIENT.chat.completions.create(**asked(messages, wanted, seed), **options):
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = finish or choice.finish_reason
        lost = lost if lost is not None else (getattr(chunk, "sarai", None) or {}).get("degraded")
    return text, finish, tokens, lost


def by_ollamas(messages, wanted, seed):
    options = {"temperature": 0.8, "seed": seed, "num_predict": LIMIT}
    body = {"model": "plain", "messages": messages, "format": wanted, "options": options, "stream": False}
    answer = httpx.post(f"{URL}/api/chat", json=body, timeout=300)
    if answer.status_code == 400:
        raise Refused(answer.json()["error"])
    answer = answer.raise_for_status().json()
    return answer["message"]["content"], answer["done_reason"], answer["eval_count"], answer["sarai"]["degraded"]


class Refused(Exception):
    """As Ollama's API says so."""


def asked(messages, wanted, seed):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted}}
    return {"model": "plain", "messages": messages, "temperature": 0.8, "seed": seed, "max_tokens": LIMIT, "response_format": form}


def ask(seed):
    wanted = top(seed)
    messages = [{"role": "user", "content": "Fill in the form with something short."}]
    try:
        text, finish, tokens, lost = (whole, streamed, by_ollamas)[seed % 3](messages, wanted, seed)
    except (openai.APIError, Refused) as error:
        # A stream that had begun to wait says so in an event.
        if getattr(error, "code", None) == "json_validate_failed" or "each broke its schema" in str(error):
            return "broken"
        assert "#/" in str(error), f"{wanted}: {error}"
        return "refused"
    if finish == "length":
        assert tokens == LIMIT, "it was cut before its limit"
        return "cut"
    assert finish == "stop", finish
    assert lost == [], f"{wanted}: {lost}"
    validator = jsonschema.Draft202012Validator(wanted, format_checker=jsonschema.FormatChecker())
    assert validator.is_valid(json.loads(text)), f"{wanted}: {text}"
    return "valid"


def main():
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = list(pool.map(ask, range(COUNT)))
    counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    print(f"{len(outcomes)} schemas: {counts}")
    # Those that were cut or refused prove nothing. How many are cut differs from run to run, since text in company does: usually 80.
    assert counts.get("valid", 0) >= 2 * COUNT // 5, counts
    assert counts.get("refused", 0) <= 4 and counts.get("broken", 0) <= COUNT // 20, counts


main()
