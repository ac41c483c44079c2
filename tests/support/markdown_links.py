"""Links and images in Markdown that a renderer makes live, outside the addresses that a run may show.

Example:

    assert unsafe(answer) == []
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from markdown_it import MarkdownIt

from gateway.workflows.addresses import in_markdown

PICTURES = "pictures.example"


_BARE = re.compile(
    r"(?:(?:https?|ftp)://\[?|www\.)[\w-][^\s<]*"
    r"|[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-z]+"
    r"|(?<![:/\w])//(?:[\w-]+\.)+[\w-]+\S*"
    r"|(?<![\w.-])(?:[a-z0-9-]+\.)+(?:com|org|net|edu)[/?#]\S+",
    re.I,
)


def renderers() -> Iterator[MarkdownIt]:
    yield MarkdownIt("commonmark", {"html": True})
    yield MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


RENDERERS = list(renderers())


def live(markdown: str) -> Iterator[tuple[str, str]]:
    """Yield what a front end would make of a text: links, pictures, and HTML as such."""
    for renderer in RENDERERS:
        tokens = renderer.parse(markdown)
        while tokens:
            token = tokens.pop()
            if token.type in ("html_inline", "html_block"):
                yield "html", token.content
            elif token.type == "link_open":
                yield "link", str(token.attrGet("href"))
            elif token.type == "image":
                yield "image", str(token.attrGet("src"))
            elif token.type == "inline":
                # Text is joined again where escapes and entities were resolved.
                joined = "".join(
                    child.content if child.type in ("text", "text_special") else "\n" for child in token.children or ()
                )
                for found in _BARE.finditer(joined):
                    yield "bare", found[0]
            tokens += token.children or []


READ, NAMED, FOUND = "https://read.example/page?x=1", "https://named.example/own", "https://found.example/hit"
ALLOWED = {READ, NAMED, in_markdown(READ), in_markdown(NAMED)}


_OWN = {"me@named.example", "mailto:me@named.example"}


def unsafe(markdown: str, *, partial: bool = False) -> list[tuple[str, str]]:
    """Return what is live and must not be."""
    bad = []
    for kind, url in live(markdown):
        bare = url.rstrip(".,;:!?*_~)\"'`")
        if kind == "bare" and re.match(r"(?i)(?:[a-z]+://|www\.)[\W_]*(?:\[address|\[x\]|$)", url):
            continue  # no host
        if kind == "link" and re.fullmatch(r"(?![A-Za-z][A-Za-z0-9+.-]*:)[^/\\?]*", url):
            continue  # it names no host
        if kind == "image" and url.startswith(f"https://{PICTURES}/"):
            continue
        if kind in ("link", "bare") and (url in ALLOWED | _OWN or bare in ALLOWED | _OWN):
            continue
        beginnings = (*ALLOWED, FOUND, "%5Baddress", f"{READ}]({READ})")
        if partial and kind in ("bare", "link") and any(one.startswith((bare, url)) for one in beginnings):
            continue  # the beginning of an address that may be shown, or of the words in place of another
        if partial and ("@" in url or not re.match(r"(?i)\s*[a-z]+:|[/\\]{2}|<.*//", url)):
            continue  # within a code span that is not complete yet: nothing that is loaded, and no other host
        bad.append((kind, url))
    return bad
