"""Tools for the operator's documents: `local_search` finds passages, `local_read` reads a document from a passage on.

Both read only the index, under names that don't reveal where the folder is; agents' input is never used as a path.
A caller who may use a model with these tools can read the whole folder. Raises ToolError.
"""

from __future__ import annotations

import logging
import re
from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

from gateway.settings.config import LocalSearchSettings
from gateway.tools.base import Observation, Source, ToolError
from gateway.tools.document_folder import SCHEME, split_url
from gateway.tools.document_index import Excerpt, IndexFailed
from gateway.tools.document_library import DocumentLibrary

log = logging.getLogger(__name__)

READ_CHARS = 12_000
"""Longest text of one call. The rest of the document has other addresses."""
_SNIPPET_CHARS = 300
_PAGE = re.compile(r"page=(\d+)(?:-\d+)?")
_TIMEOUT_S = 15.0


class LocalSearchArguments(BaseModel):
    query: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=400)]
    """Words that the passage should hold."""
    max_results: int | None = Field(None, ge=1, le=20)


class LocalReadArguments(BaseModel):
    url: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4096)]
    """An address that local_search gave."""


class LocalSearch:
    """Finds passages in the documents."""

    name = "local_search"
    description = "Search this organisation's own documents. Returns passages with addresses for local_read."
    arguments = LocalSearchArguments
    timeout_s = _TIMEOUT_S

    def __init__(self, settings: LocalSearchSettings, library: DocumentLibrary) -> None:
        self._settings = settings
        self._library = library

    async def run(self, arguments: LocalSearchArguments) -> Observation:
        """Return the best passages, as sources that are not read yet. Raises ToolError."""
        limit = arguments.max_results or self._settings.max_results
        try:
            matches = await self._library.search(arguments.query, limit)
        except IndexFailed as error:
            raise _failed(self._library, error) from error
        sources = [
            Source(f"{match.url}#{match.anchor}" if match.anchor else match.url, match.title, match.snippet,
                   published=match.published)
            for match in matches
        ]  # fmt: skip
        found = [f"{number}. {s.title} ({s.url})\n{s.snippet}" for number, s in enumerate(sources, 1)]
        text = "\n\n".join(found) or "No document matches. Try other words."
        if not self._library.complete:
            text += "\n\n(The documents are still being indexed: there may be more.)"
        return Observation(text, sources)

    async def close(self) -> None:
        """Do nothing: the toolbox closes the library."""


class LocalRead:
    """Reads a document from a given passage on."""

    name = "local_read"
    description = "Read a document that local_search found, from the passage that its address names."
    arguments = LocalReadArguments
    timeout_s = _TIMEOUT_S

    def __init__(self, library: DocumentLibrary) -> None:
        self._library = library

    async def run(self, arguments: LocalReadArguments) -> Observation:
        """Return the document's text around the passage. Raises ToolError."""
        if not arguments.url.startswith(SCHEME):
            raise ToolError(f"an address of a document begins with {SCHEME}; take one that local_search gave.")
        url, anchor = split_url(arguments.url)
        try:
            excerpt = await self._library.excerpt(url, anchor, READ_CHARS)
        except IndexFailed as error:
            raise _failed(self._library, error) from error
        if excerpt is None:
            raise ToolError("there is no such document; take an address that local_search gave.")
        text = _text(excerpt)
        place = f"{url}#{anchor}" if anchor else url
        snippet = " ".join(text[: 2 * _SNIPPET_CHARS].split())[:_SNIPPET_CHARS]
        return Observation(text, [Source(place, excerpt.title, snippet, fetched=True, published=excerpt.published)])

    async def close(self) -> None:
        """Do nothing: the toolbox closes the library."""


def _text(excerpt: Excerpt) -> str:
    """Return the passages as one text, with page numbers if there are any."""
    parts = ["[...]"] if excerpt.cut_before else []
    page = ""
    for passage in excerpt.passages:
        on_page = _PAGE.fullmatch(passage.anchor)
        if on_page and on_page[1] != page:
            page = on_page[1]
            parts.append(f"[page {page}]")
        parts.append(passage.text)
    return "\n\n".join(parts + (["[...]"] if excerpt.cut_after else []))


def _failed(library: DocumentLibrary, error: IndexFailed) -> ToolError:
    if not library.complete:
        return ToolError("the documents are not indexed yet.", out_of_order=False)
    log.warning("the index of documents does not answer: %s", error)
    return ToolError("the documents can't be searched at the moment.", may_pass=True)
