"""The environment's names, one by one: what each sets, which of two wins, and what a bad value is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.settings.config import Config, ConfigError, load_config, parse_config
from gateway.settings.environment import VARIABLES, hub_environment, hub_token, override

DEPLOYMENT = """\
engines:
  main: {kind: embedded, model: org/from-file, revision: v1}
  spare: {kind: embedded, model: org/spare, revision: v2}
  mock: {kind: mock}
models:
  shannon-chat: {description: a}
  shannon-complex: {description: b, engine: mock, defaults: {temperature: 1, top_p: 0.5}, max_output_tokens: 9}
server: {port: 1000}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "deploy.yaml"
    path.write_text(DEPLOYMENT, encoding="utf-8")
    return path


def model_of(config: Config, engine: str) -> tuple[Any, Any]:
    settings = config.engines[engine]
    return getattr(settings, "model", None), getattr(settings, "revision", None)


@pytest.mark.parametrize("variable", ["SHANNON_MODEL_ID", "MODEL_NAME"])
def test_model_id_is_the_checkpoint_behind_the_default_model(path: Path, variable: str) -> None:
    config = load_config(path, {variable: "google/gemma-3n-e4b"})

    assert model_of(config, "main") == ("google/gemma-3n-e4b", None), "a revision of another repository means nothing"
    assert model_of(config, "spare") == ("org/spare", "v2")


def test_model_id_that_the_file_names_too_keeps_its_revision(path: Path) -> None:
    assert model_of(load_config(path, {"SHANNON_MODEL_ID": "org/from-file"}), "main") == ("org/from-file", "v1")


