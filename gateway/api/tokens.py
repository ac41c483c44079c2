"""POST /tokenize and /detokenize, in vLLM's form: exact counts before anything is generated.

Each counts as a request that costs no tokens. Also under /v1.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends
from pydantic import Field, model_validator
from starlette.responses import Response

from engine.base import GenerationRequest
from gateway.api.call import Call, call
from gateway.api.chat_schema import Messages, check_role
from gateway.api.completions import Text, TokenIds
from gateway.api.function_calling import Tools
from gateway.api.schema import JsonBody, Schema
from gateway.errors import BadRequest
from gateway.images import inlined

router = APIRouter()


class TokenizeRequest(Schema):
    model: Annotated[str, Field(max_length=256)] | None = None
    """Model id; the server's default when left out."""
    prompt: Text | None = None
    """Bare text; or else `messages`."""
    messages: Messages | None = None
    """A conversation, put through the chat template."""
    tools: Tools | None = None

    @model_validator(mode="after")
    def _must_be_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise BadRequest("Send either 'prompt' or 'messages'.", "prompt")
        for number, message in enumerate(self.messages or ()):
            check_role(message, f"messages[{number}]")
        return self

    def for_engine(self, request_id: str) -> GenerationRequest:
        return GenerationRequest(
            request_id=request_id,
            prompt=self.prompt,
            messages=[message.for_engine() for message in self.messages or ()],
            tools=[tool.for_engine() for tool in self.tools] if self.tools else None,
        )


class DetokenizeRequest(Schema):
    model: Annotated[str, Field(max_length=256)] | None = None
    """Model id; the server's default when left out."""
    tokens: TokenIds


TOKENIZE = JsonBody(TokenizeRequest)
DETOKENIZE = JsonBody(DetokenizeRequest)


@router.post("/tokenize", response_class=Response, openapi_extra=TOKENIZE.openapi)
@router.post("/v1/tokenize", response_class=Response, include_in_schema=False)
async def tokenize(call: Annotated[Call, Depends(call)]) -> Response:
    """Return the token ids of a text or a conversation."""
    body = await call.read(TOKENIZE)
    meter = call.meter(f"tok-{secrets.token_hex(16)}", await call.admit(body.model))

    async def chunks() -> AsyncGenerator[bytes, None]:
        request = await inlined(body.for_engine(meter.request_id), meter, call.services.images)
        tokens = await meter.tokenize(request)
        limit = meter.model.engine.max_model_len
        yield orjson.dumps({"count": len(tokens), "max_model_len": limit, "tokens": tokens})

    return call.send(chunks(), meter, streamed=False)


@router.post("/detokenize", response_class=Response, openapi_extra=DETOKENIZE.openapi)
@router.post("/v1/detokenize", response_class=Response, include_in_schema=False)
async def detokenize(call: Annotated[Call, Depends(call)]) -> Response:
    """Return the text of token ids."""
    body = await call.read(DETOKENIZE)
    meter = call.meter(f"tok-{secrets.token_hex(16)}", await call.admit(body.model))

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield orjson.dumps({"prompt": await meter.detokenize(body.tokens)})

    return call.send(chunks(), meter, streamed=False)
