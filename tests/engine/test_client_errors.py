"""What clients send can be served or is refused in words for them: never a defect, and never Python.

Rendering and vLLM's own checks run without a core, for text and with images. A defect stays a defect.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.base import EngineError, GenerationRequest, InvalidRequest
from engine.local.client_errors import client_errors
from tests.support.engine.headless import Headless
from tests.support.engine.tekken import build_checkpoint as build_mistral
from tests.support.engine.vision import build_checkpoint as build_vision
from tests.support.pictures import asking, data_url, image_part, picture

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

HI: list[Any] = [{"role": "user", "content": "hi"}]
PYTHON = (
    "Traceback",
    " at 0x",
    "<class",
    "NoneType",
    "object has no",
    "Error:",
    "Error(",
    "expected str",
    "self.",
    ".py",
    "add_generation_prompt",
    "continue_final_message",
)
"""What no client is told: Python's words, and parameters that only the server sets."""


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


SCHEMAS: list[Any] = [
    {},
    {"type": []},
    {"type": 5},
    {"properties": 5},
    {"properties": {"a": 5}},
    {"$ref": "#"},
    {"$ref": "#/nowhere"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "array", "items": 5},
    {"enum": []},
    {"enum": 5},
    {"const": float("inf")},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "(?=a)"},
    {"type": "string", "maxLength": 10**12},
    {"type": "string", "minLength": -1},
    {"type": "string", "format": "nope"},
    {"type": "integer", "minimum": "x"},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"anyOf": []},
    {"anyOf": 5},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"not": {}},
    {"type": "object", "required": 5},
    {"type": "object", "required": ["x"]},
    {"type": "object", "additionalProperties": 5},
    {"type": "object", "patternProperties": {"(": {}}},
    {"type": "object", "properties": {"\x00": {}}},
    nested(30),
    nested(66),
]
ARGUMENTS = (
    "", "{}", "{", "[1]", "null", "5", '"x"', "\x00", "[" * 50_000, '{"a":' * 5000 + "1" + "}" * 5000, '{"a": NaN}',
    '{"a": 1e999}', '{"a":' + "9" * 5000 + "}", '{"a": "\\ud800"}', '{"\\udfff": 1}',
    '{"a": "\\\\ud800 \\ud83d\\ude00"}',
)  # fmt: skip


