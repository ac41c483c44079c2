"""A deployment's settings: one YAML file plus a few environment variables, as a frozen pydantic tree.

Unknown names are refused, with the path to them. Secrets are named by environment variable, never written in the
file. `include` takes in another file under this one, so that several deployments share one model catalog.
Leaves out reloading. Fails with ConfigError, whose message is one line for the operator.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(Exception):
    """The configuration can't be used. The message names the setting."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EngineSettings(_Settings):
    kind: Literal["embedded", "mock"]
    """`embedded` runs vLLM in this process; `mock` makes words without a model, for trying things out."""
    model: str = "demo"
    """Hugging Face id or local path of the checkpoint. `demo` is the tiny model that ships with the gateway."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Passed to the engine as they are: for `embedded` any field of vLLM's `AsyncEngineArgs`."""
    engine_stall_s: float = Field(20.0, gt=0)
    """Seconds without an answer from the engine core after which it counts as dead. Must exceed its longest step."""
    max_engine_restarts: int = Field(3, ge=0)
    """Restarts allowed within `restart_window_s`; one more failure ends the process, so that a supervisor sees it."""
    restart_window_s: float = Field(600.0, gt=0)
    """Seconds over which restarts are counted."""


class LimitSettings(_Settings):
    requests_per_minute: int = Field(60, ge=1)
    """Requests that one key may start in any 60 s."""
    tokens_per_minute: int = Field(200_000, ge=1)
    """Prompt plus completion tokens that one key may use in any 60 s."""
    concurrent_requests: int | None = Field(None, ge=1)
    """Requests that one key may have running at once; null means no such limit."""


class DefaultSettings(_Settings):
    max_tokens: int = Field(4096, ge=1)
    """Completion tokens where the request names no maximum, cut to what the context leaves."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Sampling temperature where the request names none; null leaves it to the checkpoint's generation config."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus sampling threshold where the request names none; null as above."""


class ModelSettings(_Settings):
    engine: str = "main"
    """Name of the engine that serves this model."""
    workflow: Literal["chat"] = "chat"
    """What the model does with a request; `chat` is one generation."""
    description: str
    """One line for people, shown by GET /v1/models."""
    limits: LimitSettings = LimitSettings()
    """Per key."""
    defaults: DefaultSettings = DefaultSettings()
    """Sampling parameters for what a request leaves out."""


class KeySettings(_Settings):
    name: str
    """For people; appears in logs beside the key's id."""
    key_env: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the key (`sk-shannon-...`)."""
    tenant: str = "default"
    """Sessions and cached prompts are never shared between tenants."""
    models: list[str] | None = None
    """Model ids that the key may use; null means all."""
    admin: bool = False
    """May manage keys and see everybody's usage."""


class StoreSettings(_Settings):
    url_env: str = "SHANNON_REDIS_URL"
    """Environment variable with the store's URL: `redis://`, `rediss://` (TLS), `unix://`, `redis+cluster://` or
    `redis+sentinel://host:port,host:port/service`. Unset, a bundled Valkey is started in `data_dir`."""
    data_dir: Path = Path(".shannon")
    """Where the bundled Valkey keeps its file, and where usage is journalled while the store is away."""
    command_timeout_ms: int = Field(50, ge=1)
    """Longest wait for the store on the path of a request."""
    breaker_s: float = Field(1.0, gt=0)
    """After a failure the store is left alone this long between probes; requests go on without it at once."""
    auth_cache_ttl_s: float = Field(300.0, ge=0)
    """How long a key that was seen stays valid while the store is away."""


class LimiterSettings(_Settings):
    enabled: bool = True
    """Enforce the models' limits; usage is counted either way."""
    on_store_failure: Literal["local", "closed"] = "local"
    """While the store is away: `local` enforces a share per process and says so in X-Shannon-Limits, `closed` gives
    503."""
    replicas: int = Field(1, ge=1)
    """Gateways that share the store; a process's share of a limit, while the store is away, is the limit over this."""
    failed_auth_per_minute: int = Field(30, ge=1)
    """Requests with a wrong key that one address may make in a minute, so that guessing is slow."""


