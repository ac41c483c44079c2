"""The catalog: ids to models, and which of them a key may see."""

from __future__ import annotations

import pytest

from engine.mock import MockEngine
from gateway.access.auth import Principal
from gateway.access.catalog import Catalog
from gateway.errors import ModelNotAllowed, ModelNotFound
from gateway.settings.config import parse_config

ANYONE = Principal("TestKey00001")
LIMITED = Principal("TestKey00002", models=frozenset({"small"}))
ENGINES = {"main": MockEngine(), "spare": MockEngine()}


@pytest.fixture
def catalog() -> Catalog:
    config = parse_config(
        {
            "engines": {"main": {"kind": "mock"}, "spare": {"kind": "mock"}},
            "models": {
                "small": {"description": "Small and quick", "engine": "spare"},
                "large": {"description": "Large and slow"},
            },
            "default_model": "large",
        }
    )
    return Catalog(config, ENGINES)


def test_model_is_found_with_its_settings_and_engine(catalog: Catalog) -> None:
    spec = catalog.resolve("small", ANYONE)

    assert spec.id == "small"
    assert spec.settings.description == "Small and quick"
    assert spec.engine is ENGINES["spare"]


def test_no_model_means_the_default_model(catalog: Catalog) -> None:
    assert catalog.resolve(None, ANYONE).id == "large"


def test_empty_model_id_is_not_the_default_model(catalog: Catalog) -> None:
    with pytest.raises(ModelNotFound):
        catalog.resolve("", ANYONE)


def test_unknown_model_is_refused_with_those_that_exist(catalog: Catalog) -> None:
    with pytest.raises(ModelNotFound, match=r"'gpt-5' does not exist. Available models: small, large\.") as caught:
        catalog.resolve("gpt-5", ANYONE)

    assert caught.value.param == "model"


@pytest.mark.parametrize("model_id", ["large", None])
def test_model_beyond_the_key_is_refused(catalog: Catalog, model_id: str | None) -> None:
    with pytest.raises(ModelNotAllowed, match="may not use the model 'large'") as caught:
        catalog.resolve(model_id, LIMITED)

    assert caught.value.param == "model"


def test_key_sees_the_models_it_may_use_in_configured_order(catalog: Catalog) -> None:
    assert [spec.id for spec in catalog.visible_to(ANYONE)] == ["small", "large"]
    assert [spec.id for spec in catalog.visible_to(LIMITED)] == ["small"]


def test_error_about_an_unknown_model_names_none_that_the_key_may_not_use(catalog: Catalog) -> None:
    with pytest.raises(ModelNotFound, match=r"Available models: small\."):
        catalog.resolve("gpt-5", LIMITED)
