"""POST /v1/embeddings: texts to vectors, as floats or as base64 of little-endian float32."""

from __future__ import annotations

import array
import asyncio
import base64
import secrets
import sys
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends
from pydantic import Field, Tag, model_validator
from starlette.responses import Response

from engine.base import EmbeddingRequest
from gateway.api.call import Call, call
from gateway.api.completions import BY_SHAPE, Prompt, Text, TokenIds, check_ids
from gateway.api.schema import JsonBody, Schema
from gateway.meter import Meter

router = APIRouter()

MAX_INPUTS = 2048
"""OpenAI's bound."""


class EmbeddingBody(Schema):
    model: Annotated[str, Field(max_length=256)] | None = None
    """Model id; the server's default when left out."""
    input: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[TokenIds, Tag("tokens")]
        | Annotated[list[Prompt], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS), Tag("several")],
        BY_SHAPE,
    ]
    """Text or token ids, or a list of either: one vector each."""
    encoding_format: Literal["float", "base64"] | None = None
    """`float` when left out."""
    dimensions: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Length of the vectors, where the model was trained for it."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Accepted for compatibility; the API key identifies the caller."""

    @model_validator(mode="after")
    def _must_be_within_limits(self) -> EmbeddingBody:
        check_ids(self.inputs, "input")
        return self

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]  # all are ints then
        return self.input


BODY = JsonBody(EmbeddingBody)


@router.post(
    "/v1/embeddings",
    response_class=Response,
    openapi_extra=BODY.openapi,
)
async def create_embedding(call: Annotated[Call, Depends(call)]) -> Response:
    """Turn texts into vectors."""
    body = await call.read(BODY)
    model = await call.admit(body.model)
    request_id = f"embd-{secrets.token_hex(16)}"
    meter = call.meter(request_id, model)
    request = EmbeddingRequest(request_id=request_id, inputs=body.inputs, dimensions=body.dimensions)
    return call.send(_embed(request, meter, as_base64=body.encoding_format == "base64"), meter, streamed=False)


async def _embed(request: EmbeddingRequest, meter: Meter, *, as_base64: bool) -> AsyncGenerator[bytes, None]:
    vectors = await meter.pool(await meter.prepare(request))
    usage = {"prompt_tokens": meter.usage.prompt_tokens, "total_tokens": meter.usage.prompt_tokens}
    rest: dict[str, Any] = {"model": meter.model.id, "usage": usage}
    yield await asyncio.to_thread(_encode, vectors, rest, as_base64)


def _encode(vectors: list[list[float]], rest: dict[str, Any], as_base64: bool) -> bytes:
    """Return the body, encoded vector by vector: orjson lets no other thread run meanwhile."""
    rows = []
    for index, vector in enumerate(vectors):
        embedding = _base64(vector) if as_base64 else vector
        rows.append(orjson.dumps({"object": "embedding", "index": index, "embedding": embedding}))
    return b'{"object":"list","data":[' + b",".join(rows) + b"]," + orjson.dumps(rest)[1:]


def _base64(vector: list[float]) -> str:
    values = array.array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()
