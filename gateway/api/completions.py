"""POST /v1/completions: OpenAI's legacy protocol, a plain prompt without a chat template."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Discriminator, Field, Tag, ValidationError, WrapValidator, model_validator
from starlette.responses import Response

from engine.base import GenerationRequest
from gateway.api.call import Call, call
from gateway.api.generation_schema import CompletionFields, refuse_not_offered
from gateway.api.sampling import accepts_sampling
from gateway.api.schema import JsonBody
from gateway.errors import BadRequest
from gateway.exchange.frames.completions import CompletionFrames
from gateway.settings.config import DefaultSettings
from gateway.workflows.complete import complete

router = APIRouter()

MAX_PROMPTS = 64
MAX_CHOICES = 128
"""Over all prompts of a request."""
_NOT_OFFERED = {"suffix": "insertion", "prompt_embeds": "prompt embeddings"}

Text = Annotated[str, Field(min_length=1)]
MAX_IDS = 1_048_576
"""Token ids per request; the default of `server.max_body_bytes` allows for as many."""
_PIECE_IDS = 65_536


def _check_in_pieces(token_ids: Any, check: Callable[[Any], Any]) -> Any:
    """Validate a long list in pieces so that other threads can run: pydantic holds the GIL for 60 ms for all of it."""
    if isinstance(token_ids, list) and _PIECE_IDS < len(token_ids) <= MAX_IDS:
        try:
            for start in range(0, len(token_ids), _PIECE_IDS):
                check(token_ids[start : start + _PIECE_IDS])
        except ValidationError:
            return check(token_ids)  # for the index in the whole list
        return token_ids
    return check(token_ids)


TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]],
    Field(fail_fast=True, min_length=1, max_length=MAX_IDS),
    WrapValidator(_check_in_pieces),
]


def _shape(value: Any) -> str | None:
    """Return which kind of prompt the client means, so that errors are about that kind alone."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    return "tokens" if value and isinstance(value[0], (int, float)) else "several"


BY_SHAPE = Discriminator(
    _shape, custom_error_type="shape", custom_error_message="must be text or an array of token ids"
)
Prompt = Annotated[Annotated[Text, Tag("text")] | Annotated[TokenIds, Tag("tokens")], BY_SHAPE]


def check_ids(prompts: list[str | list[int]], param: str) -> None:
    """Raise BadRequest if the prompts have more than MAX_IDS token ids together."""
    if sum(len(prompt) for prompt in prompts if isinstance(prompt, list)) > MAX_IDS:
        raise BadRequest(f"Invalid value for {param!r}: it must have at most {MAX_IDS} token ids.", param)


@accepts_sampling("completions")
class CompletionRequest(CompletionFields):
    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[TokenIds, Tag("tokens")]
        | Annotated[list[Prompt], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("several")],
        BY_SHAPE,
    ]
    """Text or token ids, or a list of either: one completion each."""
    echo: bool | None = None
    """Return the prompt before the generated text."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Number of most likely alternatives to return per token."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_not_offered(cls, data: Any) -> Any:
        refuse_not_offered(data, _NOT_OFFERED)
        return data

    @model_validator(mode="after")
    def _check_size(self) -> CompletionRequest:
        if len(self.prompts) * self.choices > MAX_CHOICES:
            raise BadRequest(f"A request can have at most {MAX_CHOICES} choices over all its prompts.", "n")
        check_ids(self.prompts, "prompt")
        if self.echo and self.logprobs is not None:
            raise BadRequest(
                "'echo' can't be combined with 'logprobs': log probabilities of the prompt are not offered.", "echo"
            )
        if self.echo and any(not isinstance(prompt, str) for prompt in self.prompts):
            raise BadRequest("'echo' requires the prompt as text.", "echo")
        return self

    @property
    def choices(self) -> int:
        """Choices per prompt."""
        return int(self.sampling().get("n", 1))

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # all are ints then
        return self.prompt

    def for_engine(self, request_id: str, defaults: DefaultSettings) -> list[GenerationRequest]:
        """Return one generation per prompt."""
        fields = self.generation(defaults)
        if self.limit is None:
            fields["default_max_tokens"] = 16  # OpenAI's default for this endpoint
        prompts = self.prompts
        ids = [request_id] if len(prompts) == 1 else [f"{request_id}-{number}" for number in range(len(prompts))]
        return [
            GenerationRequest(
                request_id=one_id,
                prompt=prompt,
                logprobs=self.logprobs is not None,
                top_logprobs=self.logprobs or 0,
                **fields,
            )
            for one_id, prompt in zip(ids, prompts, strict=True)
        ]


BODY = JsonBody(CompletionRequest)


@router.post(
    "/v1/completions",
    response_class=Response,
    openapi_extra=BODY.openapi,
)
async def create_completion(call: Annotated[Call, Depends(call)]) -> Response:
    """Complete a prompt, streamed or whole."""
    body = await call.read(BODY)
    model = await call.admit(body.model)
    completion_id = f"cmpl-{secrets.token_hex(16)}"
    meter = call.meter(completion_id, model)
    events = complete(body.for_engine(completion_id, model.settings.defaults), meter)
    n = body.choices if body.echo else 0
    echo = {number * n + j: str(prompt) for number, prompt in enumerate(body.prompts) for j in range(n)}
    frames = CompletionFrames(
        completion_id,
        int(call.services.clock()),
        model.id,
        meter.usage,
        include_usage=body.include_usage,
        echo=echo,
    )
    return call.answer(events, frames, meter, streamed=bool(body.stream))
