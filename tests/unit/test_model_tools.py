"""`models.*.tools` and `answers.images`: which names are valid; a request only narrows what a model may use."""

from __future__ import annotations

import pytest

from gateway.settings.config import Config, ConfigError, McpServerSettings, parse_config
from gateway.tools.mcp_servers import McpServer
from gateway.tools.server_toolbox import ServerToolbox
from tests.support.scripted_model import FakeTool


def parsed(tools: list[str] | None = None, images: list[str] | None = None) -> Config:
    return parse_config(
        {
            "engines": {"main": {"kind": "mock"}},
            "models": {"shannon-chat": {"description": "x", "workflow": "complex", "tools": tools}},
            "tools": {"mcp": {"crm": {"command": ["x"]}, "ads": {"command": ["x"], "tools": ["list.all/v2", "get"]}}},
            "answers": {"images": images or []},
        }
    )


@pytest.mark.parametrize(
    "name",
    [
        *("web_search", "serp_ads", "crm", "crm/*", "crm__*", "crm__any", "crm/any"),
        *("ads", "ads/get", "ads/list.all/v2", "ads__list_all_v2"),
    ],
)
def test_names_of_tools_are_taken(name: str) -> None:
    assert parsed([name]).models["shannon-chat"].tools == [name]


@pytest.mark.parametrize("name", ["web_serch", "", "crm/", "crm_any", "other/*", "other__x", "*", "Web_Search"])
def test_unknown_tools_are_named_with_those_that_there_are(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"models\.shannon-chat\.tools: there is no tool .*web_search, .*crm/\*, ads/\*"
    ):
        parsed([name])


def test_tool_that_its_server_is_not_asked_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'ads/put' is not among .*ads/list\.all/v2, ads/get"):
        parsed(["ads/put"])


def test_all_tools_are_used_by_default_and_none_where_the_list_is_empty() -> None:
    assert parsed().models["shannon-chat"].tools is None
    assert parsed([]).models["shannon-chat"].tools == []


def box() -> ServerToolbox:
    servers = [McpServer(name, McpServerSettings(command=["x"]), {}) for name in ("crm", "ads")]
    return ServerToolbox([FakeTool("web_search"), FakeTool("web_fetch")], servers)


@pytest.mark.parametrize("form", ["crm__get", "crm/get"])
def test_a_choice_narrows_a_choice_and_never_widens_it(form: str) -> None:
    share = box().only(["web_search", form])
    assert (share.names, "crm/get" in share, "crm__put" in share, "ads" in share) == (
        ["web_search", "crm"],
        True,
        False,
        False,
    )
    for wider in (["crm"], ["crm/*"], ["crm__get", "crm__put"], ["crm", "web_search", "web_fetch"]):
        again = share.only(wider)
        assert [name for name in ("crm__get", "crm__put", "web_fetch", "ads__x") if name in again] == ["crm__get"]
        assert again._means("crm__get")
        assert not again._means("crm__put")
    assert not share.only(["crm__put"])._means("crm__get")
    assert share.only([]).names == []


@pytest.mark.parametrize(
    "host", ["https://a.example", "a.example/x", "a.example:80", "a b", "", "*", "*.", "me@a.example"]
)
def test_pictures_are_allowed_by_host(host: str) -> None:
    with pytest.raises(ConfigError, match=r"answers\.images"):
        parsed(images=[host])


def test_hosts_are_compared_without_case() -> None:
    assert parsed(images=["Pictures.Example", "*.cdn.example"]).answers.images == ["pictures.example", "*.cdn.example"]
