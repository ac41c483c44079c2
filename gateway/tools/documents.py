"""The title, date and text of a file or a page in HTML, PDF, Markdown or plain text.

Text comes back as Markdown as far as the source has structure, with a form feed between the pages of a PDF. Does not
handle images, scripts and the text in pictures. This code reads untrusted files, and the parsers that it calls can
take minutes, gigabytes or the whole process down over a few bytes: it runs in processes of their own, which
`gateway.tools.reader` bounds. Raises Unreadable; whatever else a parser raises is for the caller to catch.
"""

from __future__ import annotations

import codecs
import io
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["html", "pdf", "markdown", "text"]

PAGE_BREAK = "\f"
_MAX_HTML_CHARS = 4 * 2**20
"""The rest is ignored: a page's content is near its beginning, and parse trees take a hundred times the memory."""
_MAX_TITLE_CHARS = 200
_MIN_EXTRACTED_CHARS = 80
"""A shorter extract is rarely the content of the page; then the whole text is used."""
# Characters that people don't see and models do: tags, zero-width marks, direction overrides, and controls.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
"""Ligatures of PDFs, replaced by their letters so that searches match."""
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins like UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s{0,20}=\s{0,20}["']?([A-Za-z0-9_.:-]{1,40})""", re.I)
_BLANK_LINES = re.compile(r"\n{4,}")
_MAX_FRONT_MATTER_LINES = 200
_MAX_HEAD_CHARS = 4096
"""Length of the beginning of a text in which the first heading is searched."""


class Unreadable(Exception):
    """The document can't be read. The message says why, for agents and operators."""


@dataclass(frozen=True, slots=True)
class Document:
    """Content of a document."""

    text: str
    title: str = ""
    published: str = ""
    """ISO date, or empty."""


def read_document(content: bytes, kind: Kind, charset: str = "", max_chars: int = 2**21) -> Document:
    """Extract at most `max_chars` of text from `content`. Raises Unreadable, and what parsers raise."""
    if kind == "pdf":
        document = _read_pdf(content, max_chars)
    elif kind == "html":
        document = _read_html(_decoded(content, charset)[:_MAX_HTML_CHARS])
    else:
        document = _read_text(_decoded(content, charset), kind)
    text = _tidy(document.text)[:max_chars]
    if not text.strip():
        raise Unreadable("it holds no text" + (", perhaps only pictures of it" if kind == "pdf" else ""))
    title = " ".join(_tidy(document.title).split())[:_MAX_TITLE_CHARS]
    return Document(text, title, document.published)


def _decoded(content: bytes, charset: str) -> str:
    """Decode bytes by their byte order mark, the server's charset or a guess, in this order."""
    for bom, encoding in _BOMS:
        if content.startswith(bom):
            return content[len(bom) :].decode(encoding, "replace")
    for encoding in filter(None, (charset, _declared(content), "utf-8")):
        try:
            return content.decode(encoding)
        except (LookupError, UnicodeError, ValueError):
            continue
    from charset_normalizer import from_bytes

    guess = from_bytes(content[: 2**16]).best()
    return content.decode(guess.encoding if guess else "cp1252", "replace")


def _declared(content: bytes) -> str:
    """Return the encoding that an HTML page names in its head."""
    found = _CHARSET.search(content[:2048])
    return found[1].decode("ascii") if found else ""


def _read_html(html: str) -> Document:
    from trafilatura import extract, html2txt
    from trafilatura.metadata import extract_metadata
    from trafilatura.utils import load_html

    tree = load_html(html)
    if tree is None:  # a page may have no markup, but its server or its name says that it is HTML
        html = f"<!doctype html>{html}"
        tree = load_html(html)
    if tree is None:
        raise Unreadable("it is not HTML")
    # The extensive search takes any year in the text for a date.
    metadata = extract_metadata(tree, date_config={"extensive_search": False, "original_date": True})
    text = extract(tree, output_format="markdown", include_comments=False, include_links=False, favor_recall=True)
    if not text or len(text) < _MIN_EXTRACTED_CHARS:
        text = html2txt(html) or text
    return Document(text or "", metadata.title or "", _iso_date(metadata.date))


def _read_pdf(content: bytes, max_chars: int) -> Document:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    try:
        reader = PdfReader(io.BytesIO(content), strict=False)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("it is protected by a password")
        pages: list[str] = []
        for page in reader.pages:
            pages.append(page.extract_text())
            if (max_chars := max_chars - len(pages[-1])) <= 0:
                break
        title = str((reader.metadata and reader.metadata.title) or "")
        return Document(PAGE_BREAK.join(page.replace(PAGE_BREAK, "\n") for page in pages), title, _pdf_date(reader))
    except (FileNotDecryptedError, DependencyError, NotImplementedError):
        raise Unreadable("it is protected by a password") from None
    except PyPdfError:
        raise Unreadable("it is not a whole PDF") from None


def _pdf_date(reader: Any) -> str:
    try:
        created = reader.metadata and reader.metadata.creation_date
    except ValueError:  # dates are often written badly
        return ""
    return created.date().isoformat() if created else ""


def _read_text(text: str, kind: Kind) -> Document:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    title = published = ""
    if kind == "markdown":
        fields, text = _front_matter(text)
        title, published = fields.get("title", ""), _iso_date(fields.get("date", ""))
        title = title or _first_heading(text[:_MAX_HEAD_CHARS])
    return Document(text, title, published)


def _front_matter(text: str) -> tuple[dict[str, str], str]:
    """Return title and date of the front matter (between `---`), and the text after it."""
    if not text.startswith("---"):
        return {}, text
    first, *lines = text.split("\n", _MAX_FRONT_MATTER_LINES)
    end = next((n for n, line in enumerate(lines) if line.rstrip(" \t") in ("---", "...")), None)
    if first.rstrip(" \t") != "---" or not end:
        return {}, text
    fields: dict[str, str] = {}
    for line in lines[:end]:
        name, colon, value = line.partition(":")
        if colon and (name := name.rstrip(" \t").lower()) in ("title", "date"):
            value = value.strip(" \t")
            value = value.removeprefix(value[:1] if value[:1] in ("'", '"') else "\0")
            fields[name] = value.removesuffix(value[-1:] if value[-1:] in ("'", '"') else "\0")
    return fields, "\n".join(lines[end + 1 :])


def _first_heading(text: str) -> str:
    """Return the first heading of level 1 or 2, with `#` or underlined, or an empty string."""
    before = ""
    for line in text.split("\n"):
        mark = line.rstrip(" \t")
        if before[:1].strip() and len(mark) > 2 and mark in ("=" * len(mark), "-" * len(mark)):
            return before
        if line.startswith(("# ", "#\t", "## ", "##\t")) and (said := line.lstrip("#").strip(" \t").rstrip(" \t#")):
            return said
        before = line
    return ""


def _iso_date(text: str | None) -> str:
    found = _DATE.match(text or "")
    return found[0] if found else ""


def _tidy(text: str) -> str:
    text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text.translate(_LIGATURES)))
    *lines, last = text.split("\n")
    text = "\n".join([*(line.rstrip(" \t") for line in lines), last])
    text = _BLANK_LINES.sub("\n\n\n", text)
    return text.encode("utf-8", "replace").decode()  # lone surrogates, which nothing further on can write