class SessionSettings(_Settings):
    enabled: bool = True
    """Keep conversations under X-Session-ID."""
    ttl_s: int = Field(86_400, ge=1)
    """A session is forgotten this long after its last use."""
    max_turns: int = Field(200, ge=1)
    """Turns kept per session; the oldest go first."""
    max_bytes: int = Field(262_144, ge=1024)
    """Bytes kept per session; the oldest turns go first."""


class ServerSettings(_Settings):
    host: str = "127.0.0.1"
    """Address to listen on; SHANNON_HOST overrides it."""
    port: int = Field(8080, ge=0, le=65535)
    """Port to listen on, 0 for any free one; SHANNON_PORT overrides it."""
    allowed_hosts: list[str] = Field(default_factory=list)
    """Host names accepted in the Host header, `*.example.com` for subdomains; empty accepts any."""
    trusted_proxies: list[str] = Field(default_factory=list)
    """Addresses of proxies whose X-Forwarded-For tells the client's address; empty trusts none."""
    cors_origins: list[str] = Field(default_factory=list)
    """Browser origins that may call the API; empty means none."""
    metrics_public: bool = False
    """Serve GET /metrics without a key, for a Prometheus that can't send one."""
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """Largest request body. 8 MiB holds a million-token prompt, and stops a flood before it is parsed."""
    body_timeout_s: float = Field(60.0, gt=0)
    """How long a request body may take to arrive; a client that stalls holds a connection no longer than this."""
    keepalive_s: float = Field(15.0, gt=0)
    """Silence in a stream after which a comment line is sent; proxies commonly cut at 60 s."""
    idle_connection_s: int = Field(120, ge=1)
    """How long an idle connection stays open; longer than the 60-90 s of common load balancers, so they close first."""
    drain_timeout_s: float = Field(30.0, ge=0)
    """How long running requests may go on after SIGTERM."""


class Config(_Settings):
    engines: dict[str, EngineSettings]
    """By name. Models refer to these names."""
    models: dict[str, ModelSettings]
    """By model id, as clients send it."""
    default_model: str = "shannon-chat"
    """Serves requests that name no model."""
    keys: list[KeySettings] = Field(default_factory=list)
    """API keys, by reference to the environment; SHANNON_BOOTSTRAP_KEY adds one."""
    store: StoreSettings = StoreSettings()
    """Keys, limits, sessions and usage live here."""
    limits: LimiterSettings = LimiterSettings()
    """How limits are enforced; the limits themselves stand with the models."""
    sessions: SessionSettings = SessionSettings()
    """Stored conversations."""
    server: ServerSettings = ServerSettings()
    """The HTTP side."""

    @model_validator(mode="after")
    def _names_must_exist(self) -> Config:
        for model_id, model in self.models.items():
            if model.engine not in self.engines:
                raise ValueError(f"models.{model_id}.engine: there is no engine named {model.engine!r}")
        if self.default_model not in self.models:
            raise ValueError(f"default_model: there is no model named {self.default_model!r}")
        for key in self.keys:
            for model_id in key.models or ():
                if model_id not in self.models:
                    raise ValueError(f"keys: {key.name!r} names model {model_id!r}, which does not exist")
        return self


_SERVER_VARIABLES = {"SHANNON_HOST": "host", "SHANNON_PORT": "port"}


def load_config(path: Path, environment: Mapping[str, str] = os.environ) -> Config:
    """Read `path`, follow its includes, apply the environment. Raises ConfigError."""
    tree = _read(path)
    given = {name: environment[v] for v, name in _SERVER_VARIABLES.items() if environment.get(v)}
    if given:
        tree = _merge(tree, {"server": given})
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a tree of plain values. Raises ConfigError that names the setting and `source`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "unknown setting"
        raise ConfigError(f"{source}: {where + ': ' if where else ''}{message}") from error


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: includes itself")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of settings")
    include = tree.pop("include", None)
    if include is None:
        return tree
    return _merge(_read(path.parent / str(include), (*seen, path)), tree)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings by key; anything else in `over` replaces what is under it."""
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
