"""Settings: unknown names refused with their path, includes merged, the environment on top, every setting explained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gateway.settings.config import ConfigError, load_config, parse_config
from gateway.settings.reference import reference, walk
from tests.support.app import ROOT

# models.yaml is not a deployment: it holds the catalog that the deployments include.
DEPLOYMENTS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name != "models.yaml")

# From the product's API reference: description, requests and tokens per minute, and default max_tokens. Where its
# tables are silent, the values of the public gateway that it describes.
CATALOG = {
    "shannon-deep-research": ("Deep research with iterative refinement", 10, 100_000, 8192),
    "shannon-quick-research": ("Fast research for simple queries", 30, 150_000, 4096),
    "shannon-standard-research": ("Balanced research depth and speed", 20, 120_000, 4096),
    "shannon-academic-research": ("Academic-style with citations", 10, 100_000, 8192),
    "shannon-ads-research": ("Google Ads competitor analysis", 30, 150_000, 4096),
    "shannon-analytics": ("GA4/PTEngine data analysis", 30, 150_000, 4096),
    "shannon-chat": ("General chat completion", 60, 200_000, 4096),
    "shannon-complex": ("Multi-agent orchestration", 15, 100_000, 8192),
}


def tree(**over: Any) -> dict[str, Any]:
    """Return the smallest valid configuration, with top-level settings replaced by `over`."""
    return {
        "engines": {"main": {"kind": "mock"}},
        "models": {"shannon-chat": {"description": "General chat completion"}},
    } | over


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


MINIMAL = """\
engines: {main: {kind: mock}}
models: {shannon-chat: {description: General chat completion}}
"""


@pytest.mark.parametrize(
    ("over", "path"),
    [
        ({"servr": {}}, "servr"),
        ({"server": {"prot": 80}}, "server.prot"),
        ({"engines": {"main": {"kind": "mock", "modle": "demo"}}}, "engines.main.modle"),
        ({"models": {"shannon-chat": {"description": "x", "limit": {}}}}, "models.shannon-chat.limit"),
        (
            {"models": {"shannon-chat": {"description": "x", "limits": {"requests_per_hour": 1}}}},
            "models.shannon-chat.limits.requests_per_hour",
        ),
        (
            {"models": {"shannon-chat": {"description": "x", "defaults": {"top_q": 1}}}},
            "models.shannon-chat.defaults.top_q",
        ),
        ({"keys": [{"name": "ci", "key_env": "CI_KEY", "key": "sk"}]}, "keys.0.key"),
    ],
)
def test_unknown_name_is_refused_with_its_path(over: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(**over), "deploy.yaml")

    assert str(caught.value) == f"deploy.yaml: {path}: unknown setting"


@pytest.mark.parametrize(
    ("over", "path"),
    [
        ({"server": {"port": 70_000}}, "server.port"),
        ({"server": {"port": "http"}}, "server.port"),
        ({"server": {"keepalive_s": 0}}, "server.keepalive_s"),
        ({"server": {"max_body_bytes": 10}}, "server.max_body_bytes"),
        ({"engines": {"main": {"kind": "magic"}}}, "engines.main.kind"),
        ({"engines": {"main": {}}}, "engines.main.kind"),
        ({"models": {"shannon-chat": {}}}, "models.shannon-chat.description"),
        (
            {"models": {"shannon-chat": {"description": "x", "defaults": {"temperature": 3}}}},
            "models.shannon-chat.defaults.temperature",
        ),
        ({"keys": [{"name": "ci"}]}, "keys.0"),
        ({"keys": [{"name": "ci", "key_env": "CI_KEY", "key_file": "ci.key"}]}, "keys.0"),
        ({"keys": [{"name": "ci", "key_env": "CI KEY"}]}, "keys.0.key_env"),
    ],
)
def test_bad_value_is_refused_with_its_path(over: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"deploy.yaml: {path}: ")):
        parse_config(tree(**over), "deploy.yaml")


def test_model_on_an_unknown_engine_is_refused() -> None:
    models = {"shannon-chat": {"description": "x", "engine": "spare"}}
    with pytest.raises(ConfigError, match=r"models\.shannon-chat\.engine: there is no engine named 'spare'"):
        parse_config(tree(models=models))


def test_unknown_default_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="default_model: there is no model named 'shannon-chatt'"):
        parse_config(tree(default_model="shannon-chatt"))


def test_key_for_an_unknown_model_is_refused() -> None:
    keys = [{"name": "ci", "key_env": "CI_KEY", "models": ["shannon-chat", "gpt-5"]}]
    with pytest.raises(ConfigError, match="'ci' names model 'gpt-5', which does not exist"):
        parse_config(tree(keys=keys))


def test_config_is_frozen() -> None:
    config = parse_config(tree())
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config.server, "port", 1)  # noqa: B010  # a plain assignment is refused by mypy already


def test_paths_may_begin_at_home() -> None:
    settings = {"store": {"data_dir": "~/data"}, "tools": {"local_search": {"folder": "~/docs"}}}
    config = parse_config(tree(**settings))

    assert config.store.data_dir == Path.home() / "data"
    assert config.tools.local_search is not None
    assert config.tools.local_search.folder == Path.home() / "docs"


def test_included_file_lies_under_the_including_one(tmp_path: Path) -> None:
    write(
        tmp_path / "base.yaml",
        MINIMAL + "server: {port: 1000, keepalive_s: 7, cors_origins: [https://a.example, https://b.example]}\n",
    )
    top = "include: base.yaml\nserver: {port: 2000, cors_origins: [https://c.example]}\n"

    config = load_config(write(tmp_path / "top.yaml", top), {})

    assert config.server.port == 2000
    assert config.server.keepalive_s == 7, "mappings merge name by name"
    assert config.server.cors_origins == ["https://c.example"], "lists are replaced whole"
    assert config.models["shannon-chat"].description == "General chat completion"


def test_included_file_may_include_another_by_a_path_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared" / "engines.yaml", "engines: {main: {kind: mock, engine_stall_s: 3}}\n")
    write(tmp_path / "shared" / "all.yaml", "include: engines.yaml\nmodels: {shannon-chat: {description: x}}\n")

    config = load_config(write(tmp_path / "top.yaml", "include: shared/all.yaml\n"), {})

    assert config.engines["main"].engine_stall_s == 3


def test_include_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "include: b.yaml\n")
    write(tmp_path / "b.yaml", "include: a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: includes itself"):
        load_config(tmp_path / "a.yaml", {})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"engines: [", "not valid YAML"),
        (b"- engines\n", "must be a mapping"),
        (b"include: nowhere.yaml\n", "nowhere.yaml: No such file or directory"),
        (b"engines: {}\nmodels: {}\nserver: 8080\n", "server"),
        (b"engines: {}\nmodels: {}\nserver: [8080]\n", "server"),
        (b"# caf\xe9\n" + MINIMAL.encode(), "UTF-8"),
    ],
)
def test_unusable_file_is_refused_with_its_name(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        load_config(path, {})

    assert str(tmp_path) in str(caught.value)
    assert problem.lower() in str(caught.value).lower()


def test_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: No such file or directory"):
        load_config(tmp_path / "gone.yaml", {})


def test_environment_overrides_host_and_port(tmp_path: Path) -> None:
    path = write(tmp_path / "deploy.yaml", MINIMAL + "server: {host: 10.0.0.1, port: 1000, keepalive_s: 7}\n")

    config = load_config(path, {"SHANNON_HOST": "0.0.0.0", "SHANNON_PORT": "2000"})

    assert (config.server.host, config.server.port, config.server.keepalive_s) == ("0.0.0.0", 2000, 7)


def test_environment_sets_host_and_port_without_a_server_section(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "deploy.yaml", MINIMAL), {"SHANNON_PORT": "2000"})

    assert config.server.port == 2000


def test_empty_environment_variable_overrides_nothing(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "deploy.yaml", MINIMAL), {"SHANNON_HOST": "", "SHANNON_PORT": ""})

    assert (config.server.host, config.server.port) == ("127.0.0.1", 8080)


def test_bad_port_in_the_environment_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "deploy.yaml", MINIMAL)
    with pytest.raises(ConfigError, match=r"server\.port"):
        load_config(path, {"SHANNON_PORT": "http"})


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.name)
def test_shipped_deployment_offers_the_eight_models(path: Path) -> None:
    config = load_config(path, {})

    offered = {
        model_id: (
            model.description,
            model.limits.requests_per_minute,
            model.limits.tokens_per_minute,
            model.defaults.max_tokens,
        )
        for model_id, model in config.models.items()
    }
    assert offered.items() >= CATALOG.items()
    assert config.default_model == "shannon-chat"


def test_shipped_deployments_include_the_first_run() -> None:
    assert "demo.yaml" in {path.name for path in DEPLOYMENTS}


SETTINGS = list(walk())


def test_walk_finds_settings_at_every_depth() -> None:
    values = {path for path, _, is_value in SETTINGS if is_value}

    assert {
        "default_model",
        "server.keepalive_s",
        "engines.*.kind",
        "models.*.limits.requests_per_minute",
        "keys[].key_env",
    } <= values


@pytest.mark.parametrize(("path", "field"), [pytest.param(path, field, id=path) for path, field, _ in SETTINGS])
def test_setting_is_explained(path: str, field: FieldInfo) -> None:
    assert field.description, f"{path} has no docstring"
    assert field.description.rstrip().endswith("."), f"{path}: {field.description!r} is not a sentence"


def test_settings_page_is_up_to_date() -> None:
    """`make settings` writes it."""
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == reference()
