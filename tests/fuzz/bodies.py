"""Hostile bodies for every route that reads one, made of the schemas that the OpenAPI document shows.

A route's smallest valid body is taken, and one of its values, at any depth, replaced by JSON that grows: what is wrong
there, or right but very much. What a body is made of has a name, so that it can be made again in any size.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

NO_BODY = {"/admin/keys/{key_id}/rotate", "/v1/responses/{response_id}/cancel"}
"""Routes for POST that read none."""
CONVERSATIONS = {"/v1/chat/completions", "/v1/responses", "/v1/messages"}
"""Routes that serve models with agents."""

_SAID = {"messages", "input", "system", "instructions", "shannon_options"}

_EXAMPLES: dict[str, Any] = {
    "ChatMessage": {"role": "user", "content": "hi"},
    "ContentPart": {"type": "text", "text": "hi"},
    "InputItem": {"role": "user", "content": "hi"},
    "InputPart": {"type": "input_text", "text": "hi"},
    "InputMessage": {"role": "user", "content": "hi"},
    "Block": {"type": "text", "text": "hi"},
    "ResultBlock": {"type": "text", "text": "hi"},
    "StructuredOutputs": {"regex": "a"},
    "ImageSource": {"type": "url", "url": "data:image/png;base64,"},
}
"""Of schemas whose rules JSON schema can't tell, or tells in a way of its own."""
_HOLE = "@hole@"
_MAX_DEPTH = 7
Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """A route that reads a body, its document, and the name of its schema in there."""

    path: str
    schema: str
    schemas: dict[str, Any]
    model: str = ""
    """Named in each body; the default model where empty."""

    def places(self) -> list[tuple[Path, dict[str, Any]]]:
        """Return where a value of the body may stand, each with its schema."""
        return [((), {"$ref": f"#/components/schemas/{self.schema}"}), *self._below((), self.schemas[self.schema])]

    def _below(self, path: Path, schema: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
        if len(path) >= _MAX_DEPTH:
            return
        for variant in self.variants(schema):
            for name, inner in variant.get("properties", {}).items():
                yield (*path, name), inner
                yield from self._below((*path, name), inner)
            if "items" in variant:
                yield (*path, 0), variant["items"]
                yield from self._below((*path, 0), variant["items"])

    def variants(self, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield what a schema may stand for, references followed."""
        if "$ref" in schema:
            schema = self.schemas[schema["$ref"].rpartition("/")[2]]
        yield schema
        for variant in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
            if "$ref" in variant or "items" in variant or "type" in variant:
                yield from self.variants(variant)

    def example(self, schema: dict[str, Any]) -> Any:
        """Return a small value that a schema allows."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return _EXAMPLES[name] if name in _EXAMPLES else self.example(self.schemas[name])
        for key in ("const", "default"):
            if schema.get(key) is not None:
                return schema[key]
        if "enum" in schema:
            return schema["enum"][0]
        kind = schema.get("type")
        if kind is None:
            variants = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
            return self.example(variants[0]) if variants else "hi"
        if kind == "object":
            properties = schema.get("properties", {})
            return {name: self.example(properties[name]) for name in schema.get("required", ())}
        if kind == "array":
            return [self.example(schema["items"])] * schema.get("minItems", 0)
        return {"string": "hi", "integer": schema.get("minimum", 1), "number": 1, "boolean": True}.get(kind)

    def around(self, path: Path) -> tuple[bytes, bytes]:
        """Return what stands before and behind a place of the smallest valid body."""
        whole = self._filled(path, {"$ref": f"#/components/schemas/{self.schema}"})
        if self.model and path and path[0] != "model":
            whole = {"model": self.model} | whole
        before, _, behind = json.dumps(whole).partition(f'"{_HOLE}"')
        return before.encode(), behind.encode()

    def _filled(self, path: Path, schema: dict[str, Any]) -> Any:
        if not path:
            return _HOLE
        step, *rest = path
        for variant in self.variants(schema):
            with contextlib.suppress(KeyError):  # another variant has it
                if isinstance(step, int):
                    return [self._filled(tuple(rest), variant["items"])]
                filled = self._filled(tuple(rest), variant["properties"][step])
                value = self.example(schema)
                return (value if isinstance(value, dict) else self.example(variant)) | {step: filled}
        raise KeyError(path)


@dataclass(frozen=True, slots=True)
class HostileBody:
    """A body for a route, of any size."""

    route: Route
    place: Path
    filling: str
    make: Callable[[int], bytes]
    before: bytes = b""
    behind: bytes = b""

    def __str__(self) -> str:
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.place)
        model = f" to {self.route.model}" if self.route.model else ""
        return f"POST {self.route.path} {place.lstrip('.') or 'body'} <- {self.filling}{model}"

    @property
    def is_said(self) -> bool:
        """Whether it is in what agents read."""
        return bool(self.place) and self.place[0] in _SAID

    def of(self, size: int) -> bytes:
        """Return the body, of about `size` bytes, never more."""
        return self.before + self.make(size - len(self.before) - len(self.behind)) + self.behind


def routes_of(app: FastAPI) -> list[Route]:
    """Return all routes that read a body. Raises AssertionError on one that nobody knows how to fill."""
    schemas = app.openapi()["components"]["schemas"]
    routes = [route for route in app.routes if isinstance(route, APIRoute) and route.methods & {"POST", "PUT", "PATCH"}]
    documents = {
        route.endpoint: route.openapi_extra["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for route in routes
        if route.openapi_extra
    }
    found = []
    for route in routes:
        if route.path not in NO_BODY:
            assert route.endpoint in documents, f"{route.path} does not tell which body it reads; see NO_BODY"
            found.append(Route(route.path, documents[route.endpoint].rpartition("/")[2], schemas))
    return found


def bodies_for(route: Route) -> list[HostileBody]:
    """Return every hostile body for a route."""
    bodies: list[HostileBody] = []
    for place, schema in route.places():
        before, behind = route.around(place)
        fillings = dict(FILLINGS)
        for variant in route.variants(schema):
            if "items" in variant:
                item = json.dumps(route.example(variant["items"])).encode()
                fillings["items"] = _listed(item)
                if item.startswith(b"{"):
                    fillings["items_with_more"] = _listed(item[:-1] + b',"more":[1,[]]}')
        bodies += [HostileBody(route, place, name, make, before, behind) for name, make in fillings.items()]
    return bodies


def sample(routes: list[Route], rng: random.Random, count: int) -> list[HostileBody]:
    """Return so many hostile bodies, spread over all routes."""
    bodies: list[HostileBody] = []
    while len(bodies) < count:
        for route in rng.sample(routes, len(routes)):
            bodies.append(rng.choice([body for body in bodies_for(route) if not route.model or body.is_said]))
    return bodies[:count]


def for_models(routes: list[Route], models: Iterable[str]) -> list[Route]:
    """Return the routes of conversations, once for each of the models."""
    return [replace(route, model=model) for route in routes if route.path in CONVERSATIONS for model in models]


def _list(item: bytes, size: int) -> bytes:
    return b"[" + b",".join([item] * max(1, (size - 2) // (len(item) + 1))) + b"]"


def _listed(item: bytes) -> Callable[[int], bytes]:
    return lambda size: _list(item, size)


def _wide(value: bytes) -> Callable[[int], bytes]:
    """Return what makes an object of very many different fields."""

    def make(size: int) -> bytes:
        count = max(1, (size - 2) // (len(value) + 10))
        return b"{" + b",".join(b'"%06x":%b' % (number, value) for number in range(count)) + b"}"

    return make


def _same_name(size: int) -> bytes:
    return b"{" + b",".join([b'"a":[]'] * max(1, (size - 2) // 7)) + b"}"


def _different_names(size: int) -> bytes:
    count = max(1, (size - 2) // 18)
    return b"[" + b",".join(b'{"%06x":"ab"}' % number for number in range(count)) + b"]"


def _lists_of(item: bytes, length: int) -> Callable[[int], bytes]:
    return lambda size: _list(_list(item, length * (len(item) + 1)), size)


def _text(unit: bytes) -> Callable[[int], bytes]:
    return lambda size: b'"' + unit * max(0, (size - 2) // len(unit)) + b'"'


def _deep(opening: bytes, closing: bytes, depth: int) -> Callable[[int], bytes]:
    """Return what makes nested values, of a fixed depth, or as deep as they can be with depth 0."""

    def make(size: int) -> bytes:
        levels = depth or size // (len(opening) + len(closing)) - 1
        one = opening * levels + b"1" + closing * levels
        return _list(one, size) if depth else one

    return make


FILLINGS: dict[str, Callable[[int], bytes]] = {
    "ints": _listed(b"1"),
    "large_ints": _listed(b"1000000"),
    "negative_floats": _listed(b"-1.5"),
    "nulls": _listed(b"null"),
    "empty_lists": _listed(b"[]"),
    "empty_objects": _listed(b"{}"),
    "empty_strings": _listed(b'""'),
    "short_strings": _listed(b'"ab"'),
    "objects": _listed(b'{"a":1}'),
    "messages": _listed(b'{"role":"user","content":"hi"}'),
    "silent_messages": _listed(b'{"role":"user","content":[]}'),
    "messages_of_parts": _listed(
        b'{"role":"user","content":' + _list(b'{"type":"text","text":"hello again, my friend"}', 40_000) + b"}"
    ),
    "messages_of_ints": _listed(b'{"role":"user","content":' + _list(b"1", 2048) + b"}"),
    "messages_of_calls": _listed(
        b'{"role":"assistant","tool_calls":'
        + _list(b'{"id":"call_0123","type":"function","function":{"name":"f","arguments":"{}"}}', 2000)
        + b"}"
    ),
    "messages_of_uses": _listed(
        b'{"role":"assistant","content":'
        + _list(b'{"type":"tool_use","id":"call_0123","name":"f","input":{}}', 9000)
        + b"}"
    ),
    "outputs": _listed(b'{"type":"function_call_output","call_id":"call_0123","output":"it is as it is"}'),
    "assistants": _listed(b'{"role":"assistant","content":"' + b"word " * 400 + b'"}'),
    "calls": _listed(b'{"type":"function_call","call_id":"call_0123","name":"f","arguments":"{}"}'),
    "lists_of_ints": _lists_of(b"1", 1000),
    "lists_of_lists": _lists_of(b"[]", 1000),
    "wide": _wide(b"1"),
    "wide_strings": _wide(b'"ab"'),
    "wide_objects": _wide(b"{}"),
    "same_name": _same_name,
    "different_names": _different_names,
    "text": _text(b"x"),
    "words": _text(b"a "),
    "short_words": _text(b"abcd "),
    "hosts": lambda size: b'"' + b" ".join(b"%06x.io" % number for number in range(max(0, (size - 2) // 10))) + b'"',
    "mails": lambda size: b'"' + b" ".join(b"%06x@io" % number for number in range(max(0, (size - 2) // 10))) + b'"',
    "urls": lambda size: b'"' + b" ".join(b"http://a.io/%06x" % n for n in range(max(0, (size - 2) // 19))) + b'"',
    "numbers": lambda size: b'"' + b" ".join(b"%d" % number for number in range(max(0, (size - 2) // 8))) + b'"',
    "emphasis": _text(b"*a"),
    "links": _text(b"[a](http://a.io) "),
    "markers": _text(b"[1] "),
    "thoughts": _text(b"<think>"),
    "tables": _text(b"|a|b\\n"),
    "sources": lambda size: b'"a\\n\\n## Sources' + b"\\n\\n[1] a" * max(0, (size - 20) // 9) + b'"',
    "hidden": _text("\u200b".encode()),
    "emoji": lambda size: '"😀'.encode() + b"x" * max(0, size - 6) + b'"',
    "chinese": _text("字".encode()),
    "escapes": _text(b"\\u0041"),
    "quotes": _text(b'\\"'),
    "backslashes": _text(b"\\\\"),
    "brackets_in_text": _text(b'[{\\"a\\":'),
    "surrogates": _text(b"\\ud800"),
    "digits": lambda size: b"1" * size,
    "exponent": lambda size: b"1e" + b"9" * (size - 2),
    "fraction": lambda size: b"0." + b"1" * (size - 2),
    "spaces": lambda size: b" " * (size - 1) + b"1",
    "depth_100": _deep(b"[", b"]", 100),
    "depth_200": _deep(b'{"a":', b"}", 200),
    "depth_300": _deep(b'{"a":', b"}", 300),
    "depth_1000": _deep(b"[", b"]", 1000),
    "bottomless": _deep(b"[", b"]", 0),
    "bottomless_objects": _deep(b'{"a":', b"}", 0),
    "unclosed": lambda size: b"[" * size,
    "unclosed_text": lambda size: b'"' + b"x" * (size - 1),
    "nan": _listed(b"NaN"),
    "nothing": lambda size: b",".join([b""] * size),
}
