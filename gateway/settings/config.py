"""A deployment's settings: one YAML file plus a few environment variables, as a frozen pydantic tree.

Unknown names are refused, with the path to them. Secrets are named by environment variable or file, never written
here. `include` takes in another file under this one, so that several deployments share one model catalog.
Does not handle reloading. Raises ConfigError, whose message is one line for the operator.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from ipaddress import IPv6Address
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    ValidationError,
    field_validator,
    model_validator,
)

from gateway.settings.config_file import ConfigError as ConfigError
from gateway.settings.config_file import read_config
from gateway.settings.environment import override


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Priority = Literal["high", "normal", "low"]
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+")
_TYPES = re.compile(r"str|list\[.*\]")
"""What pydantic puts behind the place of a value that may be of several types."""
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")


def _own_path(path: Path) -> Path:
    """Return a path with `~` as the user's home. Raises ValueError for one that no system call takes."""
    if "\0" in str(path):
        raise ValueError("must not contain a null character")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    return Path(os.path.expanduser(path))


def _not_empty(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("must not be empty")
    return value


_OwnPath = Annotated[Path, AfterValidator(_own_path), BeforeValidator(_not_empty)]


def _is_ipv6(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(IPv6Address(host))
    return False


def _base_url(url: str) -> str:
    """Return an http(s) URL as it is. Raises ValueError where it is none, or holds what belongs elsewhere."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http or https URL")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("must not contain credentials, a query or a fragment; keys are named by environment variable")
    return url


class AdmissionSettings(_Settings):
    enabled: bool = True
    """Queue generations in front of the engine, fairly across keys; off hands them on in the order they come."""
    policy: Literal["fair", "fifo"] = "fair"
    """`fair` serves keys of the same priority equally, by tokens; `fifo` knows no keys, for comparison."""
    max_queued_requests: int = Field(1024, ge=0)
    """Requests that may wait. One key may have as many waiting as there are places free: alone it fills half of them,
    so that others always find one."""
    max_wait_s: float = Field(300.0, gt=0)
    """Longest wait, measured or predicted; more is refused. Half of what the OpenAI SDKs wait for an answer."""
    in_flight_per_key: int | None = Field(None, ge=1)
    """Sequences that one key may have in the engine at once. null leaves one eighth, at least one, to others while
    other keys are about (within the last minute), so that they need not wait until one of a flood's generations
    ends."""
    max_in_flight: int | None = Field(None, ge=1)
    """Sequences in the engine at once; null means as many as it runs, its `max_num_seqs`. A remote engine reports none
    and has no bound."""


class _EngineSettings(_Settings):
    lazy: bool = False
    """Load at the first request instead of at start; clients get keep-alive comments meanwhile."""
    admission: AdmissionSettings = AdmissionSettings()
    """The queue in front of the engine."""
    engine_stall_s: float = Field(20.0, gt=0)
    """Seconds for which the engine core may neither answer nor use CPU time; then it counts as dead."""
    engine_busy_s: float = Field(300.0, gt=0)
    """Seconds for which a core that uses CPU time may leave the gateway without an answer: it compiles kernels or
    captures CUDA graphs. After that it counts as dead too, because a core whose GPU hangs spins as well."""
    max_engine_restarts: int = Field(3, ge=0)
    """Restarts allowed within `restart_window_s`; one more failure ends the process, so that a supervisor sees it."""
    restart_window_s: float = Field(600.0, gt=0)
    """Seconds over which restarts are counted."""


_NOT_ARGS = {
    "model": "the engine's own `model`",
    "revision": "the engine's own `revision`",
    "trust_remote_code": "the engine's own `trust_remote_code`",
    "download_dir": "`weights.cache_dir`",  # vLLM's would move the weights alone
    "hf_token": "the environment variable HUGGINGFACE_TOKEN",
}
"""Fields of vLLM's AsyncEngineArgs that are settings of ours, and where they are set."""


class EmbeddedSettings(_EngineSettings):
    kind: Literal["embedded", "pooling"]
    """`embedded` runs vLLM in this process; `pooling` does so for an embedding model; `remote` forwards to servers
    elsewhere; `mock` makes words without a model, for trying things out."""
    model: str = "demo"
    """Hugging Face id or local path of the checkpoint. `demo` is the tiny model that ships with the gateway.
    SHANNON_MODEL_ID overrides it for the engine of the default model."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face repository; null means its main branch. Name a commit in production, so
    that what is served can't change under you."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Any field of vLLM's `AsyncEngineArgs`, under its own name."""
    tool_parser: str | None = None
    """vLLM's parser for the model's tool calls (`hermes`, `llama3_json`, ...); null finds it from the model's family,
    an empty string turns it off."""
    reasoning_parser: str | None = None
    """vLLM's parser for the model's reasoning (`qwen3`, `deepseek_r1`, ...); as above."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Only for checkpoints you would also install as packages."""

    @model_validator(mode="after")
    def _args_must_be_vllms_own(self) -> EmbeddedSettings:
        for name in self.args.keys() & _NOT_ARGS.keys():
            raise ValueError(f"args.{name}: set {_NOT_ARGS[name]} instead")
        return self


class RemoteSettings(_EngineSettings):
    kind: Literal["remote"]
    """As above."""
    urls: list[str] = Field(min_length=1)
    """Base URLs of OpenAI-compatible servers of the same model, each ending in `/v1`: the replicas."""
    model: str = Field(min_length=1)
    """The model's name at those servers."""
    api_key_env: str | None = None
    """Environment variable that holds the API key for those servers; null where they ask for none."""
    choice: Literal["least_loaded", "sticky"] = "least_loaded"
    """Which replica serves a request: the one with the fewest requests of this gateway, or, with `sticky`, the one
    that holds the session's cached prefix, unless it is down or much more loaded."""
    connect_timeout_s: float = Field(5.0, gt=0)
    """How long making a connection may take."""
    first_token_timeout_s: float = Field(120.0, gt=0)
    """How long a replica may be silent before the first token; then another one is tried."""
    queue_timeout_s: float = Field(600.0, gt=0)
    """How long a replica may go without a token, the first included, while comments in its stream show that it lives:
    another Shannon sends them from its queue. SDKs give up after 600 s."""
    idle_timeout_s: float = Field(60.0, gt=0)
    """How long a stream may be silent after its first token; longer than the slowest step of a healthy server."""
    retries: int = Field(2, ge=0, le=10)
    """Further attempts of a request whose client has seen nothing yet, each at another replica if there is one."""
    breaker_failures: int = Field(3, ge=1)
    """Failures in a row after which a replica is left alone, if its health probe fails too, or if other replicas served
    the same requests: a request's own fault is not held against a replica."""
    breaker_open_s: float = Field(1.0, gt=0)
    """How long it is left alone before it is asked for its health again; doubles each time."""
    breaker_max_open_s: float = Field(10.0, gt=0)
    """Longest pause between two such questions; servers take longer than this to start."""
    max_model_len: int | None = Field(None, ge=1)
    """Context length in tokens. null takes what the servers report, as vLLM does; others need it here."""
    takes_images: bool = True
    """Whether the model takes images."""
    cache_salt: bool | None = None
    """Send the caller's cache salt, so that callers share no cached prefix. null sends it to servers that call
    themselves vLLM; others refuse it."""
    priority: bool = False
    """Send requests' priorities; the servers must run with vLLM's `--scheduling-policy priority`, or they refuse."""
    tls_verify: bool = True
    """Check the servers' certificates."""
    tls_ca_file: str | None = None
    """PEM file of the authority that signed them; null takes the public ones."""

    @field_validator("urls")
    @classmethod
    def _urls_must_be_base_urls(cls, urls: list[str]) -> list[str]:
        urls = [url.rstrip("/") for url in urls]
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or not parts.path.endswith("/v1"):
                raise ValueError("must be http or https URLs that end in /v1")
            if parts.username or parts.password or parts.query or parts.fragment:
                raise ValueError("must not contain credentials, a query or a fragment; the key goes into api_key_env")
        if len(set(urls)) < len(urls):
            raise ValueError("must differ from each other")
        return urls

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `engine.remote.engine.RemoteEngine`, but for the key."""
        return self.model_dump(exclude={"kind", "api_key_env", *_EngineSettings.model_fields})


class MockSettings(_EngineSettings):
    kind: Literal["mock"]
    """As above."""
    model: str = "mock"
    """Its name in logs."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `engine.mock.MockEngine`."""


ENGINE_KINDS = ("embedded", "pooling", "remote", "mock")
EngineSettings = Annotated[EmbeddedSettings | RemoteSettings | MockSettings, Field(discriminator="kind")]


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


class WeightsSettings(_Settings):
    cache_dir: _OwnPath | None = None
    """Directory of the model cache, in Hugging Face's own layout: `shannon download` fills it, `shannon serve` reads
    it. null means HF_HUB_CACHE, else `hub` in HF_HOME; SHANNON_MODEL_CACHE overrides it."""


class BudgetSettings(_Settings):
    seconds: float = Field(300.0, gt=0)
    """Time for the whole request; agents stop in time for the answer to be written. SDKs give up after 600 s."""
    tokens: int = Field(100_000, ge=1)
    """Prompt and completion tokens of all agents together; the answer is written in any case."""
    tool_calls: int = Field(60, ge=0)
    """Tool calls of all agents together."""
    concurrency: int = Field(6, ge=1, le=64)
    """Agents that work at once."""


class ModelSettings(_Settings):
    engine: str = "main"
    """Name of the engine that serves this model."""
    workflow: Literal[
        "chat",
        "quick_research",
        "standard_research",
        "deep_research",
        "academic_research",
        "complex",
        "ads_research",
        "analytics",
    ] = "chat"
    """What the model does with a request; `chat` is one generation, the others are many, by agents with tools."""
    budget: BudgetSettings = BudgetSettings()
    """What one request may spend on agents; `chat` has none."""
    tools: list[str] | None = None
    """Tools that its agents may use: names of built-in ones, `server` or `server/*` for all tools of an MCP server,
    `server/tool` or `server__tool` for one. null means all. A model that works with private documents can be kept from
    the web, or from other servers, in this way; `shannon_options.tools` of a request only narrows it further."""
    description: str
    """One line for people, shown by GET /v1/models."""
    limits: LimitSettings = LimitSettings()
    """Per key."""
    defaults: DefaultSettings = DefaultSettings()
    """Sampling parameters for requests that don't set them."""
    max_output_tokens: int | None = Field(None, ge=1)
    """Most completion tokens of one choice: a request that names more is refused, one that names none is held to it.
    null leaves it to the context. SHANNON_MAX_OUTPUT_TOKENS overrides it for all models."""
    max_input_tokens: int | None = Field(None, ge=1)
    """Longest prompt. Of a longer conversation the oldest turns are left out; system prompts and the last turn stay,
    and are refused if they alone are longer. null leaves it to the context, and leaves nothing out.
    SHANNON_MAX_INPUT_TOKENS overrides it for all models."""


class KeySettings(_Settings):
    name: str
    """For people; appears in logs beside the key's id."""
    key_env: str | None = Field(None, pattern=_VARIABLE)
    """Environment variable that holds the key (`sk-shannon-...`)."""
    key_file: _OwnPath | None = None
    """File that holds it, in place of `key_env`: a mounted secret, read again on SIGHUP."""
    tenant: str = "default"
    """Sessions and cached prompts are never shared between tenants."""
    models: list[str] | None = None
    """Model ids that the key may use; null means all."""
    admin: bool = False
    """May manage keys and see the usage of all keys."""
    metrics: bool = False
    """May read /metrics, as admin keys may: for Prometheus, with `models: []`."""
    priority: Priority = "normal"
    """Keys of a better priority are served first while requests wait for an engine."""

    @model_validator(mode="after")
    def _key_must_come_from_one_place(self) -> KeySettings:
        if (self.key_env is None) == (self.key_file is None):
            raise ValueError("give either key_env or key_file")
        return self


class StoreSettings(_Settings):
    url_env: str = "SHANNON_REDIS_URL"
    """Environment variable with the store's URL: `redis://`, `rediss://` (TLS), `unix://`, `redis+cluster://` or
    `redis+sentinel://host:port,host:port/service`. Unset, a bundled Valkey is started in `data_dir`."""
    data_dir: _OwnPath = Path(".shannon")
    """Where the bundled Valkey keeps its file, and where usage is journalled while the store is away."""
    max_memory_mb: int = Field(512, ge=16)
    """Memory in MiB that the bundled Valkey's data may take. Beyond it, sessions, streams, responses and jobs are
    refused, while keys, limits and usage continue. 512 MiB hold some 50,000 turns of 10 KB."""
    command_timeout_ms: int = Field(50, ge=1)
    """Longest wait for the store on the path of a request: for limits, keys and usage."""
    bulk_timeout_ms: int = Field(2000, ge=1)
    """Longest wait for the store elsewhere: for sessions, streams, responses and jobs, which may be large, and for
    administration, where a late answer is better than none."""
    breaker_s: float = Field(1.0, gt=0)
    """After a failure the store is left alone this long between probes; requests continue without it at once."""
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
    """Requests with a wrong key that one address may make in a minute, so that guessing is slow. Keys that were used
    from there before, 1,024 at most, are not held up."""


class PrefixCacheSettings(_Settings):
    shared: dict[str, list[str]] = Field(default_factory=dict)
    """Groups of tenants that may share cached prompt prefixes, by name; a tenant in no group shares with no other."""

    @model_validator(mode="after")
    def _tenants_must_be_in_one_group(self) -> PrefixCacheSettings:
        tenants = [tenant for group in self.shared.values() for tenant in group]
        for tenant in tenants:
            if tenants.count(tenant) > 1:
                raise ValueError(f"shared: the tenant {tenant!r} is in more than one group")
        return self


class SessionSettings(_Settings):
    enabled: bool = True
    """Keep conversations under X-Session-ID."""
    ttl_s: int = Field(86_400, ge=1)
    """A session is forgotten this long after its last use."""
    max_turns: int = Field(200, ge=1)
    """Turns kept per session; the oldest go first."""
    max_bytes: int = Field(262_144, ge=1024)
    """Bytes kept per session; the oldest turns go first."""
    max_bytes_per_key: int = Field(16 * 2**20, ge=1024)
    """Bytes of sessions and stored responses that one key keeps; those that were not used for longest go first. 16 MiB
    are 64 sessions of the largest size. At least `max_bytes`."""
    derived: bool = True
    """Give requests without X-Session-ID a session as well. Off stores nothing of them and announces no id."""
    derived_ttl_s: int = Field(600, ge=1)
    """Such a session is forgotten this long after its last use, unless its id is sent: then it is like any other. Long
    enough for a reply, short enough that conversations no client asked to keep don't pile up."""
    derived_bytes_per_key: int = Field(262_144, ge=1024)
    """Bytes of such sessions that one key keeps; those that were not used for longest go first."""

    @model_validator(mode="after")
    def _key_must_have_room_for_a_session(self) -> SessionSettings:
        if self.max_bytes_per_key < self.max_bytes:
            raise ValueError(f"max_bytes_per_key: must be at least max_bytes, which is {self.max_bytes}")
        return self


class ResumeSettings(_Settings):
    enabled: bool = True
    """Offer streams of chat completions that can be resumed after they were cut."""
    ttl_s: float = Field(120.0, gt=0)
    """How long such a stream is kept after its end, and how long it is generated without a reader: long enough for a
    telephone to find its network again."""
    max_bytes: int = Field(4 * 2**20, ge=262_144)
    """Bytes kept of one stream, of the newest frames; a frame of plain text takes about 250."""
    max_streams_per_key: int = Field(64, ge=1)
    """Resumed streams that one key may read at once from each gateway; each reads from the store."""
    max_bytes_per_key: int = Field(64 * 2**20, ge=262_144)
    """Bytes kept of all streams of one key, those of jobs included. Each has 256 KiB at least, so 64 MiB are 256 of
    them; one that needs more gets it while there is room, else its oldest frames go."""
    keys: list[str] = Field(default_factory=list)
    """Ids of API keys (the part after `sk-shannon-`) whose streams are all resumable, unless a request says no."""


class JobSettings(_Settings):
    resume_s: float = Field(10.0, ge=0)
    """How long a dropped stream of jobs may be resumed; after that its client has left, and its jobs are
    cancelled. 0 cancels them at once."""
    max_queued_per_client: int = Field(32, ge=1)
    """Jobs that one client may have, the running one included."""
    max_job_bytes: int = Field(262_144, ge=1024, le=262_144)
    """Largest job: jobs wait in the store, which takes no larger values at once."""
    max_queued_bytes_per_key: int = Field(8 * 2**20, ge=1024)
    """Bytes of one key's jobs that wait, of all its clients: 8 MiB are 32 of the largest size."""
    max_streams_per_key: int = Field(128, ge=1)
    """Streams of jobs that one key may have open at each gateway."""
    max_idle_s: float = Field(600.0, gt=0)
    """A stream without a job for this long is ended, so that forgotten ones don't pile up."""
    max_log_bytes: int = Field(2**20, ge=262_144)
    """Bytes kept of one stream's events, the newest, for taking it up again."""


class ServerSettings(_Settings):
    host: str | list[str] = "127.0.0.1"
    """Address to listen on, or a list of them; `::` means all of IPv6 and IPv4. SHANNON_HOST overrides it, with commas
    between several."""
    port: int = Field(8080, ge=0, le=65535)
    """Port to listen on, 0 for any free one; SHANNON_PORT overrides it."""
    allowed_hosts: list[str] = Field(default_factory=list)
    """Host names accepted in the Host header, `*.example.com` for subdomains; empty accepts any."""
    trusted_proxies: list[str] = Field(default_factory=list)
    """Addresses of proxies whose X-Forwarded-For is the client's address; empty trusts none."""
    cors_origins: list[str] = Field(default_factory=list)
    """Browser origins that may call the API; empty means none."""
    metrics_public: bool = False
    """Serve GET /metrics without a key, for a Prometheus that can't send one."""
    max_connections: int = Field(8192, ge=16)
    """Clients connected at once, at most half of the files that the process may open (`ulimit -Hn`). Beyond it,
    connections without a running request of a key are closed, those first that have been so for longest; one key gets
    about two thirds. Each may hold 64 KiB of a request that is not complete."""
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """Largest request body. 8 MiB holds a million-token prompt, and stops a flood before it is parsed."""
    max_large_bodies: int = Field(32, ge=1)
    """Bodies of more than 256 KiB that are received or parsed at once; others wait. Each may take 16 MiB, the one that
    is parsed ten times its size."""
    max_large_bodies_per_key: int = Field(8, ge=1)
    """How many of them may be of one API key, so that one key leaves places to others."""
    body_timeout_s: float = Field(60.0, gt=0)
    """How long a request body may take to arrive; a client that stalls holds a connection no longer than this."""
    keepalive_s: float = Field(15.0, gt=0)
    """Silence in a stream after which a comment line is sent; proxies commonly cut at 60 s."""
    stream_chunk_chars: int | None = Field(None, ge=1)
    """Characters per frame of a stream; null sends tokens as they come, which is faster and cheaper.
    SHANNON_STREAM_CHUNK_SIZE overrides it."""
    idle_connection_s: int = Field(120, ge=1)
    """How long an idle connection stays open; longer than the 60-90 s of common load balancers, so they close first."""
    drain_timeout_s: float = Field(30.0, ge=0)
    """How long running requests may continue after SIGTERM."""

    @property
    def hosts(self) -> list[str]:
        """The addresses of `host`."""
        given = self.host.split(",") if isinstance(self.host, str) else self.host
        return [host.strip() for host in given]

    @field_validator("host")
    @classmethod
    def _host_must_be_addresses(cls, host: str | list[str]) -> str | list[str]:
        for name in host.split(",") if isinstance(host, str) else host or [""]:
            if not _HOST_NAME.fullmatch(name.strip()) and not _is_ipv6(name.strip()):
                raise ValueError(f"{name!r} is not an address or host name to listen on, such as 0.0.0.0 or ::1")
        return host


class LoggingSettings(_Settings):
    format: Literal["text", "json"] = "text"
    """`text` for people, `json` for machines: every line of every logger, vLLM's included, is one object then.
    SHANNON_LOG_FORMAT overrides it."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged. Each request is a line of `info`, probes and scrapes are lines of `debug` unless their
    answer changes. Only `debug` may quote a request, where a remote server refused it. SHANNON_LOG_LEVEL overrides it;
    vLLM's own is VLLM_LOGGING_LEVEL."""


class FetchSettings(_Settings):
    timeout_s: float = Field(10.0, gt=0)
    """Longest time for one URL, its redirects and its body included. Looking up a name may take 5 s of it. 64 URLs are
    fetched at once, of which one key takes half at most, so that its slow sites hold up no other key."""
    max_redirects: int = Field(3, ge=0, le=10)
    """Redirects that are followed, each checked as the first URL was."""
    ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(default_factory=lambda: [80, 443])
    """Ports that may be asked; services on other ports are seldom public. Empty allows any."""
    allowed_networks: list[IPvAnyNetwork] = Field(default_factory=list)
    """Networks (`10.20.0.0/16`) that may be reached although they are not public; all others are refused."""


class ImageSettings(_Settings):
    fetch: bool = True
    """Fetch images that are given by http(s) URL; off takes data URLs only."""
    max_images: int = Field(8, ge=1)
    """Images in one request."""
    max_image_bytes: int = Field(5 * 2**20, ge=1024)
    """Largest image, as a file; `server.max_body_bytes` bounds all data URLs of a request together."""
    max_pixels: int = Field(16_777_216, ge=1)
    """Pixels of all images of a request together, 4096 by 4096. A small file can hold very many; each takes 4 bytes,
    and twice as many keep vLLM busy for more than a second."""


class WebSearchSettings(_Settings):
    provider: Literal["searxng", "brave", "tavily", "serper"]
    """Who searches: a SearXNG of your own, or one of three services that sell searches."""
    url: str | None = None
    """Base URL of the service; null means the seller's own. SearXNG needs one, and `json` in its `search.formats`."""
    api_key_env: str | None = None
    """Environment variable that holds the API key; null means BRAVE_API_KEY, TAVILY_API_KEY or SERPER_API_KEY, and
    none for SearXNG."""
    max_results: int = Field(8, ge=1, le=20)
    """Results of one search where the agent names no number."""
    language: str | None = Field(None, pattern=r"^[a-z]{2,3}(-[A-Z]{2})?$")
    """Language to prefer, as `en` or `de-CH`; null leaves it to the service. Tavily knows none."""
    timeout_s: float = Field(10.0, gt=0)
    """Longest time for one attempt of a search."""
    requests_per_s: float | None = Field(None, gt=0)
    """Searches that this process begins in a second, for plans that allow few; others wait. null means no limit."""

    @model_validator(mode="after")
    def _url_must_be_a_base_url(self) -> WebSearchSettings:
        if self.url is None:
            if self.provider == "searxng":
                raise ValueError("url: SearXNG needs the address of your server, as http://searxng:8080")
            return self
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url: must be an http or https URL")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("url: must not contain credentials, a query or a fragment; the key goes into api_key_env")
        return self


class WebFetchSettings(_Settings):
    enabled: bool = True
    """Let agents read web pages, under the rules of `fetch`."""
    robots: bool = True
    """Ask each site's robots.txt first, as `shannon-gateway`, and keep to it."""
    max_bytes: int = Field(8 * 2**20, ge=1024)
    """Largest page or PDF. Of HTML the first 4 MiB are read."""


class LocalSearchSettings(_Settings):
    folder: _OwnPath
    """Documents that agents may search and read: PDF, HTML, Markdown and text, folders within included, hidden ones
    not. All of it is open to every key that may use a model with these tools."""
    index: _OwnPath | None = None
    """File of the index, on a local disk; null means `documents.sqlite3` in `store.data_dir`. One per folder."""
    refresh_s: float = Field(60.0, gt=0)
    """Pause between two looks through the folder for what is new, changed or gone."""
    max_file_bytes: int = Field(32 * 2**20, ge=1024)
    """Largest document; larger ones are left out, and logged."""
    max_results: int = Field(8, ge=1, le=20)
    """Passages of one search where the agent names no number."""


class ReadingSettings(_Settings):
    processes: int = Field(3, ge=1, le=32)
    """Processes that parse web pages at once; one key uses half of them at most, rounded up. The documents of
    `local_search` have one more. Each may take 1 GiB."""
    timeout_s: float = Field(15.0, gt=0)
    """Longest time to parse one page or document; it is given up then."""


class Ga4Settings(_Settings):
    property_id: str = Field(pattern=r"^[0-9]{1,20}$")
    """Number of the Google Analytics 4 property, as its admin page shows it."""
    credentials_env: str = Field("GOOGLE_APPLICATION_CREDENTIALS", pattern=_VARIABLE)
    """Environment variable that holds the path of a service account's key file (JSON). The account needs the role
    Viewer in the property."""
    url: str = "https://analyticsdata.googleapis.com"
    """Base URL of the Data API."""
    timeout_s: float = Field(30.0, gt=0)
    """Longest time for one attempt of a report."""

    @field_validator("url")
    @classmethod
    def _url_must_be_a_base_url(cls, url: str) -> str:
        return _base_url(url)


class SerpAdsSettings(_Settings):
    provider: Literal["serper", "searchapi"]
    """Who fetches results pages, with the ads on them."""
    url: str | None = None
    """Base URL of the service; null means the seller's own."""
    api_key_env: str | None = Field(None, pattern=_VARIABLE)
    """Environment variable that holds the API key; null means SERPER_API_KEY or SEARCHAPI_API_KEY."""
    country: str = Field("us", pattern=r"^[a-z]{2}$")
    """Where the search is made from, if the agent names no country; ads differ by it."""
    language: str = Field("en", pattern=r"^[a-z]{2}(-[a-z]{2,4})?$")
    """Language of the page, if the agent names none."""
    timeout_s: float = Field(20.0, gt=0)
    """Longest time for one attempt; such services load whole pages."""

    @field_validator("url")
    @classmethod
    def _url_must_be_a_base_url(cls, url: str | None) -> str | None:
        return url if url is None else _base_url(url)


class McpServerSettings(_Settings):
    command: list[str] = Field(default_factory=list)
    """Program and arguments of a server that speaks over its standard input and output; it dies with the gateway."""
    env: list[Annotated[str, Field(pattern=_VARIABLE)]] = Field(default_factory=list)
    """Environment variables that the program gets; of the others only PATH, HOME and the like."""
    url: str | None = None
    """Address of a server that speaks streamable HTTP, in place of `command`."""
    headers_env: dict[str, Annotated[str, Field(pattern=_VARIABLE)]] = Field(default_factory=dict)
    """HTTP headers for it, each with the environment variable that holds its value."""
    tools: list[str] | None = None
    """Tools that agents may call, by the server's own names; null means all that it offers."""
    timeout_s: float = Field(30.0, gt=0)
    """Longest time for the server to start, and for one answer."""

    @model_validator(mode="after")
    def _must_be_one_kind(self) -> McpServerSettings:
        if bool(self.command) == bool(self.url):
            raise ValueError("give either command or url")
        if self.url is not None:
            _base_url(self.url)
            if self.env:
                raise ValueError("env: is for servers with a command; use headers_env")
        elif self.headers_env:
            raise ValueError("headers_env: is for servers with a url; use env")
        return self


BUILT_IN_TOOLS = (
    *("web_search", "web_fetch", "local_search", "local_read", "ga4_report", "ga4_realtime", "ga4_metadata"),
    "serp_ads",
)
"""Names of the gateway's own tools, configured or not."""


class AnswerSettings(_Settings):
    images: list[str] = Field(default_factory=list)
    """Hosts whose images an answer of a model with agents may show, `*.example.com` for all below one. Empty allows
    none: loading an image reports to its host whatever a page made the model write into the address."""

    @field_validator("images")
    @classmethod
    def _images_must_be_hosts(cls, images: list[str]) -> list[str]:
        for host in images:
            name = host.removeprefix("*.")
            if not name or set(name) & set("/:*@?#\\ ") or not name.isascii():
                raise ValueError(f"{host!r} is not a host; give names such as pictures.example.com")
        return [host.lower() for host in images]


class ToolSettings(_Settings):
    web_search: WebSearchSettings | None = None
    """Search of the web, for research models; null means none."""
    web_fetch: WebFetchSettings = WebFetchSettings()
    """Reading of web pages."""
    local_search: LocalSearchSettings | None = None
    """Search of a folder of your own documents, which needs no network; null means none."""
    reading: ReadingSettings = ReadingSettings()
    """How pages and documents are parsed: they are untrusted."""
    ga4: Ga4Settings | None = None
    """Google Analytics 4, for analytics models; null means none."""
    serp_ads: SerpAdsSettings | None = None
    """Ads on results pages, for ads research; null means none."""
    mcp: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*([_-][a-z0-9]+)*$", max_length=24)], McpServerSettings] = (
        Field(default_factory=dict)
    )
    """Servers of the Model Context Protocol, by name; their tools are called `name__tool`."""


class InspectorSettings(_Settings):
    enabled: bool = False
    """Let clients look into models that run in this process: attention, entropy, best tokens. The checkpoint is loaded
    a second time while the inspector is in use, by transformers in a process of its own."""
    public: bool = False
    """Serve /chat/stream and /inspect/full_attn without a key. /v1/inspect always needs one."""
    requests_per_minute: int = Field(10, ge=1)
    """Requests to those two routes that one address may make in a minute."""
    burst: int = Field(3, ge=1)
    """How many of them it may make at once."""
    max_prompt_bytes: int = Field(16_384, ge=1)
    """Longest prompt, as the chat template renders it, in UTF-8."""
    max_new_tokens: int = Field(512, ge=1)
    """Most tokens of one request."""
    max_attention_tokens: int = Field(1024, ge=1)
    """Most tokens that a whole attention matrix covers, the last ones; 1024 of them make 8 MB of JSON."""
    max_queued_requests: int = Field(4, ge=0)
    """Requests that may wait for the one that runs; more get 503."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the checkpoint runs. On `cuda` its weights take GPU memory that the engine must leave free."""
    threads: int = Field(1, ge=1)
    """Threads on the CPU; the engine needs the others."""
    idle_s: float = Field(300.0, gt=0)
    """The process ends after this long without a request."""
    load_timeout_s: float = Field(300.0, gt=0)
    """How long loading the checkpoint may take."""
    stall_s: float = Field(60.0, gt=0)
    """A step that takes longer has hung: the process is killed, and the next request gets another."""
    max_request_s: float = Field(120.0, gt=0)
    """How long one request may have the process to itself."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of `TransformersInspector`, without the checkpoints."""
        return self.model_dump(exclude={"enabled", "public", "requests_per_minute", "burst", "max_new_tokens"})


class Config(_Settings):
    engines: dict[str, EngineSettings]
    """By name. Models refer to these names."""
    models: dict[str, ModelSettings]
    """By model id, as clients send it."""
    default_model: str = "shannon-chat"
    """Serves requests that name no model."""
    keys: list[KeySettings] = Field(default_factory=list)
    """API keys, by reference to the environment or to files; SHANNON_BOOTSTRAP_KEY or SHANNON_BOOTSTRAP_KEY_FILE adds
    one."""
    store: StoreSettings = StoreSettings()
    """Keys, limits, sessions and usage live here."""
    limits: LimiterSettings = LimiterSettings()
    """How limits are enforced; the limits themselves stand with the models."""
    sessions: SessionSettings = SessionSettings()
    """Stored conversations."""
    prefix_cache: PrefixCacheSettings = PrefixCacheSettings()
    """Who may share cached prompts."""
    fetch: FetchSettings = FetchSettings()
    """How URLs are fetched that clients name."""
    images: ImageSettings = ImageSettings()
    """Images in messages."""
    tools: ToolSettings = ToolSettings()
    """What agents may call."""
    answers: AnswerSettings = AnswerSettings()
    """What answers of models with agents may hold."""
    resume: ResumeSettings = ResumeSettings()
    """Chat streams that can be resumed."""
    jobs: JobSettings = JobSettings()
    """Jobs that are submitted for a stream."""
    server: ServerSettings = ServerSettings()
    """The HTTP side."""
    logging: LoggingSettings = LoggingSettings()
    """What is written to stderr."""
    inspector: InspectorSettings = InspectorSettings()
    """Looking into models."""
    weights: WeightsSettings = WeightsSettings()
    """Where checkpoints from a hub lie."""

    @model_validator(mode="after")
    def _names_must_exist(self) -> Config:
        for model_id, model in self.models.items():
            if model.engine not in self.engines:
                raise ValueError(f"models.{model_id}.engine: there is no engine named {model.engine!r}")
            for name in model.tools or ():
                self._check_tool(f"models.{model_id}.tools", name)
        if self.default_model not in self.models:
            raise ValueError(f"default_model: there is no model named {self.default_model!r}")
        for key in self.keys:
            for model_id in key.models or ():
                if model_id not in self.models:
                    raise ValueError(f"keys: {key.name!r} names model {model_id!r}, which does not exist")
        return self

    def _check_tool(self, where: str, name: str) -> None:
        """Raise ValueError on the name of a tool that there can't be."""
        server, separator, tool = name.replace("/", "__", 1).partition("__")
        if name in BUILT_IN_TOOLS or (server in self.tools.mcp and bool(separator) == bool(tool)):
            listed = self.tools.mcp[server].tools if server in self.tools.mcp else None
            shown = [_NOT_IN_NAMES.sub("_", own_name) for own_name in listed or ()]  # as models call them
            if listed is None or tool in ("", "*", *listed, *shown):
                return
            names = ", ".join(f"{server}/{known}" for known in listed)
            raise ValueError(f"{where}: {name!r} is not among the tools of that server, which are {names}")
        known = [*BUILT_IN_TOOLS, *(f"{server}/*" for server in self.tools.mcp)]
        raise ValueError(f"{where}: there is no tool {name!r}; the tools are {', '.join(known)}")


def _words(error: Any) -> str:
    """The error of a setting, without Python's terms."""
    known = {
        "model_type": "must be a mapping of settings",
        "dict_type": "must be a mapping",
        "path_type": "must be a path",
        "string_unicode": "must be valid Unicode",
        "invalid_key": "a name in it is not text; put it in quotes",
    }
    return known.get(error["type"]) or error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def load_config(path: Path, environment: Mapping[str, str] = os.environ) -> Config:
    """Read `path`, follow its includes, apply the environment. Raises ConfigError."""
    tree, origins = override(read_config(path), environment)
    return parse_config(tree, str(path), origins)


def parse_config(
    tree: dict[str, Any], source: str = "configuration", origins: Mapping[str, str] = MappingProxyType({})
) -> Config:
    """Validate a tree of plain values. Raises ConfigError that names the setting and `source`.

    `origins` maps settings that came from environment variables to those.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        loc = list(first["loc"])
        if loc[:1] == ["engines"] and len(loc) > 2:
            del loc[2]  # the kind, which pydantic puts between the engine's name and the setting
        if first["type"] == "invalid_key":
            loc.pop()
        while loc and _TYPES.fullmatch(str(loc[-1])):
            loc.pop()
        where = ".".join(str(part) for part in loc)
        message = _words(first)
        if where in origins:
            right = message.partition(",")[0]
            raise ConfigError(f"{origins[where]}: {right}, not {first['input']!r} (it sets {where})") from error
        if first["type"] == "extra_forbidden":
            message = "unknown setting"
        elif first["type"].startswith("union_tag"):
            where, message = f"{where}.kind", f"must be one of {', '.join(ENGINE_KINDS)}"
        raise ConfigError(f"{source}: {where + ': ' if where else ''}{message}") from error