def hostile_requests() -> Iterator[dict[str, Any]]:
    """Yield fields of requests, each odd in one place."""
    for schema in SCHEMAS:
        for strict in (False, True):
            function: dict[str, Any] = {"name": "f", "parameters": schema}
            if strict:
                function["strict"] = True
            tools = [{"type": "function", "function": function}]
            for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}}):
                yield {"tools": tools, "tool_choice": choice}
        yield {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        yield {"structured_outputs": {"json": schema}}
    for regex in ("", "(", "a{1000000}", "(?=a)", "[", "\\p{L}", "\x00", "(?P<x>a)(?P=x)", "(?i)x", ".*" * 200):
        yield {"structured_outputs": {"regex": regex}}
    for grammar in (
        "",
        "root ::=",
        "root ::= x",
        "root ::= root",
        'start: "a"',
        "?start: expr",
        "root ::= [",
        "x" * 9999,
    ):
        yield {"structured_outputs": {"grammar": grammar}}
    for choices in ([], [""], ["\x00"], ["a\nb", '"', "\\"], ["a"] * 500):
        yield {"structured_outputs": {"choice": choices}}
    for biased in ("9999999", "-1", "x", "", "1.5", str(2**70)):
        yield {"logit_bias": {biased: 1.0}}
    for token in (-1, 10**6, 2**31, 2**70):
        yield {"stop_token_ids": [token]}
        yield {"prompt": [token]}
    for name, values in {
        "stop": ([""], ["\x00"], ["a"] * 500),
        "temperature": (-1.0, float("nan"), 1e308),
        "top_p": (0.0, 2.0, float("nan")),
        "top_k": (-5, 2**40),
        "min_p": (2.0,),
        "presence_penalty": (9.0,),
        "frequency_penalty": (float("inf"),),
        "repetition_penalty": (0.0, float("inf")),
        "seed": (2**70, -(2**70), -1),
        "min_tokens": (-1, 10**9),
        "n": (0, -1, 10**6),
        "top_logprobs": (10**6, -1),
        "max_tokens": (-1, 2**70),
        "reasoning_effort": ("nope", ""),
        "prompt": ("", [], "\x00", "x" * 50_000),
    }.items():
        for value in values:
            yield {name: value, "logprobs": name == "top_logprobs"}
    for message in (
        {"role": "user", "content": ""},
        {"role": "user", "content": "\x00"},
        {"role": "user", "content": "\ud800"},
        {"role": "user", "content": "x" * 50_000},
        {"role": "user", "content": []},
        {"role": "system", "content": "x"},
        {"role": "assistant", "content": "x"},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
    ):
        yield {"messages": [message]}
        yield {"messages": [*HI, message]}
    for arguments in ARGUMENTS:
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
        called = {"role": "assistant", "content": None, "tool_calls": [call]}
        yield {"messages": [*HI, called, {"role": "tool", "tool_call_id": "a", "content": "r"}, *HI]}


async def check(engine: Headless, fields: dict[str, Any]) -> str | None:
    """Render a request and have vLLM check it. Returns why it is refused, if it is; only a client's errors are."""
    try:
        await engine.render(GenerationRequest(**{"request_id": "r", "messages": HI} | fields))
    except InvalidRequest as error:
        words = str(error)
    else:
        return None
    assert not any(word in words for word in PYTHON), (fields, words)
    assert len(words) < 1200
    return words


@pytest.fixture(scope="module", params=["xgrammar", "guidance", "mistral"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Headless:
    if request.param == "mistral":
        folder = build_mistral(tmp_path_factory.mktemp("mistral"), "v13")
        args = {"max_model_len": 4096, "tokenizer_mode": "mistral"}
        return Headless(folder, args, tool_parser="mistral", reasoning_parser="mistral")
    return Headless("demo", {"max_model_len": 2048, "structured_outputs_config": {"backend": request.param}})


async def test_odd_requests_are_served_or_refused_in_words_for_clients(engine: Headless) -> None:
    failures = []
    refused = 0
    for fields in hostile_requests():
        try:
            refused += await check(engine, fields) is not None
        except EngineError as error:
            failures.append((fields, error.__cause__))
    assert not failures
    assert refused > 50


async def test_half_a_surrogate_pair_in_a_call_of_the_past_is_replaced(engine: Headless) -> None:
    """A model may write one, and its own call must be fit to be sent back."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS[-1]}}
    half = call | {"function": {"name": "f", "arguments": '{"a": "\\uD800"}'}}
    messages: list[Any] = [*HI, {"role": "assistant", "content": "", "tool_calls": [call, half]}]
    messages += [{"role": "tool", "tool_call_id": "abcdefghi", "content": "r"}] * 2
    if engine.tokenizer.__class__.__name__ == "MistralTokenizer":
        pytest.skip("keeps the arguments as they were")
    tokens = await engine.renderer.tokenize(GenerationRequest(request_id="r", messages=messages))
    text = await engine.renderer.detokenize(tokens)
    assert "\\ud800" not in text.replace("\\\\ud800", "")
    assert "\N{GRINNING FACE}" in text


def image(mode: str, kind: str, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has next to no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


FILES = {
    "empty": b"",
    "text": b"hello",
    "svg": b"<svg/>",
    "cut head": picture()[:40],
    "cut end": picture()[:-20],
    "bomb": png_of(60_000, 60_000),
    "huge": png_of(14_000, 14_000),
    "no size": png_of(0, 0),
    "wide": image("RGB", "PNG", (5000, 1)),
    "one pixel": image("RGB", "PNG", (1, 1)),
    **{f"{mode} {kind}": image(mode, kind) for mode, kind in (
        ("CMYK", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("I;16", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"),
        ("F", "TIFF"), ("RGB", "BMP"), ("RGB", "WEBP"),
    )},
}  # fmt: skip


@pytest.fixture(scope="module")
def sighted(tmp_path_factory: pytest.TempPathFactory) -> Headless:
    checkpoint = build_vision(tmp_path_factory.mktemp("vision") / "checkpoint")
    return Headless(checkpoint, {"max_model_len": 1024, "limit_mm_per_prompt": {"image": 2}})


async def test_odd_images_are_seen_or_refused_in_words_for_clients(sighted: Headless) -> None:
    outcomes = {name: await check(sighted, {"messages": asking(data_url(file))}) for name, file in FILES.items()}
    for name in ("empty", "text", "svg", "cut head", "bomb", "huge"):
        assert outcomes[name] is not None, name
    assert outcomes["one pixel"] is None
    for media_type in ("image/jpeg", "text/plain", "", "image/svg+xml", "audio/wav", "video/mp4"):
        await check(sighted, {"messages": asking(data_url(picture(), media_type))})
    for url in ("data:", "data:,", "data:image/png;base64", "data:image/png;base64,!!!", "data:image/png,xx", "x:y"):
        assert await check(sighted, {"messages": asking(url)}), url
    assert await check(sighted, {"messages": asking(*[data_url(picture())] * 3)}), "three are too many"
    for text in ("<image>", "<fake_token_around_image>", "<row_1_col_1>"):
        await check(sighted, {"messages": [{"role": "user", "content": text}]})
        parts = [{"type": "text", "text": text}, image_part(data_url(picture()))]
        await check(sighted, {"messages": [{"role": "user", "content": parts}]})
        await check(sighted, {"prompt": text})


TEMPLATES = {
    "{{ raise_exception('Say please. ' * 500) }}": "The model's chat template refuses this: Say please.",
    "{{ messages[0].content + 5 }}": "The model's chat template can't render these messages.",
    "{{ messages[0].nothing.at.all }}": "The model's chat template can't render these messages.",
    "{{ messages[7].content }}": "The model's chat template can't render these messages.",
    "{{ messages[0].content | int / 0 }}": "The model's chat template can't render these messages.",
}


@pytest.mark.parametrize("template", TEMPLATES)
async def test_what_a_chat_template_refuses_is_told_in_its_own_words(template: str, tmp_path: Path) -> None:
    engine = Headless("demo", {"max_model_len": 2048}, tool_parser="", reasoning_parser="")
    engine.renderer._renderer.chat_template = template

    message = await check(engine, {})

    assert message is not None
    assert message.startswith(TEMPLATES[template])
    assert len(message) < 600


@pytest.mark.parametrize(
    "defect",
    [
        TypeError("f() got an unexpected keyword"),
        ValueError("x"),
        KeyError("x"),
        AttributeError("x"),
        RuntimeError("x"),
    ],
    ids=lambda defect: type(defect).__name__,
)
def test_defect_is_not_the_clients(defect: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """Of whatever type it is: the client gets no detail, the log gets all of it, once."""
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            with pytest.raises(EngineError) as failure, client_errors():
                raise defect

    assert not isinstance(failure.value, InvalidRequest)
    assert str(defect) not in str(failure.value)
    assert len([record for record in caplog.records if record.exc_info]) <= 1


async def test_defect_of_vllm_is_not_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Headless("demo", {"max_model_len": 2048})

    async def render_chat(*_: Any, **__: Any) -> Any:
        raise ValueError("internal")

    monkeypatch.setattr(engine.renderer._renderer, "render_chat", render_chat)
    with pytest.raises(EngineError) as failure:
        await engine.render(GenerationRequest(request_id="r", messages=HI))
    assert not isinstance(failure.value, InvalidRequest)
