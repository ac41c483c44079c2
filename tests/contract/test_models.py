"""GET /v1/models and /v1/models/{model}: OpenAI's objects, for the models that the caller's key may use."""

from __future__ import annotations

import pytest

from gateway.settings.config import load_config
from tests.support.app import ROOT, Gateway, Start

pytestmark = pytest.mark.anyio


async def test_list_has_openais_shape_and_our_description(gateway: Gateway) -> None:
    response = await gateway.client.get("/v1/models")

    assert response.status_code == 200
    assert response.json() == {
        "object": "list",
        "data": [
            {
                "id": "shannon-chat",
                "object": "model",
                "created": 1703318400,
                "owned_by": "shannon",
                "description": "General chat completion",
                "takes_images": False,
            },
            {
                "id": "shannon-complex",
                "object": "model",
                "created": 1703318400,
                "owned_by": "shannon",
                "description": "Multi-agent orchestration",
                "takes_images": False,
            },
        ],
    }


async def test_model_is_described_as_in_the_list(gateway: Gateway) -> None:
    listed = (await gateway.client.get("/v1/models")).json()["data"]
    response = await gateway.client.get("/v1/models/shannon-complex")

    assert response.status_code == 200
    assert response.json() == listed[1]


@pytest.mark.parametrize("model", ["gpt-5", "shannon-chat/x", "a%2Fb", "%E2%98%83", "shannon-chat%20"])
async def test_unknown_model_is_404(gateway: Gateway, model: str) -> None:
    response = await gateway.client.get(f"/v1/models/{model}")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"


async def test_no_model_id_is_404(gateway: Gateway) -> None:
    assert (await gateway.client.get("/v1/models/")).status_code == 404


async def test_key_sees_only_its_models(start: Start) -> None:
    key = "a-key-chosen-by-hand-1"
    gateway = await start(
        config={"keys": [{"name": "ci", "key_env": "CI_KEY", "models": ["shannon-complex"]}]},
        environment={"CI_KEY": key},
    )
    gateway.client.headers["Authorization"] = f"Bearer {key}"

    listed = (await gateway.client.get("/v1/models")).json()["data"]

    assert [model["id"] for model in listed] == ["shannon-complex"]
    assert (await gateway.client.get("/v1/models/shannon-complex")).status_code == 200
    assert (await gateway.client.get("/v1/models/shannon-chat")).status_code == 403


async def test_shipped_catalog_is_listed_in_its_order(start: Start) -> None:
    models = load_config(ROOT / "configs" / "mock.yaml", {}).model_dump()["models"]
    gateway = await start(config={"models": models})

    listed = (await gateway.client.get("/v1/models")).json()["data"]

    assert len(listed) == 8
    assert {model["id"]: model["description"] for model in listed} == {
        model_id: model["description"] for model_id, model in models.items()
    }


async def test_models_are_listed_while_the_engine_is_away(start: Start) -> None:
    gateway = await start(ready=False)

    assert (await gateway.client.get("/v1/models")).status_code == 200
