"""The tool `web_fetch`: a web page or a PDF as text.

The URL goes through `gateway.outbound.fetch`, which keeps it out of this network, each step of its redirects through
the site's robots.txt, and what comes back to a process of its own, which turns it into text. Scripts are not run: a
page that writes itself in the browser has nothing to say here. Raises ToolError; where a host can't be reached, or must
not be, the message is the same.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, StringConstraints

from gateway.outbound.fetch import Fetched, Fetcher, FetchError, FetchFailed, TooLarge, UrlRefused
from gateway.settings.config import WebFetchSettings
from gateway.tools.base import Observation, Source, ToolError
from gateway.tools.documents import PAGE_BREAK, Unreadable
from gateway.tools.reader import Reader, kind_of
from gateway.tools.robots import Robots

_ACCEPT = "text/html, application/xhtml+xml, application/pdf, text/*;q=0.9, application/json;q=0.8, */*;q=0.1"
_MAX_CHARS = 60_000
"""Characters read from one page. An observation contains fewer."""
_SNIPPET_CHARS = 300
_MAY_PASS = frozenset({429, 502, 503, 504})


class WebFetchArguments(BaseModel):
    url: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=8192)]


class WebFetch:
    """The tool."""

    name = "web_fetch"
    description = "Read a web page or PDF as text."
    arguments = WebFetchArguments

    def __init__(
        self, settings: WebFetchSettings, fetcher: Fetcher, reader: Reader, *, robots: Robots | None, timeout_s: float
    ) -> None:
        """`timeout_s` covers fetching and reading; it is longer than the timeout of either."""
        self._settings = settings
        self._fetcher = fetcher
        self._reader = reader
        self._robots = robots
        self.timeout_s = timeout_s

    async def run(self, arguments: WebFetchArguments) -> Observation:
        """Return the page's text, and the page as a source that was read. Raises ToolError."""
        fetched = await self._fetch(arguments.url)
        kind = kind_of(fetched.media_type, fetched.content)
        if kind is None:
            raise ToolError(f"the page is {fetched.media_type[:80] or 'of an unknown type'}, which can't be read.")
        try:
            page = await self._reader.read(fetched.content, kind, charset=fetched.charset, max_chars=_MAX_CHARS)
        except Unreadable as error:
            raise ToolError(f"the page can't be read: {error}.") from error
        text = page.text.replace(PAGE_BREAK, "\n\n").strip()
        snippet = " ".join(text[: 2 * _SNIPPET_CHARS].split())[:_SNIPPET_CHARS]
        return Observation(text, [Source(fetched.url, page.title, snippet, fetched=True, published=page.published)])

    async def close(self) -> None:
        """Do nothing: the toolbox closes what this uses."""

    async def _fetch(self, url: str) -> Fetched:
        admit = None if self._robots is None else self._robots.admit
        try:
            return await self._fetcher.fetch(url, max_bytes=self._settings.max_bytes, accept=_ACCEPT, admit=admit)
        except UrlRefused as error:
            raise ToolError(f"this address can't be fetched: {error}.") from error
        except TooLarge as error:
            raise ToolError(f"the page can't be read: {error}.") from error
        except FetchFailed as error:
            if error.status is None:
                raise ToolError("the page could not be fetched.") from error
            # One site's trouble, not this tool's: others can be read meanwhile.
            message = f"the site answered with status {error.status}."
            raise ToolError(message, may_pass=error.status in _MAY_PASS, out_of_order=False) from error
        except FetchError as error:
            raise ToolError(f"the page can't be read: {error}.") from error
