"""Reads a deployment's YAML file and the files that it includes, as plain values.

Stricter than YAML's own loader: a name that is given twice is an error, not the last one wins. Raises ConfigError, in
one line with the file, the line and the column.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from engine.plain_file import read_plain_file


class ConfigError(Exception):
    """The configuration can't be used. The message is one line and names the setting."""


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the mapping as it is in the file; what `<<` adds to it comes later, and may be overridden."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def read_config(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings of a file, on top of those of the file that it includes. Raises ConfigError."""
    try:
        path = Path(os.path.realpath(path))
        if path in seen:
            raise ConfigError(f"{path}: includes itself")
        tree = _load(path) or {}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_problem(error)}") from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{path}: not valid YAML: {error.reason} at position {error.position}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from error
    except (ValueError, OverflowError) as error:  # of a date such as 2024-99-99, or a path with a null character
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of settings")
    include = tree.pop("include", None)
    if include is None:
        return tree
    if not isinstance(include, str):
        raise ConfigError(f"{path}: include: must be the path of one file")
    return merge(read_config(path.parent / include, (*seen, path)), tree)


def _load(path: Path) -> Any:
    return yaml.load(read_plain_file(path).decode(), _Loader)


def _problem(error: yaml.MarkedYAMLError) -> str:
    """The error and its place, in one line. YAML's own message has an excerpt of the file."""
    problem = " ".join(str(error.problem or error.context or "").split())
    mark = error.problem_mark or error.context_mark
    return problem if mark is None else f"{problem} in line {mark.line + 1}, column {mark.column + 1}"


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings by key; anything else in `over` replaces what is under it."""
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
