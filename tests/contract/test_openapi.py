"""The OpenAPI document describes the API truly, and no request that it allows, nor one near it, is a server error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.python.asgi import shutdown_lifespans

from engine.mock import MockEngine
from tests.support.app import AUTHORIZATION, Gateway, build_app
from tests.support.store_server import StoreServer

REQUEST_FIELDS = {
    *("shannon_options", "resumable"),
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    *("stop", "user", "seed", "n", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs", "logit_bias"),
    *("response_format", "top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids"),
    *("tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "structured_outputs"),
}


@pytest.mark.anyio
async def test_document_names_every_route_and_field(gateway: Gateway) -> None:
    document: dict[str, Any] = (await gateway.client.get("/openapi.json")).json()

    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/tokenize",
        "/detokenize",
        "/v1/models",
        "/v1/models/{model}",
        "/health",
        "/ready",
        "/metrics",
    } <= document["paths"].keys()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["required"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    schema = document["components"]["schemas"]["ChatCompletionRequest"]
    assert schema["properties"].keys() == REQUEST_FIELDS
    assert schema["required"] == ["messages"]
    assert document["components"]["securitySchemes"].keys() == {"bearer", "apiKey"}


@pytest.mark.anyio
async def test_documents_references_all_resolve(gateway: Gateway) -> None:
    document: dict[str, Any] = (await gateway.client.get("/openapi.json")).json()

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    for reference in set(references(document)):
        found: Any = document
        for step in reference.removeprefix("#/").split("/"):
            assert step in found, reference
            found = found[step]


def as_written(value: Any) -> Any:
    """Return `value` with its whole numbers as most clients write them: JSON schema counts 1.0 as an integer."""
    if isinstance(value, dict):
        return {name: as_written(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [as_written(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.fixture(scope="module")
def api(store_server: StoreServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    """The API as its own document describes it, served in process under its lifespan, without limits."""
    store = {"data_dir": str(tmp_path_factory.mktemp("data")), "command_timeout_ms": 2000}
    app, _, _ = build_app(
        mock=lambda: MockEngine(max_model_len=512),
        config={"store": store, "limits": {"enabled": False}, "jobs": {"max_idle_s": 0.01}},
        environment={"SHANNON_REDIS_URL": store_server.url},
    )
    yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=AUTHORIZATION)
    shutdown_lifespans()


@pytest.mark.parametrize(("mode", "expected"), [(GenerationMode.POSITIVE, 200), (GenerationMode.NEGATIVE, 400)])
def test_no_request_is_a_server_error(api: schemathesis.BaseSchema, mode: GenerationMode, expected: int) -> None:
    statuses: Counter[int] = Counter()
    chat = api["/v1/chat/completions"]["POST"]

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(case=chat.as_strategy(mode))
    def check(case: schemathesis.Case[Any]) -> None:
        case.body = as_written(case.body)
        response = case.call_and_validate(headers=AUTHORIZATION, checks=[not_a_server_error])
        statuses[response.status_code] += 1

    check()
    assert statuses[expected] > 20, "the requests are of the kind that was asked for"


def test_no_request_to_any_route_is_a_server_error(api: schemathesis.BaseSchema) -> None:
    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(case=api.as_strategy())
    def check(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(headers=AUTHORIZATION, checks=[not_a_server_error])

    check()
