"""Environment variables that override settings of the YAML file, the names of older deployments among them.

Works on plain values: `gateway.settings.config` checks them, and blames the variable for a bad one. A SHANNON_ name
wins over an older one, a variable over the file; an empty one counts as unset. Does not handle secrets, which the file
names itself, but for the hub's token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EACH = "*"
"""In a path: every name there is."""
DEFAULT_ENGINE = "(default)"
"""In a path: the engine of the default model, if a checkpoint can be chosen for it."""

VARIABLES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("server", "host"): ("SHANNON_HOST",),
    ("server", "port"): ("SHANNON_PORT", "GEMMA3N_PORT"),
    ("server", "stream_chunk_chars"): ("SHANNON_STREAM_CHUNK_SIZE",),
    ("logging", "format"): ("SHANNON_LOG_FORMAT",),
    ("logging", "level"): ("SHANNON_LOG_LEVEL",),
    ("weights", "cache_dir"): ("SHANNON_MODEL_CACHE",),
    ("engines", DEFAULT_ENGINE, "model"): ("SHANNON_MODEL_ID", "MODEL_NAME"),
    ("models", EACH, "max_output_tokens"): ("SHANNON_MAX_OUTPUT_TOKENS", "MAX_LENGTH"),
    ("models", EACH, "max_input_tokens"): ("SHANNON_MAX_INPUT_TOKENS",),
    ("models", EACH, "defaults", "temperature"): ("SHANNON_TEMPERATURE", "TEMPERATURE"),
    ("models", EACH, "defaults", "top_p"): ("SHANNON_TOP_P",),
}
"""Setting to the variables that override it, the strongest first."""
TOKENS = ("HUGGINGFACE_TOKEN", "HF_TOKEN")
"""Hold the token for gated and private repositories, the strongest first."""


def override(tree: dict[str, Any], environment: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return `tree` with what variables override, and the path of each such setting -> its variable."""
    origins: dict[str, str] = {}
    for pattern, variables in VARIABLES.items():
        variable, value = _first(variables, environment)
        for path in _matching(tree, pattern) if variable else ():
            tree = _set(tree, path, value)
            origins[".".join(path)] = variable
    return tree, origins


def _set(tree: dict[str, Any], path: tuple[str, ...], value: str) -> dict[str, Any]:
    """Return a copy with one value set: an alias in YAML makes two settings one object."""
    name, *rest = path
    if not rest:
        if name == "model" and tree.get(name) != value:
            tree = {other: kept for other, kept in tree.items() if other != "revision"}  # of another repository
        return tree | {name: value}
    below = tree.get(name, {})
    # What should be a mapping and is none is left to be refused.
    return tree | {name: _set(below, tuple(rest), value)} if isinstance(below, dict) else tree


def hub_token(environment: Mapping[str, str]) -> str | None:
    """Return the token for the hub, if there is one."""
    return _first(TOKENS, environment)[1] or None


def hub_environment(cache_dir: Path | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that huggingface_hub and vLLM know the cache and the token by.

    They must be set before huggingface_hub is imported. vLLM's own `download_dir` would move the weights alone: it
    looks for configuration and tokenizer in the hub's cache.
    """
    token = hub_token(environment)
    wanted = {"HF_HUB_CACHE": os.path.realpath(cache_dir.expanduser())} if cache_dir is not None else {}
    return wanted | ({"HF_TOKEN": token} if token else {})


def _first(variables: tuple[str, ...], environment: Mapping[str, str]) -> tuple[str, str]:
    for variable in variables:
        if value := environment.get(variable, "").strip():
            return variable, value
    return "", ""


def _matching(tree: dict[str, Any], pattern: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the paths of the settings that `pattern` means in `tree`."""
    names: list[str] = [EACH]
    if EACH in pattern:
        named = tree.get(pattern[0])
        names = list(named) if isinstance(named, dict) else []
    elif DEFAULT_ENGINE in pattern:
        names = _default_engine(tree)
    return [tuple(name if part in (EACH, DEFAULT_ENGINE) else part for part in pattern) for name in names]


def _default_engine(tree: dict[str, Any]) -> list[str]:
    """Return the name of the engine behind the default model, if it runs a checkpoint of its own."""
    models, engines = tree.get("models"), tree.get("engines")
    if not isinstance(models, dict) or not isinstance(engines, dict):
        return []
    model = models.get(tree.get("default_model", "shannon-chat"))
    name = model.get("engine", "main") if isinstance(model, dict) else None
    engine = engines.get(name)
    return [name] if isinstance(name, str) and isinstance(engine, dict) and engine.get("kind") == "embedded" else []
