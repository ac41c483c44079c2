"""Builds the configured tools."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.outbound.fetch import Fetcher
from gateway.settings.config import Config
from gateway.tools.base import Resource, Tool, Toolbox
from gateway.tools.document_library import DocumentLibrary
from gateway.tools.local_search import LocalRead, LocalSearch
from gateway.tools.mcp_servers import McpServer
from gateway.tools.reader import Reader
from gateway.tools.robots import Robots
from gateway.tools.serp_ads import SerpAds
from gateway.tools.server_toolbox import ServerToolbox
from gateway.tools.web_fetch import WebFetch
from gateway.tools.web_search import WebSearch

_INDEX_NAME = "documents.sqlite3"


def build_toolbox(config: Config, environment: Mapping[str, str], fetcher: Fetcher) -> Toolbox:
    """Return the tools, unstarted. Raises ConfigError."""
    settings = config.tools
    tools: list[Tool] = []
    resources: list[Resource] = []
    if settings.web_search is not None:
        tools.append(WebSearch(settings.web_search, environment))
    if settings.web_fetch.enabled:
        reader = Reader(processes=settings.reading.processes, timeout_s=settings.reading.timeout_s)
        robots = Robots(fetcher) if settings.web_fetch.robots else None
        # This includes the wait for a reader process.
        timeout_s = config.fetch.timeout_s + 2 * settings.reading.timeout_s
        tools.append(WebFetch(settings.web_fetch, fetcher, reader, robots=robots, timeout_s=timeout_s))
        resources.append(reader)
    if settings.local_search is not None:
        # A separate reader, so that indexing a folder does not delay web pages.
        reader = Reader(processes=1, timeout_s=settings.reading.timeout_s)
        index = settings.local_search.index or config.store.data_dir / _INDEX_NAME
        library = DocumentLibrary(settings.local_search, index, reader)
        tools += [LocalSearch(settings.local_search, library), LocalRead(library)]
        resources.append(library)
    if settings.ga4 is not None:
        from gateway.tools.ga4 import ga4_tools  # imports cryptography, which few gateways need

        tools += ga4_tools(settings.ga4, environment)
    if settings.serp_ads is not None:
        tools.append(SerpAds(settings.serp_ads, environment))
    servers = [McpServer(name, server, environment) for name, server in settings.mcp.items()]
    if servers:
        return ServerToolbox(tools, servers, resources=resources)
    return Toolbox(tools, resources=resources)