def test_model_id_follows_the_default_model_to_its_engine(path: Path) -> None:
    path.write_text(DEPLOYMENT + "default_model: other\n", encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write("include: more.yaml\n")
    (path.parent / "more.yaml").write_text("models: {other: {description: c, engine: spare}}\n", encoding="utf-8")

    config = load_config(path, {"SHANNON_MODEL_ID": "org/new"})

    assert model_of(config, "spare") == ("org/new", None)
    assert model_of(config, "main") == ("org/from-file", "v1")


@pytest.mark.parametrize("kind", ["{kind: mock}", "{kind: pooling, model: org/embedder}"])
def test_model_id_leaves_an_engine_alone_that_does_not_generate_from_a_checkpoint(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(f"engines: {{main: {kind}}}\nmodels: {{shannon-chat: {{description: a}}}}\n", encoding="utf-8")

    assert load_config(path, {"SHANNON_MODEL_ID": "org/new"}) == load_config(path, {})


def test_model_cache_is_the_weights_directory(path: Path) -> None:
    assert load_config(path, {}).weights.cache_dir is None
    assert load_config(path, {"SHANNON_MODEL_CACHE": "/mnt/cache"}).weights.cache_dir == Path("/mnt/cache")


@pytest.mark.parametrize("variable", ["SHANNON_MAX_OUTPUT_TOKENS", "MAX_LENGTH"])
def test_max_output_tokens_holds_for_all_models(path: Path, variable: str) -> None:
    config = load_config(path, {variable: "2048"})

    assert [model.max_output_tokens for model in config.models.values()] == [2048, 2048]


def test_max_input_tokens_holds_for_all_models(path: Path) -> None:
    config = load_config(path, {"SHANNON_MAX_INPUT_TOKENS": "8192"})

    assert [model.max_input_tokens for model in config.models.values()] == [8192, 8192]


def test_stream_chunk_size_is_characters_per_frame(path: Path) -> None:
    assert load_config(path, {}).server.stream_chunk_chars is None
    assert load_config(path, {"SHANNON_STREAM_CHUNK_SIZE": "64"}).server.stream_chunk_chars == 64


@pytest.mark.parametrize("variable", ["SHANNON_TEMPERATURE", "TEMPERATURE"])
def test_temperature_is_the_default_of_all_models(path: Path, variable: str) -> None:
    config = load_config(path, {variable: "0.0"})

    assert [model.defaults.temperature for model in config.models.values()] == [0.0, 0.0]
    assert config.models["shannon-complex"].defaults.top_p == 0.5


def test_top_p_is_the_default_of_all_models(path: Path) -> None:
    config = load_config(path, {"SHANNON_TOP_P": "0.9"})

    assert [model.defaults.top_p for model in config.models.values()] == [0.9, 0.9]
    assert config.models["shannon-complex"].defaults.temperature == 1


def test_gemma3n_port_is_the_port(path: Path) -> None:
    assert load_config(path, {"GEMMA3N_PORT": "8000"}).server.port == 8000


def test_host_is_the_host(path: Path) -> None:
    assert load_config(path, {"SHANNON_HOST": "0.0.0.0"}).server.host == "0.0.0.0"


@pytest.mark.parametrize("variable", ["HUGGINGFACE_TOKEN", "HF_TOKEN"])
def test_token_reaches_the_hub_and_the_engine(variable: str) -> None:
    assert hub_token({variable: " hf_abc\n"}) == "hf_abc"
    assert hub_environment(None, {variable: "hf_abc"}) == {"HF_TOKEN": "hf_abc"}


def test_cache_reaches_the_engine_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert hub_environment(Path("cache"), {}) == {"HF_HUB_CACHE": str(tmp_path / "cache")}
    assert hub_environment(None, {"HF_HUB_CACHE": "/elsewhere"}) == {}


@pytest.mark.parametrize(
    ("stronger", "weaker"),
    [(names[0], weaker) for names in VARIABLES.values() for weaker in names[1:]],
)
def test_shannon_name_wins_over_the_older_one(path: Path, stronger: str, weaker: str) -> None:
    both = {stronger: "1", weaker: "2"}

    assert stronger.startswith("SHANNON_")
    assert load_config(path, both) == load_config(path, {stronger: "1"})
    assert load_config(path, both) != load_config(path, {weaker: "2"})
    assert load_config(path, {stronger: " ", weaker: "2"}) == load_config(path, {weaker: "2"}), "empty is unset"


def test_huggingface_token_wins_over_hf_token() -> None:
    assert hub_environment(None, {"HUGGINGFACE_TOKEN": "a", "HF_TOKEN": "b"}) == {"HF_TOKEN": "a"}


@pytest.mark.parametrize("variable", [name for names in VARIABLES.values() for name in names])
def test_empty_variable_sets_nothing(path: Path, variable: str) -> None:
    assert load_config(path, {variable: ""}) == load_config(path, {})


@pytest.mark.parametrize(
    ("variable", "value", "right"),
    [
        ("SHANNON_PORT", "http", "must be a valid integer"),
        ("GEMMA3N_PORT", "70000", "must be less than or equal to 65535"),
        ("SHANNON_MAX_OUTPUT_TOKENS", "0", "must be greater than or equal to 1"),
        ("MAX_LENGTH", "2k", "must be a valid integer"),
        ("SHANNON_MAX_INPUT_TOKENS", "-1", "must be greater than or equal to 1"),
        ("SHANNON_STREAM_CHUNK_SIZE", "1.5", "must be a valid integer"),
        ("SHANNON_TEMPERATURE", "3", "must be less than or equal to 2"),
        ("TEMPERATURE", "warm", "must be a valid number"),
        ("SHANNON_TOP_P", "0", "must be greater than 0"),
    ],
)
def test_bad_value_names_the_variable_and_what_would_be_right(
    path: Path, variable: str, value: str, right: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, {variable: value})

    assert str(caught.value).startswith(f"{variable}: {right}, not '{value}' (it sets ")


def test_mistake_in_the_file_is_not_blamed_on_a_variable(path: Path) -> None:
    path.write_text("engines: [1]\nmodels: {shannon-chat: 3}\nserver: 7\n", encoding="utf-8")
    everything = {name: "1" for names in VARIABLES.values() for name in names}

    with pytest.raises(ConfigError, match=r"deploy\.yaml: engines: "):
        load_config(path, everything)


def test_alias_in_the_file_does_not_spread_a_variable() -> None:
    engine = {"kind": "embedded", "model": "org/one"}
    tree = {"engines": {"main": engine, "spare": engine}, "models": {"shannon-chat": {"description": "a"}}}

    overridden, _ = override(tree, {"SHANNON_MODEL_ID": "org/two"})

    assert overridden["engines"] == {"main": engine | {"model": "org/two"}, "spare": engine}
    assert engine["model"] == "org/one"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("trust_remote_code", "the engine's own `trust_remote_code`"),
        ("revision", "the engine's own `revision`"),
        ("download_dir", "`weights.cache_dir`"),
        ("hf_token", "HUGGINGFACE_TOKEN"),
    ],
)
def test_engine_argument_with_a_setting_of_its_own_is_refused(name: str, instead: str) -> None:
    tree = {
        "engines": {"main": {"kind": "embedded", "args": {name: True}}},
        "models": {"shannon-chat": {"description": "a"}},
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)

    assert str(caught.value).startswith(f"configuration: engines.main: args.{name}: set ")
    assert instead in str(caught.value)


def test_code_of_a_checkpoint_runs_only_where_a_setting_says_so() -> None:
    tree = {"engines": {"main": {"kind": "embedded"}}, "models": {"shannon-chat": {"description": "a"}}}

    assert getattr(parse_config(tree).engines["main"], "trust_remote_code") is False  # noqa: B009
