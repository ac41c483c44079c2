"""Lists and reads the documents of a folder, under names that don't reveal where the folder is.

A name is `local:` and the path within the folder. Hidden files and folders, links that leave the folder, and special
files are skipped. Not handled: watching for changes; the folder is scanned repeatedly instead, which works on every
file system. Raises OSError if the folder itself can't be listed.
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
_PLAIN = frozenset("/-._~,+@")  # other characters would end the path, a quotation or a line
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class File:
    """A document in the folder at the time of a scan."""

    url: str
    path: str
    """Absolute, with links resolved."""
    kind: Kind
    size_bytes: int
    signature: str
    """Changes when the file does."""

    @property
    def name(self) -> str:
        """The last part of its path, for display."""
        name = os.fsencode(os.path.basename(self.path)).decode("utf-8", "replace")
        return "".join(character if character.isprintable() else " " for character in name)


def url_of(path: str) -> str:
    """Return the name of the document at `path`, which is relative to the folder."""
    return SCHEME + "".join(
        character if character.isalnum() or character in _PLAIN else _escaped(character) for character in path
    )


def split_url(text: str) -> tuple[str, str]:
    """Return a document's name and the anchor in it, in any spelling."""
    path, _, anchor = text.strip().removeprefix(SCHEME).removeprefix("//").partition("#")
    return url_of(unquote(path, errors="surrogateescape")), unquote(anchor)


def scan(root: Path) -> dict[str, File]:
    """Return the documents of the folder by name. Raises OSError."""
    top = os.path.realpath(root)
    with os.scandir(top):  # errors of subfolders are logged, an error of the folder itself is raised
        pass
    return {file.url: file for file in _files(top, top, 0)}


def read(file: File, max_bytes: int) -> tuple[bytes, str]:
    """Return the file's content, and its signature just before reading. Raises OSError."""
    # It may have been replaced since the scan: no link is followed, and a pipe does not block.
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
        except OSError:  # just deleted, or a dangling link
            continue


def _inside(top: str, entry: os.DirEntry[str]) -> str | None:
    """Return the file's real path, or None for a link out of the folder. Kubernetes mounts files as links within it."""
    if not entry.is_symlink():
        return entry.path
    path = os.path.realpath(entry.path, strict=True)
    return path if path.startswith(top.rstrip("/") + "/") else None


def _signature(status: os.stat_result) -> str:
    # ctime as well: mtime can be set, and copies keep it.
    return f"{status.st_size}.{status.st_mtime_ns}.{status.st_ctime_ns}.{status.st_ino}"


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in os.fsencode(character))
