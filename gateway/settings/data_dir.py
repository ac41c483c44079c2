"""The rule for `store.data_dir`: what it must be, for the start of a gateway and for `shannon doctor`.

Nothing is created or changed. Raises ConfigError, in one line that names the path and what is wrong with it.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from gateway.settings.config import ConfigError

SOCKET = "valkey.sock"
_MAX_SOCKET_BYTES = 107
"""Length of a unix socket's address on Linux."""
_FILES = ("valkey.lock", "valkey.log")
_FOLDER = "appendonlydir"


def usable_data_dir(path: Path, *, bundled: bool) -> Path:
    """Return the absolute path of a data directory that exists or can be made. Raises ConfigError.

    `bundled` says that the bundled Valkey keeps its files and its socket there; otherwise it holds the usage journal.
    """
    try:
        whole = Path(os.path.realpath(path))
        found, status = _nearest(whole)
    except OSError as error:
        raise _wrong(path, _reason(error)) from error
    if bundled and len(os.fsencode(whole / SOCKET)) > _MAX_SOCKET_BYTES:
        most = _MAX_SOCKET_BYTES - len(SOCKET) - 1
        raise _wrong(whole, f"it is too long for a unix socket in it; choose a path of at most {most} bytes")
    if not stat.S_ISDIR(status.st_mode):
        raise _wrong(whole, "it is a file, not a directory" if found == whole else f"{found} is not a directory")
    try:
        with tempfile.TemporaryFile(dir=found) as trial:
            trial.write(b"\0")
            trial.flush()
    except OSError as error:
        raise _wrong(whole, f"it can't be written: {_reason(error)}") from error
    if bundled and found == whole:
        _check_files(whole)
    return whole


def _nearest(path: Path) -> tuple[Path, os.stat_result]:
    """Return `path`, or else the nearest folder above it that exists. Raises OSError."""
    for folder in (path, *path.parents):
        try:
            return folder, os.stat(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _check_files(folder: Path) -> None:
    """Raise ConfigError for a file of the bundled Valkey that it could not use."""
    try:
        for name in _FILES:
            _check_file(folder / name)
        place = folder / SOCKET
        if place.exists() and not place.is_socket():
            raise _wrong(folder, f"{SOCKET} is not a socket; move it away")
        data = folder / _FOLDER
        if data.exists():
            if not data.is_dir():
                raise _wrong(folder, f"{_FOLDER} is not a directory; move it away")
            if not os.access(data, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
                raise _wrong(folder, f"{_FOLDER} belongs to another user")
            for file in data.iterdir():
                _check_file(file)
    except OSError as error:
        raise _wrong(folder, _reason(error)) from error


def _check_file(path: Path) -> None:
    if path.exists():
        if not path.is_file():
            raise _wrong(path.parent, f"{path.name} is not a file; move it away")
        if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
            raise _wrong(path.parent, f"{path.name} belongs to another user")


def _wrong(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"store.data_dir: {path}: {reason}")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
