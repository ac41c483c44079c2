"""Finds and reads the documents of a folder, and names them without the folder's path.

A name is `local:` and the path within the folder. Hidden files and folders are skipped, links that lead out of the
folder too, and whatever is no plain file. Does not handle watching: it is looked through again and again instead, which
works on every file system. Raises OSError where the folder itself can't be listed.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from gateway.tools.documents import Kind

log = logging.getLogger(__name__)

SCHEME = "local:"
SUFFIXES: dict[str, Kind] = {
    ".md": "markdown",
    ".markdown": "markdown",
    ".txt": "text",
    ".text": "text",
    ".rst": "text",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
}
_PLAIN = frozenset("/-._~,+@")  # the rest would end the path, or a quotation, or a line
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class File:
    """A document in the folder, as it was when the folder was looked through."""

    url: str
    path: str
    """Absolute, links resolved."""
    kind: Kind
    size_bytes: int
    signature: str
    """Changes when the file does."""

    @property
    def name(self) -> str:
        """The last part of its path, for people."""
        name = os.fsencode(os.path.basename(self.path)).decode("utf-8", "replace")
        return "".join(character if character.isprintable() else " " for character in name)


def url_of(path: str) -> str:
    """Return the name of the document at `path`, which is relative to the folder."""
    return SCHEME + "".join(
        character if character.isalnum() or character in _PLAIN else _escaped(character) for character in path
    )


def split_url(text: str) -> tuple[str, str]:
    """Return a document's name and the anchor in it, however `text` spells them."""
    path, _, anchor = text.strip().removeprefix(SCHEME).removeprefix("//").partition("#")
    return url_of(unquote(path, errors="surrogateescape")), unquote(anchor)


def scan(root: Path) -> dict[str, File]:
    """Return the documents of the folder by name. Raises OSError."""
    top = os.path.realpath(root)
    with os.scandir(top):  # what lies below may fail; this may not
        pass
    return {file.url: file for file in _files(top, top, 0)}


def read(file: File, max_bytes: int) -> tuple[bytes, str]:
    """The content of the file, and its signature before it was read. Raises OSError."""
    # It may have become something else since the scan: a link is not followed, a pipe not waited for.
    descriptor = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a file")
        return opened.read(max_bytes + 1), _signature(status)


def _files(top: str, folder: str, depth: int) -> Iterator[File]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        log.warning("a folder of documents can't be listed: %s", error)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            if entry.is_dir(follow_symlinks=False):
                if depth < _MAX_DEPTH:
                    yield from _files(top, entry.path, depth + 1)
            elif (kind := SUFFIXES.get(os.path.splitext(entry.name)[1].lower())) and (path := _inside(top, entry)):
                status = os.stat(path, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    url = url_of(os.path.relpath(entry.path, top))
                    yield File(url, path, kind, status.st_size, _signature(status))
        except OSError:  # it has just gone, or a link leads nowhere
            continue


def _inside(top: str, entry: os.DirEntry[str]) -> str | None:
    """The real path of the file, None for a link to the outside. Kubernetes mounts every file as a link within."""
    if not entry.is_symlink():
        return entry.path
    path = os.path.realpath(entry.path, strict=True)
    return path if path.startswith(top.rstrip("/") + "/") else None


def _signature(status: os.stat_result) -> str:
    # The time of change too: that of modification can be set, and copies keep it.
    return f"{status.st_size}.{status.st_mtime_ns}.{status.st_ctime_ns}.{status.st_ino}"


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in os.fsencode(character))
